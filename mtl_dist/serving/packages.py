"""What `mtl serve` needs; asked before anything slow is imported."""

from __future__ import annotations

import importlib.util

from mtl_dist.errors import UserError


def check_packages() -> None:
    """Refuse to serve without the packages that it needs.

    Raises:
        UserError: which are missing.
    """
    needed = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"mtl serve: expected an installation of {', '.join(missing)}, found none. "
            'Install it with `pip install "mtl-dist[serve]"`.'
        )
