"""What the manifest says of labels and images, counted over the records that were packed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from mtl_dist.data.digests import DIGEST_DTYPE, same_rows
from mtl_dist.data.manifest import ImageDtype, LabelCounts
from mtl_dist.data.shards import Label
from mtl_dist.errors import UserError
from mtl_dist.importers.jobs import Record, ShardResult, TaskSource
from mtl_dist.specs import TaskInfo

_LISTED = 5
_ODDITIES = {
    "rotated": "turned by their EXIF orientation, which is applied when they are read",
    "alpha": "with an alpha channel, which is dropped when they are read",
    "palette": "with a palette, read as RGB",
    "cmyk": "in CMYK, read as RGB",
}


@dataclass(frozen=True)
class PackedSplit:
    """One split after packing: its records in stored order, and what its jobs found."""

    records: Sequence[Record]
    results: Sequence[ShardResult]

    @property
    def digests(self) -> np.ndarray:
        """Those of the images."""
        return np.frombuffer(bytes.fromhex("".join(result.digests for result in self.results)), DIGEST_DTYPE)


def listed(items: Sequence[str]) -> str:
    """The first few items and how many more there are."""
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return "; ".join(items[:_LISTED]) + more


def label_counts(name: str, task: TaskSource, split: PackedSplit) -> LabelCounts:
    """The labels of one task in one split."""
    num_samples = len(split.records)
    if task.kind == "segmentation":
        present = sum(name in record.masks for record in split.records)
        counts = np.sum([result.mask_pixels[name] for result in split.results], axis=0)
    elif task.kind == "regression":
        present = sum(name in record.labels for record in split.records)
        return LabelCounts(present, num_samples - present)
    else:
        labels = [record.labels[name] for record in split.records if name in record.labels]
        present = len(labels)
        indices = [index for label in labels for index in (label if isinstance(label, list) else [label])]
        counts = np.bincount(np.array(indices, np.int64), minlength=len(task.classes))
    return LabelCounts(present, num_samples - present, tuple(int(count) for count in counts))


def task_info(name: str, task: TaskSource, split: PackedSplit, counts: LabelCounts) -> TaskInfo:
    """A task's facts from the labels of the training split."""
    values = [record.labels[name] for record in split.records if name in record.labels]
    info = TaskInfo(task.kind, task.classes, unit=task.unit)
    return with_facts(info, counts, values if task.kind == "regression" else [])


def with_facts(info: TaskInfo, counts: LabelCounts, values: Sequence[Label]) -> TaskInfo:
    """The task with what its training labels say; `values` are those of a regression."""
    numbers = np.array(values if values else [0.0], float)
    spread = float(numbers.std())
    return replace(
        info,
        num_labelled=counts.present,
        class_counts=counts.class_counts,
        mean=float(numbers.mean()),
        std=spread if spread > 0 else 1.0,  # a target that never varies must not be divided by 0
        minimum=float(numbers.min()),
        maximum=float(numbers.max()),
    )


def image_format(kinds: Sequence[Mapping[str, str]]) -> tuple[int, ImageDtype]:
    """The channels and the type that hold for every image; grey images among colour ones count as colour.

    `kinds` map "channels dtype" to an example, for each shard.

    Raises:
        UserError: the images differ in type, or in channels otherwise.
    """
    examples: dict[str, str] = {}
    for kind in kinds:
        examples = {**kind, **examples}
    channels = {int(kind.split()[0]) for kind in examples}
    dtypes = {kind.split()[1] for kind in examples}
    if len(dtypes) > 1 or (len(channels) > 1 and channels != {1, 3}):
        found = ", ".join(
            f"{kind.replace(' ', ' channel(s) of ')} ({path})" for kind, path in examples.items()
        )
        raise UserError(f"images: expected one number of channels and one type for all, found {found}.")
    return max(channels), cast(ImageDtype, dtypes.pop())


def check_conventions(name: str, results: Sequence[ShardResult]) -> None:
    """Refuse masks of one task of which some hold class indices and others greys, or only dark greys.

    Raises:
        UserError: they do; with an example of each.
    """
    examples: dict[str, str] = {}
    for result in results:
        examples = {**result.conventions[name], **examples}
    if "grey" in examples and "index" in examples:
        raise UserError(
            f"task {name!r}: expected one kind of masks, found class indices (0, 1) in {examples['index']} "
            f"and greys up to 255 in {examples['grey']}. "
            f"Name the classes by their values in the masks, for example 0:background,1:{name}."
        )
    if "grey" in examples and not sum(result.mask_pixels[name][1] for result in results):
        raise UserError(
            f"task {name!r}: expected greys of 128 and above for {name} in some mask, found darker ones "
            f"alone, as in {examples['grey']}. "
            f"Name the classes by their values in the masks, for example 0:background,7:{name}."
        )


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


def label_notes(
    tasks: Mapping[str, TaskSource | TaskInfo],
    labels: Mapping[str, Mapping[str, LabelCounts]],
    training: str,
) -> Iterator[str]:
    """What the labels of the training split lack; `labels` are the counts by split and task."""
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


def duplicate_notes(digests: Mapping[str, np.ndarray], keys: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The images of which two splits hold the very same bytes; digests and keys of samples by split."""
    for (first, a), (second, b) in itertools.combinations(digests.items(), 2):
        in_second, in_first = same_rows(b, a)
        if len(in_first):
            pairs = [
                f"{keys[first][i]} = {keys[second][j]}"
                for i, j in zip(in_first.tolist(), in_second.tolist(), strict=True)
            ]
            yield f"the same image in {first} and {second}: {len(pairs)} ({listed(sorted(pairs))})"
