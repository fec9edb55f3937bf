"""The YAML of recipes and cluster profiles: YAML 1.2's scalars, and no key twice.

PyYAML alone speaks YAML 1.1, where `off` is false, `1e-3` is text, `010` is 8 and `12:30:45` is 45045. Here
`checkpointing: off` is the word and a number is what looks like one. `parse` and `dump` share the rules, so
what one writes the other reads back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode, SequenceNode

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"

_SCALARS: dict[str, tuple[str, str]] = {
    "null": (r"^(?:~|null|Null|NULL|)$", "~nN"),
    "bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "int": (r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$", "-+0123456789"),
    "float": (
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
    "merge": (r"^<<$", "<"),
}
"""How a plain scalar of each kind looks, and the characters that it may begin with."""


MAX_CHARACTERS, MAX_NODES = 1 << 18, 100_000
"""Far beyond any recipe: it takes seconds to read so many, and an alias of aliases stands for any number."""


class YamlError(ValueError):
    """A text that is not YAML, and where: `line` and `column` count from 1."""

    def __init__(self, problem: str, line: int, column: int) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line
        self.column = column


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own name and type; filled below)
    yaml_constructors = {  # noqa: RUF012
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (*(_TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map")), None)
    }

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[str, Any]:  # type: ignore[override]
        """A mapping whose keys are their own text: `0: 2` has the key "0"."""
        self.flatten_mapping(node)
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise ConstructorError(None, None, "a key that is not a word", key.start_mark)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


class _QuickLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same by libyaml, where PyYAML was built with it: ten times as fast; its errors say less."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    yaml_constructors = _Loader.yaml_constructors
    construct_mapping = _Loader.construct_mapping


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent(self, data: Any) -> None:
        root = self.represent_data(data)
        self._lay_out(root)
        if isinstance(root, CollectionNode):
            root.flow_style = False
        self.serialize(root)

    def _lay_out(self, node: Node) -> int:
        """Puts short mappings and lists of scalars in line; returns how long the node's line would be."""
        if not isinstance(node, CollectionNode):
            return len(node.value) + 2
        items = [item for pair in node.value for item in (pair if isinstance(pair, tuple) else (pair,))]
        length = sum([self._lay_out(item) for item in items])
        scalars = all(isinstance(item, ScalarNode) for item in items)
        flat = all(
            isinstance(item, ScalarNode) or (item.flow_style and isinstance(item, SequenceNode))
            for item in items
        )
        node.flow_style = scalars if isinstance(node, SequenceNode) else flat and length <= 76
        return length


for _kind, (_pattern, _first) in _SCALARS.items():
    for _speaker in (_Loader, _QuickLoader, _Dumper):
        _speaker.add_implicit_resolver(
            _TAG + _kind, re.compile(_pattern), [*_first, *([""] * (_kind == "null"))]
        )


def parse(text: str) -> tuple[Any, list[tuple[str, int, int]]]:
    """The value that `text` states, and the keys that appear twice in one mapping.

    A duplicate is (key, line, line of the first); the value holds the last one.

    Raises:
        YamlError: the text is not YAML.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlError(f"{len(text):,} characters, where at most {MAX_CHARACTERS:,} are read", 1, 1)
    try:
        return _parsed(_QuickLoader(text))
    except (yaml.YAMLError, RecursionError, ValueError):
        pass  # Once more, for the error's words.
    try:
        return _parsed(_Loader(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(
            str(error.problem), mark.line + 1 if mark else 1, mark.column + 1 if mark else 1
        ) from None
    except RecursionError:
        raise YamlError("too many levels, or one that holds itself", 1, 1) from None
    except (ValueError, OverflowError) as error:
        if isinstance(error, YamlError):
            raise
        raise YamlError(f"a number that cannot be read: {error}", 1, 1) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise YamlError(f"the character {text[error.position]!r}", line, column) from None


def _parsed(loader: Any) -> tuple[Any, list[tuple[str, int, int]]]:
    node = loader.get_single_node()
    if node is None:
        return None, []
    if _expanded(node, {}) > MAX_NODES:
        raise YamlError(f"more than {MAX_NODES:,} values, once its aliases are followed", 1, 1)
    duplicates = list(_duplicates(node, set()))
    return loader.construct_document(node), duplicates


def _expanded(node: Node, known: dict[int, int]) -> int:
    """The values below a node, each alias counted as what it stands for."""
    if id(node) not in known:
        below = node.value if isinstance(node, CollectionNode) else []
        nodes = [one for item in below for one in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_expanded(one, known) for one in nodes)
    return known[id(node)]


def _text(dumper: yaml.SafeDumper, text: str) -> ScalarNode:
    # Only in double quotes are these line breaks escaped; plain or single-quoted they are folded to a space.
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def dump(value: Any) -> str:
    """`value` as YAML that `parse` reads back: blocks, with short innermost mappings on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _duplicates(node: Node, seen: set[int]) -> Iterator[tuple[str, int, int]]:
    if id(node) in seen:  # An alias leads back to a node that is already checked.
        return
    seen.add(id(node))
    if isinstance(node, SequenceNode):
        for item in node.value:
            yield from _duplicates(item, seen)
    if isinstance(node, MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, ScalarNode) and key.tag != _MERGE:
                if key.value in first:
                    yield key.value, line, first[key.value]
                first.setdefault(key.value, line)
            yield from _duplicates(value, seen)
