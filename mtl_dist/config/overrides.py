"""Overrides: `a.b=VALUE`, as on the command line; in Python also `{"a.b": value}`.

VALUE is read as YAML and takes the place of whatever stood at `a.b`, so `tasks.age.loss={kind: l1}` leaves
nothing of the former loss. Sections on the way are made. A number in the path is an index of a list that is
there: `data.train.0.path=data/cats`. The last of several overrides of one place holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtl_dist.config.describe import show
from mtl_dist.config.errors import Location, Mistake, dotted
from mtl_dist.config.plain import plain
from mtl_dist.config.yaml_text import YamlError, parse


def apply_overrides(
    data: dict[str, Any], overrides: Sequence[str | Mapping[str, Any]]
) -> tuple[set[Location], list[Mistake]]:
    """Apply `overrides` to `data` in place; returns the entries that they added, and their mistakes."""
    added: set[Location] = set()
    mistakes: list[Mistake] = []
    for text in _texts(overrides):
        key, equals, value_text = text.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            mistakes.append(((), f"{text}: expected an override a.b=value. Write for example optim.lr=1e-3."))
            continue
        try:
            value, duplicates = parse(value_text)
        except YamlError as error:
            found = f"found {show(value_text)} ({error}). Put text with signs in quotes."
            mistakes.append(((), f"{key}: expected a value in YAML, {found}"))
            continue
        mistakes += [
            ((), f"{key}: key {name} appears twice in the value. Keep one.") for name, _, _ in duplicates
        ]
        try:
            _put(data, (), names, value, added)
        except LookupError as error:
            mistakes.append(((), f"{key}: {error.args[0]}"))
    return added, mistakes


def _texts(overrides: Sequence[str | Mapping[str, Any]]) -> Iterator[str]:
    for override in overrides:
        if isinstance(override, str):
            yield override
        else:
            # What is JSON is YAML.
            yield from (f"{key}={json.dumps(plain(value, (key,)))}" for key, value in override.items())


def _put(section: Any, location: Location, names: list[str], value: Any, added: set[Location]) -> None:
    """Put `value` at the path `names` below `section`, which stands at `location`."""
    name, *rest = names
    here: str | int = name
    if isinstance(section, list):
        if not name.isdecimal() or int(name) >= len(section):
            last = len(section) - 1
            numbers = "which is empty" if last < 0 else "0" if last == 0 else f"0 to {last}"
            raise LookupError(
                f"expected the number of an item of {dotted(location)}, {numbers}, found {name}."
            )
        here = int(name)
    elif not isinstance(section, dict):
        raise LookupError(f"expected a section at {dotted(location)}, found {show(section)}.")
    elif name not in section:
        added.add((*location, name))
    if not rest:
        section[here] = value
        return
    if isinstance(section, dict) and section.get(name) is None:
        section[name] = {}
    _put(section[here], (*location, here), rest, value, added)
