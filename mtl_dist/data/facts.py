"""What a run knows of its data: the facts that its model was built with, and the identity of every source.

The facts are in each checkpoint (data.json), hashed like its weights, and a trained run answers with them
alone, whatever the dataset says today. The identity of a source is its samples, not its place: a dataset that
has moved is the same one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import ConfigDict

from mtl_dist.data.consistency import check_tables
from mtl_dist.data.manifest import ImageDtype, PixelScale
from mtl_dist.data.table_hashes import table_hash
from mtl_dist.json_files import parsed
from mtl_dist.plural import first_few
from mtl_dist.specs import TaskInfo

if TYPE_CHECKING:
    from mtl_dist.data.loader import Data, Source


@dataclass(frozen=True)
class SourceIdentity:
    """By what one split of one dataset is known again, wherever it lies.

    name        the dataset's
    split       which of its splits
    shards      SHA-256 over the samples, size and SHA-256 of every shard, as the manifest has them
    index       SHA-256 of the offset index
    labels      SHA-256 of the label columns; "" where labels are in the shards alone
    images      SHA-256 of the images' content hashes, in the stored order; "" where none are kept
    images_sum  their sum, which is the same in any order
    derived     SHA-256 of the classes that a function of the user's made of the images; "" where none did
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    split: str
    num_samples: int
    shards: str
    index: str
    labels: str = ""
    images: str = ""
    images_sum: int = 0
    derived: str = ""

    def differences(self, now: SourceIdentity) -> str:
        """What of it is another in `now`, in words; "" where nothing is."""
        if now.num_samples != self.num_samples:
            return f"expected {self.num_samples:,} samples, found {now.num_samples:,}"
        if self.images and now.images and self.images != now.images:
            if self.images_sum == now.images_sum:
                return "expected the images in the order in which they were stored, found another order"
            return "expected the same images, found others of the same number"
        if self.labels and now.labels and self.labels != now.labels:
            return "expected the same labels, found others"
        if self.derived and now.derived and self.derived != now.derived:
            return "expected the same classes derived from the images, found others"
        if self.shards != now.shards or self.index != now.index:
            same = (
                "the same images in other shards" if self.images and self.images == now.images else "others"
            )
            return f"expected the same shards, found {same}"
        return ""


Identities = Mapping[str, Sequence[SourceIdentity]]
"""By split: one for each source, in the recipe's order."""


@dataclass(frozen=True)
class DataFacts:
    """What a trained model must know of its data: the tasks, and the images' channels, dtype and (H, W).

    `pixels` is what its training images were like, where that was measured. `sources` is by what the data is
    known again; empty where nobody asks.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    task_infos: dict[str, TaskInfo]
    channels: int
    image_dtype: ImageDtype
    image_size: tuple[int, int]
    pixels: PixelScale | None = None
    sources: dict[str, tuple[SourceIdentity, ...]] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def parse(text: str | bytes) -> DataFacts:
        """From what `to_json` made.

        Raises:
            DamagedFile: it is something else.
        """
        return parsed(DataFacts, text)


def identities(data: Data) -> dict[str, tuple[SourceIdentity, ...]]:
    """The identity of every source of `data`.

    It reads no shard: index, labels and content hashes are hashed as they are (about 1 s for 10 million
    samples), of the shards what their manifest says.

    Raises:
        UserError: they are not those that were written with the manifest.
    """
    return {split: tuple(map(_identity, sources)) for split, sources in data.sources.items()}


def _identity(source: Source) -> SourceIdentity:
    info, reader = source.facts.info, source.reader
    shards: list[object] = [[shard.num_samples, shard.num_bytes, shard.sha256] for shard in info.shards]
    shards += filter(None, [source.facts.manifest.values])
    hashes = reader.content_hashes()
    columns = reader.label_columns()
    found = {
        "index": table_hash(reader.index_rows()),
        "labels": "" if columns is None else table_hash(columns),
        "hashes": "" if hashes is None else table_hash(hashes),
    }
    check_tables(source.facts, reader.index_rows(), columns, found)
    return SourceIdentity(
        name=source.facts.manifest.name,
        split=source.facts.split,
        num_samples=info.num_samples,
        shards=hashlib.sha256(json.dumps(shards).encode()).hexdigest(),
        index=found["index"],
        labels=found["labels"],
        images=found["hashes"],
        images_sum=0 if hashes is None else int(np.add.reduce(hashes, dtype=np.uint64)),
        derived=_derived_hash(reader.derived_classes()),
    )


def _derived_hash(classes: Mapping[str, np.ndarray]) -> str:
    tables = [f"{name} {table_hash(rows)}" for name, rows in sorted(classes.items())]
    return hashlib.sha256("\n".join(tables).encode()).hexdigest() if tables else ""


def task_differences(before: Mapping[str, TaskInfo], now: Mapping[str, TaskInfo]) -> list[str]:
    """What the tasks mean now that they did not mean `before`, one line for each task."""
    lines = [f"task {name}: expected none in the data, found one." for name in now if name not in before]
    for name, expected in before.items():
        if name not in now:
            lines.append(f"task {name}: expected it in the data, found none.")
        elif words := _task_difference(expected, now[name]):
            lines.append(f"task {name}: {words}.")
    return lines


def meaning_differences(before: Mapping[str, TaskInfo], now: Mapping[str, TaskInfo]) -> list[str]:
    """Of the tasks that both have: where a label means something else now, whatever the numbers of labels."""
    return [
        f"task {name}: {words}."
        for name, expected in before.items()
        if name in now and (words := _meaning_difference(expected, now[name]))
    ]


def _meaning_difference(before: TaskInfo, now: TaskInfo) -> str:
    if before.kind != now.kind:
        return f"expected labels of the kind {before.kind}, found {now.kind}"
    if before.classes != now.classes:
        return _class_difference(before.classes, now.classes)
    if before.unit != now.unit:
        return f"expected the unit {before.unit!r}, found {now.unit!r}"
    return ""


def _task_difference(before: TaskInfo, now: TaskInfo) -> str:
    meaning = _meaning_difference(before, now)
    if meaning:
        return meaning
    for name in ("mean", "std", "minimum", "maximum"):
        expected, found = getattr(before, name), getattr(now, name)
        if not _same(expected, found):
            return f"expected labels with the {name} {expected:.6g}, found {found:.6g}"
    if before.num_labelled != now.num_labelled:
        return f"expected {before.num_labelled:,} labels, found {now.num_labelled:,}"
    if before.class_counts != now.class_counts:
        return "expected the same number of labels of each class, found others"
    changed = [key for key in {**before.facts, **now.facts} if before.facts.get(key) != now.facts.get(key)]
    if changed:
        key = changed[0]
        return f"expected {key} {before.facts.get(key)!r}, found {now.facts.get(key)!r}"
    return ""


def _same(expected: float, found: float) -> bool:
    """Whether two statistics agree: pooled ones may differ in the last digit from machine to machine."""
    both_undefined = math.isnan(expected) and math.isnan(found)
    return both_undefined or math.isclose(expected, found, rel_tol=1e-9, abs_tol=1e-12)


def _class_difference(before: Sequence[str], now: Sequence[str]) -> str:
    added, lost = [c for c in now if c not in before], [c for c in before if c not in now]
    if not added and not lost and len(before) == len(now):
        number, (expected, found) = next(
            (number, pair) for number, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1]
        )
        return (
            f"expected the class {number} to be {expected}, found {found}: its classes are in another order"
        )
    if len(before) == len(now):
        pairs = [f"{a} is called {b}" for a, b in zip(before, now, strict=True) if a != b]
        return f"expected the classes {first_few(before)}, found others: {first_few(pairs)}"
    what = [*(f"{name} was added" for name in added), *(f"{name} is missing" for name in lost)]
    return f"expected {len(before)} classes, found {len(now)}: {first_few(what)}"


def source_differences(before: Identities, now: Identities, split: str) -> Iterator[str]:
    """What the sources of a split hold now that they did not hold `before`, one line for each source."""
    kept, found = before.get(split, ()), now.get(split, ())
    if len(kept) != len(found):
        yield f"data.{split}: expected {len(kept)} sources with samples, found {len(found)}."
        return
    for expected, source in zip(kept, found, strict=True):
        words = expected.differences(source)
        if words:
            yield f"data.{split}, {source.split} of {source.name}: {words}."


def data_differences(before: DataFacts, now: DataFacts) -> list[str]:
    """Why training cannot go on with this data, one line for each difference; what evaluates may differ."""
    now = DataFacts.parse(now.to_json())  # as JSON holds it: `before` has been there
    lines = task_differences(before.task_infos, now.task_infos)
    for name in ("channels", "image_dtype"):
        expected, found = getattr(before, name), getattr(now, name)
        if expected != found:
            lines.append(f"images: expected the {name.replace('image_', '')} {expected}, found {found}.")
    lines += _pixel_differences(before.pixels, now.pixels)
    return lines + list(source_differences(before.sources, now.sources, "train"))


def _pixel_differences(before: PixelScale | None, now: PixelScale | None) -> Iterator[str]:
    if before is None or now is None:
        if before is not now:
            yield "images: expected the mean of their pixels to be known as before, found it in one alone."
        return
    for what, expected, found in (("mean", before.mean, now.mean), ("deviation", before.std, now.std)):
        if not all(map(_same, expected, found)):
            values = ("/".join(f"{value:.6g}" for value in row) for row in (expected, found))
            yield f"images: expected pixels of the {what} {next(values)}, found {next(values)}."
            return
