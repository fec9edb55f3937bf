"""Groups: samples that belong together (a patient, a slide, a recording) never divided between splits.

--group slide           the column `slide`
--group '{group}_*'     a part of the name: `s3` of s3_07.png
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterator, Sequence
from itertools import takewhile
from pathlib import PurePosixPath

from mtl_dist.config.nearest import nearest
from mtl_dist.errors import UserError
from mtl_dist.importers.jobs import Record
from mtl_dist.importers.splitting import SPLIT_NAMES, key_hash

_PLACE = "{group}"
_FEWEST = 5
_TELLING = re.compile(
    r"patient|subject|slide|case|donor|person|animal|group|session|scene|video|visit|plate|well|lesion|site"
    r"|(^|_)id$|_id(_|$)",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"(.*?[A-Za-z0-9])([_-])\d+")
_VERSION = re.compile(r"(.+)(\.rf\.)\w+")
"""As Roboflow names the versions of an image."""


def groups_of(records: Sequence[Record], by: str) -> list[str]:
    """The group of each record: its importer's, joined with those that `by` names; "" where it has none.

    Raises:
        UserError: no such column, a record without a value there, or a name that the pattern does not fit.
    """
    if not by:
        return [record.group for record in records]
    named = _by_pattern(records, by) if _PLACE in by else _by_column(records, by)
    if not any(record.group for record in records):
        return named
    return _joined([record.group for record in records], named)


def _by_pattern(records: Sequence[Record], pattern: str) -> list[str]:
    if pattern.count(_PLACE) != 1:
        raise UserError(f"--group: expected one {_PLACE} in the pattern, found {pattern!r}.")
    regular = re.escape(pattern).replace(re.escape(_PLACE), "(?P<group>[^/]+?)").replace(r"\*", "[^/]*")
    compiled = re.compile(rf"(?:.*/)?{regular}")
    groups = []
    for record in records:
        path = PurePosixPath(record.place)
        match = compiled.fullmatch(str(path.with_suffix(""))) or compiled.fullmatch(str(path))
        if match is None:
            raise UserError(
                f"--group: expected names like {pattern!r}, found {record.place}. Give one that fits all."
            )
        groups.append(match["group"])
    return groups


def _by_column(records: Sequence[Record], column: str) -> list[str]:
    groups = []
    for record in records:
        if column not in record.columns:
            known = list(record.columns)
            near = nearest(column, known)
            raise UserError(
                f"--group: expected a column ({', '.join(known) or 'there is none'}) or a pattern with "
                f"{_PLACE}, found {column!r}.{f' Did you mean {near}?' if near else ''}"
            )
        value = str(record.columns[column])
        if not value:
            raise UserError(
                f"{record.place}: expected a group in column {column!r}, found nothing. Fill it, or leave "
                "the row out."
            )
        groups.append(value)
    return groups


def _joined(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Groups that are whole in both: samples that one of the two puts together stay together."""
    parent: dict[tuple[int, str], tuple[int, str]] = {}

    def root(node: tuple[int, str]) -> tuple[int, str]:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in zip(first, second, strict=True):
        parent[root((0, a))] = root((1, b))
    return [root((1, b))[1] for b in second]


def split_groups(
    groups: Sequence[str], strata: Sequence[Hashable], fractions: Sequence[float], seed: int
) -> list[str]:
    """The split of each sample: groups stay whole, and each stratum is divided as nearly as that allows.

    The largest group comes first, and goes where the classes are then nearest to their shares: to the split
    for which the sum of squared distances, over all strata and splits, is the least.
    """
    contents: dict[str, Counter[Hashable]] = defaultdict(Counter)
    for group, stratum in zip(groups, strata, strict=True):
        contents[group][stratum] += 1
    names = SPLIT_NAMES[: len(fractions)]
    totals = Counter(strata)
    target = {
        (name, stratum): fraction * number
        for name, fraction in zip(names, fractions, strict=True)
        for stratum, number in totals.items()
    }
    held: Counter[tuple[str, Hashable]] = Counter()
    filled: Counter[str] = Counter()
    chosen: dict[str, str] = {}
    order = sorted(contents, key=lambda g: (-contents[g].total(), key_hash(f"{seed}/group/{g}"), g))
    for number, group in enumerate(order):
        empty = [name for name in names if not filled[name]]
        waiting = len(order) - number
        candidates = empty if waiting <= len(empty) else names

        def cost(name: str, content: Counter[Hashable] = contents[group]) -> tuple[float, float]:
            change = sum(
                count * (2 * (held[name, stratum] - target[name, stratum]) + count)
                for stratum, count in content.items()
            )
            share = fractions[names.index(name)] * len(groups)
            return change, filled[name] / share

        chosen[group] = min(candidates, key=cost)
        filled[chosen[group]] += contents[group].total()
        for stratum, count in contents[group].items():
            held[chosen[group], stratum] += count
    splits = [chosen[group] for group in groups]
    return splits if "val" in splits else ["val" if split == "test" else split for split in splits]


def check_whole(groups: Sequence[str], splits: Sequence[str], records: Sequence[Record]) -> None:
    """Refuse splits of the data that divide a group.

    Raises:
        UserError: with an example of each side.
    """
    first: dict[str, tuple[str, Record]] = {}
    for group, split, record in zip(groups, splits, records, strict=True):
        before, example = first.setdefault(group, (split, record))
        if group and before != split:
            raise UserError(
                f"group {group}: expected all of it in one split, found {before} for {example.place} and "
                f"{split} for {record.place}. Put the whole group into one."
            )


def unnoticed_groups(
    records: Sequence[Record], strata: Sequence[Hashable], used: frozenset[str]
) -> Iterator[str]:
    """Notes on columns and names that look like groups: few values, each on several images."""
    num_classes = len(set(strata))
    columns = [name for name in records[0].columns if name not in used]
    for column in columns:
        values = [str(record.columns.get(column, "")) for record in records]
        if all(values) and _looks_grouped(values, strata, num_classes, bool(_TELLING.search(column))):
            yield (
                f"column {column} looks like a group: {len(set(values))} values, each on several images. "
                f"--group {column} keeps them together"
            )
    stems = [PurePosixPath(record.place).stem for record in records]
    for form in (_NUMBERED, _VERSION):
        names = [match for stem in stems if (match := form.fullmatch(stem))]
        beginnings = [match[1] for match in names]
        if len(names) < len(records):
            continue
        if form is _VERSION:
            looks, some = len(set(beginnings)) < len(names), "some"
        else:
            looks, some = _looks_grouped(beginnings, strata, num_classes, True), "each"
        if looks:
            pattern = _pattern_of(records, beginnings, {match[2] for match in names})
            yield (
                f"names look like groups: {len(set(beginnings))} beginnings such as {beginnings[0]!r}, "
                f"{some} on several images. {pattern} keeps them together"
            )


def _pattern_of(records: Sequence[Record], beginnings: Sequence[str], separators: Collection[str]) -> str:
    """The option that makes groups of these beginnings of the names."""
    first, last = min(beginnings), max(beginnings)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    common = "".join(letter for letter, _ in same)
    common = common[: 1 + max(common.rfind("_"), common.rfind("-"))]
    for separator in separators if len(separators) == 1 else ():
        for pattern in (f"{_PLACE}{separator}*", f"{common}{_PLACE}{separator}*"):
            try:
                groups = _by_pattern(records, pattern)
            except UserError:
                continue
            if len(set(groups)) == len(set(zip(groups, beginnings, strict=True))) == len(set(beginnings)):
                return f"--group '{pattern}'"
    return "A column of them in a table, for --group COLUMN,"


def _looks_grouped(
    values: Sequence[str], strata: Sequence[Hashable], num_classes: int, named_so: bool
) -> bool:
    counts = Counter(values)
    if len(counts) <= max(num_classes, _FEWEST - 1) or min(counts.values()) < 2:
        return False
    pure = len(set(zip(values, strata, strict=True))) == len(counts)
    return named_so or (num_classes > 1 and pure)
