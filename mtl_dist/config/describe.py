"""Settings in words: what a node accepts, and what a value looks like."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from mtl_dist.config.schema import SchemaNode, is_list, is_mapping

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "null",
    Any: "a value",
}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}
_MAX_NAMES = 15
_MAX_TEXT = 60


def listed(names: Sequence[str]) -> str:
    """The names with commas, cut where there are too many to read."""
    if not names:
        return "none"
    if len(names) <= _MAX_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[:_MAX_NAMES])}, ... ({len(names)} in all)"


def show(value: Any) -> str:
    """A value as it stands in YAML, or what it is where it is large.

    >>> show("3"), show(3), show(None), show([1, 2])
    ('"3"', '3', 'null', 'a list of 2')
    """
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, str) and len(value) > _MAX_TEXT:
        value = f"{value[:_MAX_TEXT]}..."
    return json.dumps(value, ensure_ascii=False)


def describe(node: SchemaNode) -> str:
    """What a node accepts, in words: `an integer >= 1`, `one of off, stage, block`."""
    null = " or null" if node.takes_null and node.type not in (None, NoneType, Any) else ""
    node = node.without_null()
    if node.user_defined is not None:
        if node.user_defined.only:
            return f"a mapping with {node.user_defined.key} an import path{null}"
        null = f" or an import path{null}"
        if node.choices and node.user_defined.names:
            return f"{listed(node.choices)}{null}"
    if node.discriminator is not None:
        return f"a mapping with {node.discriminator} one of {listed(list(node.variants()))}{null}"
    if len(node.members) > 1:
        words = ["a mapping" if member.model is not None else describe(member) for member in node.members]
        return " or ".join(dict.fromkeys(words)) + null
    constraints = "" if is_list(node.type) else _describe_constraints(node)
    return _describe_type(node) + constraints + null


def _describe_type(node: SchemaNode) -> str:
    if get_origin(node.type) is Literal:
        choices = [value if isinstance(value, str) else show(value) for value in node.choices]
        return choices[0] if len(choices) == 1 else f"one of {listed(choices)}"
    if node.model is not None:
        return f"a mapping with keys among {listed(list(node.model.model_fields))}"
    if is_mapping(node.type):
        return "a mapping"
    if is_list(node.type):
        arguments = get_args(node.type)
        if get_origin(node.type) is tuple and Ellipsis not in arguments:
            items = [node.child(index) for index in range(len(arguments))]
            words = [describe(item) for item in items if item is not None]
            if len(set(words)) == 1:
                return f"a list of {len(items)}, each {words[0]}"
            return f"a list of {len(items)}: {', '.join(words)}"
        item, length = node.child(0), _describe_constraints(node).replace(" with", " of", 1)
        if item is None:
            return f"a list{length}"
        return f"a list{length}, {'each' if length else 'each item'} {describe(item)}"
    return _WORDS.get(node.type, getattr(node.type, "__name__", str(node.type)))


def _describe_constraints(node: SchemaNode) -> str:
    unit = "item" if is_list(node.type) or is_mapping(node.type) else "character"
    parts = []
    for constraint in node.constraints:
        for name, sign in _BOUNDS.items():
            if (bound := getattr(constraint, name, None)) is not None:
                parts.append(f"{sign} {bound}")
        for name, bound in (("min_length", "at least"), ("max_length", "at most")):
            if length := getattr(constraint, name, None):
                parts.append(f"with {bound} {length} {unit if length == 1 else f'{unit}s'}")
        if getattr(constraint, "pattern", None) is not None:
            parts.append(f"like {constraint.pattern}")
    return f" {' and '.join(parts)}" if parts else ""
