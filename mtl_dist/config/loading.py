"""From a YAML file and `a.b=c` overrides to one typed, frozen settings object, and back.

    recipe = load_settings(Recipe, Path("configs/skin.yaml"), ["optim.lr=3e-4", "tasks.age=null"])

The file states departures from the defaults. `overrides.py` says how overrides are read, `yaml_text.py` which
YAML it is. Besides:

- `null` takes an entry out of a mapping whose keys the recipe chooses: `tasks.age=null` is a recipe without
  that task. Elsewhere it is an ordinary value, right where the settings allow it.
- A section with variants that does not say its `kind` is of the kind that it has by default, so
  `optim.lr=1e-3` speaks of the default optimizer. Whatever else it does not say is that kind's default.
- `${a.b}` refers to another value of the recipe, `${oc.env:NAME}` to the environment (OmegaConf).

All mistakes are reported at once, one line each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from mtl_dist.config.describe import listed, show
from mtl_dist.config.errors import Location, Mistake, dotted, explain, suggest
from mtl_dist.config.nearest import nearest
from mtl_dist.config.overrides import apply_overrides
from mtl_dist.config.plain import plain
from mtl_dist.config.schema import SchemaNode, is_list, is_mapping
from mtl_dist.config.settings import Settings
from mtl_dist.config.yaml_text import YamlError, dump, parse
from mtl_dist.errors import UserError

S = TypeVar("S", bound=Settings)

Fill = Callable[[dict[str, Any], set[Location]], tuple[dict[str, Any], list[Mistake]]]
"""What a recipe leaves to something else, filled in: its data and the entries that only overrides made, to
complete data and the mistakes that this found."""

_RESOLVER_PREFIX = "KeyError raised while resolving interpolation: "


def load_settings(
    cls: type[S],
    source: Path | Mapping[str, Any],
    overrides: Sequence[str | Mapping[str, Any]] = (),
    fill: Fill | None = None,
) -> S:
    """The settings that a file, or a mapping in its place, and then the overrides state.

    `fill` completes the data once all of them have spoken.

    Raises:
        UserError: one line per mistake, all of them: in the file's syntax, in an override, an unknown key or
            value, a wrong type, a broken rule.
    """
    data, mistakes = _read(source) if isinstance(source, Path) else (plain(source), [])
    added, misread = apply_overrides(data, overrides)
    unresolved: list[Mistake] = []
    data = _without_bad_references(data, (), unresolved)
    resolved = _resolve(OmegaConf.create(data), data, (), unresolved)
    mistakes += [*misread, *unresolved]
    if fill is not None and isinstance(resolved, dict):
        resolved, unfilled = fill(resolved, added)
        mistakes += unfilled
    complete = _complete(resolved, SchemaNode(cls), (), added, mistakes)
    try:
        # JSON mode, because there strict means: no "3" for 3, but a list fills a tuple and text is a path.
        settings = cls.model_validate_json(json.dumps(complete))
    except ValidationError as error:
        mistakes += [
            (location, line + _misspelt_entry(location, line, added, data, cls))
            for location, line in explain(error, cls)
            if not any(_touches(location, other) for other, _ in unresolved)
        ]
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(line for _, line in mistakes)))
    return settings


def to_yaml(settings: Settings) -> str:
    """The settings as YAML, defaults included, that loads into an equal object."""
    return dump(_escaped(settings.model_dump(mode="json")))


def resolved_settings(cls: type[S], data: Mapping[str, Any]) -> S:
    """The settings that data without references states.

    Raises:
        UserError: one line per mistake.
    """
    return load_settings(cls, _escaped(dict(data)))


def _read(path: Path) -> tuple[dict[str, Any], list[Mistake]]:
    """The file's mapping, and the keys that appear twice in it."""
    if not path.is_file():
        raise UserError(f"{path}: expected a YAML file, found {_instead_of(path)}")
    try:
        data, duplicates = parse(path.read_text(encoding="utf-8"))
    except YamlError as error:
        where = f"{path}:{error.line}:{error.column}"
        tab = " Indent with spaces." if "'\\t'" in error.problem else ""
        raise UserError(f"{where}: this is not YAML: {error.problem}.{tab}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: expected UTF-8 text, found the byte {error.object[error.start]:#04x}."
        ) from None
    except OSError as error:
        raise UserError(f"{path}: expected a readable file, found: {error.strerror}.") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping (key: value), found {show(data)}.")
    return data, [
        ((), f"{path}:{line}: key {key} appears twice, first in line {first}. Keep one of them.")
        for key, line, first in duplicates
    ]


def _instead_of(path: Path) -> str:
    if (path / "dataset.json").is_file():
        return f"a prepared dataset. Write a recipe for it: mtl init {path} > mine.yaml"
    if path.is_dir():
        return "a directory. Name a file in it."
    if not path.parent.is_dir():
        return f"no directory {path.parent}."
    there = {
        entry.stem: entry for entry in sorted(path.parent.iterdir()) if entry.suffix in (".yaml", ".yml")
    }
    near = nearest(path.stem, there)
    if near is not None:
        return f"none. Did you mean {there[near]}?"
    return f"none. YAML files in {path.parent}: {listed([entry.name for entry in there.values()])}."


def _without_bad_references(value: Any, location: Location, mistakes: list[Mistake]) -> Any:
    """The data with null for each text in which `${` opens something that OmegaConf cannot read."""
    if isinstance(value, dict):
        return {key: _without_bad_references(item, (*location, key), mistakes) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_bad_references(item, (*location, i), mistakes) for i, item in enumerate(value)]
    if isinstance(value, str) and "${" in value:
        try:
            OmegaConf.create([value])
        except OmegaConfBaseException:
            problem = f"expected ${{a.b}}, found {show(value)}. Write \\${{ for the text ${{ itself."
            mistakes.append((location, f"{dotted(location)}: {problem}"))
            return None
    return value


def _resolve(node: Any, stated: Any, location: Location, mistakes: list[Mistake]) -> Any:
    """OmegaConf's `node` as plain data, its references replaced by what they refer to.

    `stated` is the same as written, for the lines about references to nothing.
    """
    if isinstance(node, DictConfig):
        return {key: _resolve_entry(node, key, stated, location, mistakes) for key in map(str, node)}
    if isinstance(node, ListConfig):
        return [_resolve_entry(node, index, stated, location, mistakes) for index in range(len(node))]
    return node


def _resolve_entry(
    node: DictConfig | ListConfig, key: Any, stated: Any, location: Location, mistakes: list[Mistake]
) -> Any:
    here = (*location, key)
    written = stated[key] if isinstance(stated, dict | list) else stated
    try:
        return _resolve(node[key], written, here, mistakes)
    except MissingMandatoryValue:
        problem = f"expected a value, found ???. Give it: {dotted(here)}=VALUE."
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0].removeprefix(_RESOLVER_PREFIX).strip('"')
        problem = f"expected a reference to a value that is stated, found {written} ({reason})."
    mistakes.append((here, f"{dotted(here)}: {problem}"))
    return None


def _complete(
    value: Any, node: SchemaNode | None, location: Location, added: set[Location], mistakes: list[Mistake]
) -> Any:
    """The data without null entries, and with the default kind in sections that do not say theirs."""
    if node is None or not isinstance(value, dict | list):
        return value
    node, value = _section(node, value)
    if isinstance(value, list):
        return [
            _complete(item, node.child(index), (*location, index), added, mistakes)
            for index, item in enumerate(value)
        ]
    result = {}
    for key, item in value.items():
        child, here = node.child(key), (*location, key)
        if item is None and is_mapping(node.type) and child is not None and not child.takes_null:
            if here in added:
                advice = suggest(key, [name for name in value if (*location, name) not in added], "Entries")
                mistakes.append(
                    (here, f"{dotted(here)}: expected an entry to take out, found none. {advice}")
                )
        else:
            result[key] = _complete(item, child, here, added, mistakes)
    return result


def _section(node: SchemaNode, value: Any) -> tuple[SchemaNode, Any]:
    """The member of a union that `value` is meant for, and `value` with the kind that it has by default."""
    node = node.without_null()
    path = None if node.user_defined is None else node.user_defined.path_in(value)
    if path is not None:
        return node.user_variant(path) or node, value
    if node.discriminator is not None and isinstance(value, dict):
        default = getattr(node.default, node.discriminator, None)
        if default is not None:
            value = {node.discriminator: default, **value}
        return node.variants().get(str(value.get(node.discriminator)), node), value
    fitting = [
        member
        for member in node.members
        if (is_list(member.type) if isinstance(value, list) else is_mapping(member.type) or member.model)
    ]
    return (fitting[0] if len(fitting) == 1 else node), value


def _misspelt_entry(
    location: Location, line: str, added: set[Location], data: Any, cls: type[BaseModel]
) -> str:
    """What to add to a mistake inside an entry that only an override made: `tasks.bred.weight=2`.

    What is a setting of `cls` is no misspelt entry: `tracking` no `train`, `data.resize` no `image_size`.
    """
    for *way, name in added:
        if _is_setting(cls, way, name):
            continue
        if location[: len(way) + 1] == (*way, name) and "Did you mean" not in line:
            section = reduce(getitem, way, data)
            near = nearest(str(name), [key for key in section if (*way, key) not in added])
            return f" Did you mean {dotted((*way, near))}?" if near else ""
    return ""


def _is_setting(cls: type[BaseModel], way: Sequence[str | int], name: str | int) -> bool:
    node: SchemaNode | None = SchemaNode(cls)
    for part in way:
        node = None if node is None else node.without_null().child(part)
    model = None if node is None else node.without_null().model
    return model is not None and str(name) in model.model_fields


def _touches(one: Location, other: Location) -> bool:
    """Whether one location holds the other (the whole recipe holds none)."""
    shared = min(len(one), len(other))
    return shared > 0 and one[:shared] == other[:shared]


def _escaped(value: Any) -> Any:
    """The value with each `${` in a text marked as no interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
