"""What the manifest says of labels and images, counted over the records that were packed."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from mtl_dist.data.content_hashes import HASH_DTYPE, same_rows
from mtl_dist.data.manifest import ImageDtype, LabelCounts
from mtl_dist.errors import UserError
from mtl_dist.importers.jobs import Record, ShardResult, TaskSource
from mtl_dist.kinds.kind import MapKind, ScalarKind
from mtl_dist.kinds.registry import kind_of
from mtl_dist.plural import first_few
from mtl_dist.specs import IGNORE, TaskInfo

_ODDITIES = {
    "rotated": "turned by their EXIF orientation, which is applied when they are read",
    "alpha": "with an alpha channel, which is dropped when they are read",
    "palette": "with a palette, read as RGB",
    "cmyk": "in CMYK, read as RGB",
    "array": "in TIFFs of channels or values that decoders of pictures do not read whole, stored as arrays",
    "converted": "of another depth, brought to that of --bits by the factor 257 of full scale",
}


@dataclass(frozen=True)
class PackedSplit:
    """One split after packing: its records in stored order, and what its jobs found."""

    records: Sequence[Record]
    results: Sequence[ShardResult]

    @property
    def content_hashes(self) -> np.ndarray:
        """Those of the images."""
        hashes = "".join(result.content_hashes for result in self.results)
        return np.frombuffer(bytes.fromhex(hashes), HASH_DTYPE)


def listed(items: Sequence[str]) -> str:
    """The first few items and how many more there are."""
    return first_few(items, between="; ")


def label_counts(name: str, task: TaskSource, split: PackedSplit) -> LabelCounts:
    """The labels of one task in one split."""
    num_samples = len(split.records)
    kind, info = kind_of(task.kind), task.info
    if isinstance(kind, MapKind):
        present = sum(name in record.masks for record in split.records)
        return LabelCounts(present, num_samples - present, kind.counts(tally_of(name, kind, split), info))
    assert isinstance(kind, ScalarKind)
    present = sum(name in record.labels for record in split.records)
    column = kind.encode([record.labels.get(name) for record in split.records], info)
    return LabelCounts(present, num_samples - present, kind.counts(column, info) if info.classes else ())


def task_info(name: str, task: TaskSource, split: PackedSplit, counts: LabelCounts) -> TaskInfo:
    """A task's facts from the labels of the training split."""
    kind = kind_of(task.kind)
    if isinstance(kind, MapKind):
        return with_facts(task.info, counts, tally_of(name, kind, split))
    assert isinstance(kind, ScalarKind)
    column = kind.encode([record.labels.get(name) for record in split.records], task.info)
    return with_facts(task.info, counts, column)


def tally_of(name: str, kind: MapKind, split: PackedSplit) -> np.ndarray:
    """What is counted of a split's maps."""
    tallies = [np.array(result.tallies[name]) for result in split.results]
    return functools.reduce(kind.add, tallies)


def with_facts(info: TaskInfo, counts: LabelCounts, content: np.ndarray) -> TaskInfo:
    """The task with what its training labels say; `content` is their column, or the tally of maps."""
    info = replace(info, num_labelled=counts.present, class_counts=counts.class_counts)
    kind = kind_of(info.kind)
    assert isinstance(kind, ScalarKind | MapKind)
    return kind.facts(content, info)


def image_format(kinds: Sequence[Mapping[str, tuple[str, int]]]) -> tuple[int, ImageDtype]:
    """The channels and the type that hold for every image; grey images among colour ones count as colour.

    `kinds` map "channels dtype" to an example and a number of images, for each shard.

    Raises:
        UserError: the images differ in type, or in channels otherwise.
    """
    examples: dict[str, str] = {}
    numbers: Counter[str] = Counter()
    for kind in kinds:
        for name, (example, number) in kind.items():
            examples.setdefault(name, example)
            numbers[name] += number
    channels = {int(kind.split()[0]) for kind in examples}
    dtypes = {kind.split()[1] for kind in examples}
    odd_channels = len(channels) > 1 and channels != {1, 3}
    if len(dtypes) > 1 or odd_channels:
        found = ", ".join(
            f"{number} with {kind.replace(' ', ' channel(s) of ')} (as {examples[kind]})"
            for kind, number in numbers.most_common()
        )
        what = "type" if len(dtypes) > 1 else "number of channels"
        if not odd_channels and "float32" not in dtypes:
            remedy = "--bits 8 or --bits 16 converts all to one."
        elif len(dtypes) == 1:
            remedy = "--channels chooses those that all have."
        else:
            remedy = "Convert some of them."
        raise UserError(f"images: expected one {what} for all, found {found}. {remedy}")
    return max(channels), cast(ImageDtype, dtypes.pop())


def check_conventions(name: str, task: TaskSource, results: Sequence[ShardResult]) -> None:
    """Refuse maps of one task that cannot all be meant as they were read.

    Raises:
        UserError: with an example.
    """
    kind = kind_of(task.kind)
    if not isinstance(kind, MapKind):
        return
    examples: dict[str, str] = {}
    for result in results:
        examples = {**result.conventions[name], **examples}
    tally = functools.reduce(kind.add, [np.array(result.tallies[name]) for result in results])
    kind.check_files(name, examples, tally, task.info)


def image_notes(oddities: Sequence[Mapping[str, int]], skipped: Sequence[str]) -> Iterator[str]:
    """What the readers of the images have to know: what is odd, by shard, and why some were left out."""
    total: Counter[str] = Counter()
    for counts in oddities:
        total.update(counts)
    for word, meaning in _ODDITIES.items():
        if total[word]:
            yield f"images {meaning}: {total[word]}"
    if skipped:
        yield f"unreadable, left out: {len(skipped)} ({listed(skipped)})"


def unlabelled_notes(results: Sequence[ShardResult]) -> Iterator[str]:
    """The maps that were taken as missing labels."""
    total: Counter[str] = Counter()
    for result in results:
        total.update({task: len(positions) for task, positions in result.unlabelled.items()})
    for task, number in total.items():
        yield f"{task}: masks that are {IGNORE} throughout, taken as no label: {number}"


def placed_notes(noted: Sequence[Mapping[str, Mapping[str, int]]]) -> Iterator[str]:
    """What is to be said of labels that have a place in their image; by shard, task and words its number."""
    total: dict[str, Counter[str]] = {}
    for by_task in noted:
        for task, counts in by_task.items():
            total.setdefault(task, Counter()).update(counts)
    for task, words in total.items():
        yield from (f"{task}: {what}: {number:,}" for what, number in words.items() if number)


def label_notes(
    tasks: Mapping[str, TaskSource | TaskInfo],
    labels: Mapping[str, Mapping[str, LabelCounts]],
    training: str,
) -> Iterator[str]:
    """What the labels of the training split lack, and tasks without a label in another split; `labels` are
    the counts by split and task."""
    for name, task in tasks.items():
        counts = labels[training][name]
        if counts.present == 0:
            yield f"{name}: no labels in {training}"
            continue
        unseen = [
            class_name
            for index, class_name in enumerate(task.classes)
            if counts.class_counts[index] == 0
            and any(split[name].class_counts[index] for split in labels.values())
        ]
        if unseen:
            yield f"{name}: in other splits but not in {training}: {listed(unseen)}"
        for split, by_task in labels.items():
            if split != training and by_task[name].present == 0:
                yield f"{name}: no labels in {split}"


def duplicate_notes(hashes: Mapping[str, np.ndarray], keys: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The images of which two splits hold the very same bytes; content hashes and keys by split."""
    for (first, a), (second, b) in itertools.combinations(hashes.items(), 2):
        in_second, in_first = same_rows(b, a)
        if len(in_first):
            pairs = [
                f"{keys[first][i]} = {keys[second][j]}"
                for i, j in zip(in_first.tolist(), in_second.tolist(), strict=True)
            ]
            yield f"the same image in {first} and {second}: {len(pairs)} ({listed(sorted(pairs))})"
