"""The names of torchvision's classifiers, read from its files: to import it, and torch, takes seconds."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_BUILDER = re.compile(r"^@register_model\(.*\)\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)


@cache
def torchvision_names() -> tuple[str, ...]:
    """By the alphabet; none where its files cannot be read."""
    package = find_spec("torchvision")
    if package is None or package.origin is None:
        return ()
    try:
        texts = [
            path.read_text(encoding="utf-8") for path in (Path(package.origin).parent / "models").glob("*.py")
        ]
    except OSError:
        return ()
    return tuple(sorted(name for text in texts for name in _BUILDER.findall(text)))
