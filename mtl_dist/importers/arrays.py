"""Files that hold many small pictures each, as one array, with a column of classes per task.

IDX files and CIFAR's records are such: their importers read them into parts, and here the parts become a
dataset.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mtl_dist.data.manifest import Manifest
from mtl_dist.errors import UserError
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.measures import MEASURES
from mtl_dist.importers.packing import PackOptions, Progress, pack
from mtl_dist.importers.pixels import encoded_picture
from mtl_dist.importers.sources import Source
from mtl_dist.importers.splitting import SPLIT_NAMES, held_out_note, split_by_fractions
from mtl_dist.kinds.classification import Classification
from mtl_dist.kinds.regression import Regression

DEFAULT_VAL = 0.1
"""The share of the training pictures to validate on, where the data has no val part of its own."""

_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, eq=False)
class ArrayPart:
    """The pictures of one file: `pictures` (N, H, W) or (N, H, W, C) uint8, `classes` (N,) by task.

    `name` is unique among the parts and begins the keys of its samples.
    """

    name: str
    split: str
    pictures: np.ndarray
    classes: Mapping[str, np.ndarray]


def unpacked(source: Source) -> bytes:
    """The bytes of a file that may be compressed by gzip.

    Raises:
        UserError: unreadable, or a damaged gzip file.
    """
    data = source.read()
    if not data.startswith(_GZIP):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source}: expected a whole gzip file, found: {error}. Copy it again.") from None


def class_names_of(
    name: str, parts: Sequence[ArrayPart], names: Sequence[str] | None, where: Callable[[ArrayPart], str]
) -> tuple[str, ...]:
    """The class names of one task: `names`, or the numbers from 0 to the largest label.

    Raises:
        UserError: a label beyond the names; `where` says which file a part is.
    """
    if names is None:
        largest = max(int(part.classes[name].max(initial=0)) for part in parts)
        return tuple(str(index) for index in range(largest + 1))
    for part in parts:
        wrong = np.flatnonzero(part.classes[name] >= len(names))
        if len(wrong):
            first = int(wrong[0])
            raise UserError(
                f"{where(part)}, picture {first}: expected a class of {name} from 0 to {len(names) - 1}, "
                f"found {int(part.classes[name][first])}. {len(wrong)} labels are out of range."
            )
    return tuple(names)


def pack_arrays(
    parts: Sequence[ArrayPart],
    out: Path,
    classes: Mapping[str, tuple[str, ...]],
    name: str,
    val: float | None,
    measures: Sequence[str],
    options: PackOptions,
    progress: Progress,
) -> Manifest:
    """Pack the parts as the dataset `out`; `val` of the training pictures are held out (None: DEFAULT_VAL).

    Every class of the task with the most classes is divided alike. With a part for val nothing is held out.

    Raises:
        UserError: no training part, no val that is asked for; or what `pack` refuses.
    """
    splits = {part.split for part in parts}
    if "train" not in splits:
        raise UserError(f"{name}: expected training pictures, found only {', '.join(sorted(splits))}.")
    if "val" in splits and val is not None:
        raise UserError(f"{name}: expected no val pictures with --val, found some. Drop --val.")
    held_out = (DEFAULT_VAL if val is None else val) if "val" not in splits else 0.0
    if not 0 <= held_out < 1:
        raise UserError(f"--val: expected a share from 0 up to 1, found {held_out:g}.")
    finest = max(classes, key=lambda task: len(classes[task]))
    notes = []

    records: dict[str, list[Record]] = {split: [] for split in (*SPLIT_NAMES, *splits)}
    training: list[Record] = []
    for part in parts:
        target = training if part.split == "train" else records[part.split]
        target += _records(part, measures)
    if held_out:
        strata = [str(record.labels[finest]) for record in training]
        keys = [record.key for record in training]
        fractions = (1 - held_out, held_out)
        chosen = split_by_fractions(keys, strata, fractions, options.seed)
        notes.append(held_out_note(held_out, finest, options.seed, chosen))
        for record, split in zip(training, chosen, strict=True):
            records[split].append(record)
    else:
        records["train"] = training
    tasks = {task: TaskSource(Classification.name, names) for task, names in classes.items()}
    tasks |= {measure: TaskSource(Regression.name, unit=MEASURES[measure].unit) for measure in measures}
    filled = {split: found for split, found in records.items() if found}
    return pack(filled, out, tasks, name, notes, replace(options, verify=False), progress)


def _records(part: ArrayPart, measures: Sequence[str]) -> list[Record]:
    records = []
    for number, picture in enumerate(part.pictures):
        labels: dict[str, int | float | list[int]] = {
            task: int(column[number]) for task, column in part.classes.items()
        }
        labels |= {measure: MEASURES[measure].of(picture) for measure in measures}
        records.append(Record(f"{part.name}_{number:06d}", encoded_picture(picture), labels))
    return records
