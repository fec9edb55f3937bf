"""A kind of task is known by two rooms: `kinds` (what a label is) and `tasks` (what is learnt)."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import mtl_dist
from mtl_dist.errors import UserError
from mtl_dist.kinds.registry import KINDS, kind_of
from mtl_dist.specs import HeadSpec

PACKAGE = Path(mtl_dist.__file__).parent
ROOMS = ("kinds", "tasks")
LAYOUTS = get_args(get_type_hints(HeadSpec)["layout"])
"""Of outputs: `vector` is one of these as well."""


def test_no_kind_is_spelt_out_outside_its_two_rooms() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.value!r}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] not in ROOMS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in KINDS and node.value not in LAYOUTS
    ]
    assert found == []


def test_kinds_are_used_without_torch() -> None:
    for path in (PACKAGE / "kinds").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.partition(".")[0] == "torch"], path


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "clasification": "Did you mean classification?",
        "mtl_dist.kinds.nothing.Kind": "expected a module mtl_dist.kinds.nothing",
        "mtl_dist.kinds.registry.KINDS": "expected a subclass of mtl_dist.kinds.kind.Kind, found",
        "mtl_dist.kinds.kind.MapKind": "expected paint, store, tally defined in mtl_dist.kinds.kind.MapKind",
    }.items(),
)
def test_what_is_no_kind_is_refused_with_what_to_do(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        kind_of(name)
