"""Mistakes in settings as lines that help: where, what was expected, what was found, what to do.

    tasks.depth.weight: expected a number >= 0, found -1. Remove the task to switch it off.
    optim.weight_decy: unknown key. Did you mean weight_decay? Known keys: kind, lr, weight_decay.

A field's `description` is added to the lines about it, so that a settings class can say what to do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_core.core_schema import ErrorType

from mtl_dist.config.describe import describe, listed, show
from mtl_dist.config.nearest import nearest
from mtl_dist.config.schema import SchemaNode, is_list, is_mapping, node_of
from mtl_dist.config.user_defined import USER_DEFINED

Location = tuple[str | int, ...]
Mistake = tuple[Location, str]
"""Where a mistake stands (the empty location where it belongs to no place), and its line."""

_OWN_TEXT = ("value_error", "assertion_error")
_KNOWN_TYPES = frozenset(get_args(ErrorType))


def suggest(found: str, choices: Iterable[str], known: str = "Known") -> str:
    """What to say of a misspelt name: the nearest valid one, and the list.

    >>> suggest("focl", ["focal", "cross_entropy"], "Known losses")
    'Did you mean focal? Known losses: focal, cross_entropy.'
    """
    names = list(choices)
    near = nearest(found, names)
    return f"{f'Did you mean {near}? ' if near else ''}{known}: {listed(names)}."


def dotted(location: Location) -> str:
    """A location as one writes it on the command line: `data.train.0.path`."""
    return ".".join(map(str, location))


def explain(error: ValidationError, cls: type[BaseModel]) -> list[Mistake]:
    """Every mistake that validating `cls` found: its location, and one line that begins with it.

    Where several members of a union refuse a value, the one that came closest is spoken of, or all of them
    in one line.
    """
    details = [
        _of_whole_list(detail)
        for detail in error.errors(include_url=False)
        if not _follows_from_others(detail)
    ]
    found = [(detail, _place(cls, detail["loc"])) for detail in details]
    lines: dict[Mistake, None] = {}
    for detail, place in found:
        if place.union is not None:
            at, union = place.union
            reached = {
                other.branch
                for other_detail, other in found
                if other.union == place.union and (other.location != at or other_detail["type"] in _OWN_TEXT)
            }
            if reached and place.branch not in reached:
                continue
            if not reached:
                place = _Place(at, union, place.owner)
        for line in _lines(detail, place, cls):
            lines[place.location, line] = None
    return list(lines)


def _follows_from_others(detail: ErrorDetails) -> bool:
    """Whether a list is too short only because the items with mistakes do not count."""
    return detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]


def _of_whole_list(detail: ErrorDetails) -> ErrorDetails:
    """A list of a fixed length lacks items: what is said of each of them is said of the list."""
    if detail["type"] != "missing" or not isinstance(detail["loc"][-1], int):
        return detail
    return {**detail, "type": "too_short", "loc": detail["loc"][:-1]}


@dataclass(frozen=True)
class _Place:
    """Where one of pydantic's errors stands in the recipe.

    `location` is free of pydantic's own tags, and `owner` is the section that holds it; where that section
    has variants, `variant` is the node of all of them and the name of this one. `union` is the last union
    without a discriminator on the way, with its own location, and `branch` the member of it that the error
    is about.
    """

    location: Location
    node: SchemaNode | None
    owner: SchemaNode
    variant: tuple[SchemaNode, str] | None = None
    union: tuple[Location, SchemaNode] | None = None
    branch: str = ""


def _place(cls: type[BaseModel], loc: Location) -> _Place:
    node: SchemaNode | None = SchemaNode(cls)
    owner = SchemaNode(cls)
    location: Location = ()
    variant: tuple[SchemaNode, str] | None = None
    chosen: tuple[SchemaNode, str] | None = None
    union, branch = None, ""
    origin: str | None = None
    for item in loc:
        node = node.without_null() if node is not None else None
        if node is not None and node.user_defined is not None and origin is None:
            origin = str(item)
        elif node is not None and origin == USER_DEFINED and chosen is None:
            chosen, node = (node, str(item)), node.user_variant(str(item))
        elif node is not None and node.discriminator is not None:
            chosen, node = (node, str(item)), node.variants().get(str(item))
        elif node is not None and len(node.members) > 1:
            union, branch = (location, node), str(item)
            node = _member(node, branch)
        elif item == "[key]":
            node = node_of(get_args(owner.type)[0])
        else:
            owner, variant, chosen, origin = node or owner, chosen, None, None
            node = node.child(item) if node is not None else None
            location = (*location, item)
    return _Place(location, node, owner, variant, union, branch)


def _member(union: SchemaNode, branch: str) -> SchemaNode | None:
    """The member of a union that pydantic calls `branch`: `MySettings`, `int`, `list[str]`, ..."""
    words = re.findall(r"\w+", branch)
    for member in union.members:
        name = getattr(get_origin(member.type) or member.type, "__name__", "")
        # A class with validators of its own is called `function-after[check(), MySettings]`.
        if name == words[0] or (member.model is not None and name in words):
            return member
    return None


def _lines(detail: ErrorDetails, place: _Place, cls: type[BaseModel]) -> Iterator[str]:
    kind, value, node = detail["type"], detail["input"], place.node
    where = f"{dotted(place.location)}: " if place.location else ""
    if kind in _OWN_TEXT:
        for line in str(detail["ctx"]["error"]).splitlines():
            field = re.match(r"\w+(?=[.:])", line)
            inside = place.location and node and field and node.child(field[0]) is not None
            yield f"{dotted(place.location)}.{line}" if inside else where + line
    elif kind == "extra_forbidden":
        yield where + _unknown_key(place, cls)
    elif kind not in _KNOWN_TYPES or node is None:
        yield f"{where}{detail['msg']}, found {show(value)}."
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        node = node.without_null()
        key, variants = str(node.discriminator), list(node.variants())
        given = value.get(key) if isinstance(value, dict) else None
        what = "nothing" if given is None else show(given)
        near = nearest(given, variants) if isinstance(given, str) else None
        advice = f"Did you mean {near}?" if near else "Add it." if given is None else ""
        where = dotted((*place.location, key))
        own = " or an import path" if node.user_defined is not None else ""
        yield f"{where}: expected one of {listed(variants)}{own}, found {what}. {advice}".rstrip()
    else:
        found = "nothing" if kind == "missing" else show(value)
        key = "a key that is " if detail["loc"][-1:] == ("[key]",) else ""
        yield f"{where}expected {key}{describe(node)}, found {found}. {_advice(kind, node, value)}".rstrip()


def _unknown_key(place: _Place, cls: type[BaseModel]) -> str:
    name = str(place.location[-1])
    keys = list(place.owner.model.model_fields) if place.owner.model is not None else []
    advice = suggest(name, keys, "Known keys")
    elsewhere = [] if nearest(name, keys) else _elsewhere_in(cls, name, but=dotted(place.location))
    if place.variant is not None:
        union, kind = place.variant
        others = [other for other, node in union.variants().items() if node.child(name) is not None]
        if others:
            advice = f"It belongs to {' and '.join(others)}. {advice}"
        elif elsewhere:
            advice = f"Did you mean {' or '.join(elsewhere[:3])}? {advice}"
        key = union.discriminator or (union.user_defined.key if union.user_defined is not None else "kind")
        return f"unknown key for {key} {kind}. {advice}"
    if elsewhere:
        advice = f"Did you mean {' or '.join(elsewhere[:3])}? {advice}"
    return f"unknown key. {advice}"


def _elsewhere_in(cls: type[BaseModel], name: str, but: str) -> list[str]:
    return [place for place in dict.fromkeys(_elsewhere(SchemaNode(cls), name)) if place != but]


def _elsewhere(node: SchemaNode, name: str, path: str = "") -> Iterator[str]:
    """Where else in the settings a key of this name would be right: `train.epochs`, `tasks.*.weight`."""
    for member in node.without_null().members:
        if member.model is not None:
            for key in member.model.model_fields:
                if key == name and path:
                    yield f"{path}{key}"
                child = member.child(key)
                if child is not None:
                    yield from _elsewhere(child, name, f"{path}{key}.")
        elif (is_mapping(member.type) or is_list(member.type)) and (child := member.child(0)) is not None:
            yield from _elsewhere(child, name, f"{path}*.")


def _advice(kind: str, node: SchemaNode, value: Any) -> str:
    """What to do: the field's own description, the repair that is evident, or the default."""
    field, node = node.field, node.without_null()
    said = f"{field.description} " if field is not None and field.description else ""
    if kind == "missing":
        return f"{said}Add it."
    if isinstance(value, str):
        words = [str(choice) for member in node.members for choice in member.choices]
        words += map(str, (field.examples if field is not None else None) or [])
        if near := nearest(value, words):
            return f"{said}Did you mean {near}?"
        if near := nearest(value, node.variants()):
            return f"{said}Write {{{node.discriminator}: {near}}}."
        fields = {} if node.model is None else node.model.model_fields
        if "kind" in fields and (near := nearest(value, map(str, get_args(fields["kind"].annotation)))):
            return f"{said}Write {{kind: {near}}}."
    types = {member.type for member in node.members}
    if isinstance(value, str) and types & {int, float} and _is_number(value):
        return f"{said}Remove the quotes."
    if isinstance(value, float) and int in types and value.is_integer():
        return f"{said}Write {int(value)}."
    if isinstance(value, str | int | float) and is_list(node.type) and not _has_fixed_length(node.type):
        return f"{said}Write [{value}]."
    if said:
        return said
    default = SchemaNode(None, field=field).default
    if isinstance(default, str | int | float):
        word = default if isinstance(default, str) and default else show(default)
        return f"Leave it out for the default, {word}."
    return "Leave it out for the defaults." if isinstance(default, BaseModel) else ""


def _has_fixed_length(type: Any) -> bool:
    return get_origin(type) is tuple and Ellipsis not in get_args(type)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
