"""What the formats of `mtl export` need; asked before anything slow is imported."""

from __future__ import annotations

import importlib.util
from typing import Literal, TypeAlias

from mtl_dist.errors import UserError

Format: TypeAlias = Literal["onnx", "torch", "safetensors"]


def check_packages(format: Format) -> None:
    """Refuse a format whose packages are not installed.

    Raises:
        UserError: which is missing.
    """
    needed = ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format {format}: expected an installation of {', '.join(missing)}, found none. "
            'Install it with `pip install "mtl-dist[export]"`.'
        )
