"""What the features are called where a backbone meets the heads."""

from __future__ import annotations

VECTOR = "vector"


def map_key(stride: int) -> str:
    """The name of the map at `stride` among a backbone's features."""
    return f"stride_{stride}"
