"""What one request may ask of the service."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds that hold before anything is decoded, and while it waits.

    max_bytes    of a request's body, all files together
    max_files    in one request
    max_pixels   of an image, by its header; masks are answered in its size, a float per class and pixel
    max_queue    images that wait; one more is answered 429
    max_batch    images that the model sees at once; 1 is no batching
    timeout_s    from the first byte of a request to its answer
    """

    max_bytes: int = 32_000_000
    max_files: int = 16
    max_pixels: int = 16_000_000
    max_queue: int = 64
    max_batch: int = 16
    timeout_s: float = 30.0
