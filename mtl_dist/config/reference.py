"""Every setting with what it accepts, its default and what it means, read from the typed settings themselves.

The words are those of the classes: a docstring's table of fields (`name   text`), or the string below a
field.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from pydantic import BaseModel

from mtl_dist.config.describe import describe
from mtl_dist.config.nearest import nearest
from mtl_dist.config.schema import SchemaNode, is_list, is_mapping, node_of_field
from mtl_dist.config.settings import Settings
from mtl_dist.errors import UserError

PAGE = """# Every setting of a recipe

Written by `mtl settings --markdown`; `mtl settings train` prints a part of it. A setting without a default
has to be stated. NAME is a name of yours, such as a task's; [0] is each item of a list; any value can be
overridden on the command line: `mtl train RECIPE optim.lr=1e-4`.

"""
_ROW = re.compile(r"(\w+(?:, \w+)*)\s{2,}(\S.*)")


@dataclass(frozen=True)
class Setting:
    """One place for a value: what it accepts, its default as YAML has it (empty where it must be stated)."""

    name: str
    accepts: str
    default: str
    text: str


@dataclass(frozen=True)
class Section:
    """The settings of one place, such as `train`, or `optim.schedule` of one `kind`."""

    path: str
    variant: str
    text: str
    settings: tuple[Setting, ...]

    @property
    def title(self) -> str:
        return f"{self.path}: {{{self.variant}}}" if self.variant else self.path


def reference(settings: type[Settings]) -> list[Section]:
    """Every section of `settings`, in its own order, each before what is within it."""
    return list(_sections(SchemaNode(settings), "", "", {}))


def part_of(sections: list[Section], key: str) -> list[Section]:
    """The sections at and below a place such as `train` or `data.cache`, or one setting of a section alone.

    Raises:
        UserError: there is no such place.
    """
    wanted = _steps(key)
    found = [each for each in sections if _fits(_steps(each.path)[: len(wanted)], wanted)]
    if found:
        return found
    *within, name = wanted
    for each in sections:
        own = tuple(setting for setting in each.settings if setting.name == name)
        if _fits(_steps(each.path), within) and own:
            found.append(Section(each.path, each.variant, "" if own[0].text else each.text, own))
        elif _fits(_steps(each.path), within) and each.variant.startswith(f"{name}:"):
            found.append(each)
    if found:
        return found
    known = [f"{each.path}.{s.name}".lstrip(".") for each in sections for s in each.settings]
    known += [each.path for each in sections if each.path]
    near = nearest(key, known) or nearest(name, [place.rpartition(".")[2] for place in known])
    hint = next((place for place in known if near and (place == near or place.endswith(f".{near}"))), "")
    raise UserError(
        f"settings: expected a setting of a recipe, such as train.precision, found {key!r}."
        + (f" Did you mean {hint}?" if hint else " `mtl settings` lists them.")
    )


def _steps(path: str) -> list[str]:
    """The keys on the way to a place, those of list items left out: what a user types of it."""
    return re.sub(r"\[\d+\]", "", path).split(".") if path else []


def _fits(steps: list[str], wanted: list[str]) -> bool:
    """Whether these are the keys that are wanted; any is a NAME."""
    return len(steps) == len(wanted) and all(
        step in (asked, "NAME") for step, asked in zip(steps, wanted, strict=True)
    )


def as_text(sections: list[Section]) -> str:
    """For a terminal."""
    blocks = []
    for section in sections:
        lines = [section.title or "a recipe"]
        lines += [f"  {line}".rstrip() for line in section.text.splitlines()]
        for setting in section.settings:
            default = f" (default {setting.default})" if setting.default else " (has to be stated)"
            lines += textwrap.wrap(
                f"{setting.name}: {setting.accepts}{default}",
                100,
                initial_indent="  ",
                subsequent_indent="      ",
            )
            lines += textwrap.wrap(setting.text, 96, initial_indent="      ", subsequent_indent="      ")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def as_markdown(sections: list[Section]) -> str:
    """A page of sections, with the depth of their places."""
    blocks = []
    for section in sections:
        if section.title:
            blocks.append(f"{'#' * min(2 + section.path.count('.'), 4)} `{section.title}`")
        blocks += [section.text] if section.text else []
        if section.settings:
            rows = ["| setting | accepts | default | |", "| --- | --- | --- | --- |"]
            for setting in section.settings:
                default = f"`{setting.default}`" if setting.default else ""
                cells = (f"`{setting.name}`", setting.accepts, default, setting.text)
                rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
            blocks.append("\n".join(rows))
    return "\n\n".join(blocks) + "\n"


def _sections(
    node: SchemaNode, path: str, variant: str, places: dict[type, str], seen: tuple[type, ...] = ()
) -> Iterator[Section]:
    model = node.model
    if model is None or model in seen:
        return
    if model in places and places[model] != path:
        yield Section(path, variant, f"The settings of `{places[model]}`.", ())
        return
    places[model] = path
    meaning, texts = _words(model)
    chooses = variant.partition(":")[0]
    fields = {name: node_of_field(field) for name, field in model.model_fields.items() if name != chooses}
    yield Section(
        path,
        variant,
        meaning,
        tuple(
            Setting(name, _accepted(field), _default(field), texts.get(name, ""))
            for name, field in fields.items()
        ),
    )
    for name, field in fields.items():
        yield from _within(field, f"{path}.{name}".lstrip("."), places, (*seen, model))


def _within(
    node: SchemaNode, path: str, places: dict[type, str], seen: tuple[type, ...]
) -> Iterator[Section]:
    """What can be stated within a place: in a mapping, in each entry or item, in each variant of a union."""
    node = node.without_null()
    if variants := node.variants():
        for kind, member in variants.items():
            yield from _sections(member, path, f"{node.discriminator}: {kind}", places, seen)
    elif is_mapping(node.type) or is_list(node.type):
        child = node.child("NAME" if is_mapping(node.type) else 0)
        if child is not None:
            within = f"{path}.NAME" if is_mapping(node.type) else f"{path}[0]"
            yield from _within(child, within, places, seen)
    else:
        for member in node.members:
            if member.model is not None and member.model.model_fields:
                yield from _sections(member, path, "", places, seen)


def _accepted(node: SchemaNode) -> str:
    """What a place accepts; what is stated within it has a section of its own."""
    chosen = node.without_null()
    if is_list(chosen.type) and (item := chosen.child(0)) is not None and item.variants():
        return f"a list, each {_accepted(item)}"
    if variants := chosen.variants():
        words = f"{chosen.discriminator}: {', '.join(variants)}"
        words += " or an import path" if chosen.user_defined is not None else ""
        return words + (" or null" if node.takes_null else "")
    keys = r"a mapping with keys among [^()]*?(\(\d+ in all\)|\w)(?= or |$)"
    words = re.sub(keys, "a mapping", describe(node))
    return words.replace(", each item a mapping", ", each a mapping")


def _default(node: SchemaNode) -> str:
    if node.field is None or node.field.is_required():
        return ""
    return _yaml(node.default)


def _yaml(value: object) -> str:
    """A default on one line; of settings what tells their variant."""
    if isinstance(value, BaseModel):
        named = [value.model_dump(mode="json").get(key) for key in ("kind", "method")]
        return f"{{kind: {named[0]}}}" if named[0] else f"{{method: {named[1]}}}" if named[1] else "as below"
    if isinstance(value, tuple | list) and any(isinstance(item, BaseModel) for item in value):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return json.dumps(value) if value else "{}"
    return json.dumps(value, default=str)


def _words(model: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """What a class says of itself, and of each of its fields."""
    texts: dict[str, str] = {}
    meaning = ""
    for cls in reversed([each for each in model.__mro__ if issubclass(each, BaseModel)]):
        if cls in (BaseModel, Settings):
            continue
        meaning, of_table = _of_docstring(cls)
        texts |= of_table | _below_fields(cls)
    texts |= {name: field.description for name, field in model.model_fields.items() if field.description}
    return meaning, texts


def _of_docstring(cls: type[BaseModel]) -> tuple[str, dict[str, str]]:
    rest: list[str] = []
    texts: dict[str, str] = {}
    names: tuple[str, ...] = ()
    for line in inspect.cleandoc(cls.__dict__.get("__doc__") or "").splitlines():
        row = _ROW.fullmatch(line)
        if row and all(name in cls.model_fields for name in row[1].split(", ")):
            names = tuple(row[1].split(", "))
            texts |= dict.fromkeys(names, row[2])
        elif names and line.startswith("  "):
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
        else:
            names = ()
            rest.append(line)
    return "\n".join(rest).strip(), texts


def _below_fields(cls: type[BaseModel]) -> dict[str, str]:
    """The strings that stand below the fields of a class."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError, SyntaxError):  # made at run time
        return {}
    texts = {}
    statements = body.body if isinstance(body, ast.ClassDef) else []
    for field, below in pairwise(statements):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            texts[field.target.id] = " ".join(below.value.value.split())
    return texts
