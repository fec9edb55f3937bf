"""Label columns: the labels of a split that are not masks, as one packed row per sample.

    train.labels.npy    <task> of classification <i4: the class, -1 where there is no label
                        <task> of regression     <f8: the value, NaN where there is no label
                        <task> of multilabel     u1 (ceil(C / 8),): bit c % 8 of byte c // 8 for class c

The rows are those of the index, which also tells a multilabel sample without a positive class from one
without a label. Columns answer what no row alone can, such as "which samples are of this class"; and they
hold the labels of tars that someone else wrote, in which labels may stand in any form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtl_dist.data.remote import Place
from mtl_dist.data.shards import Label
from mtl_dist.specs import TaskInfo

NO_CLASS = -1


def labels_path(directory: Place, split: str) -> Place:
    """Where the label columns of a split lie."""
    return directory / f"{split}.labels.npy"


def columns_dtype(tasks: Mapping[str, TaskInfo]) -> np.dtype[np.void]:
    """The packed row of the label columns of these tasks; those that have masks have no column."""
    fields: list[Any] = []
    for name, info in tasks.items():
        if info.kind == "classification":
            fields.append((name, "<i4"))
        elif info.kind == "regression":
            fields.append((name, "<f8"))
        elif info.kind == "multilabel":
            fields.append((name, "u1", (_num_bytes(info),)))
    return np.dtype(fields)


def label_columns(
    tasks: Mapping[str, TaskInfo], labels: Mapping[str, Sequence[Label | None]], num_samples: int
) -> np.ndarray:
    """The columns of some samples; `labels` holds, by task, the label of each or None."""
    rows = np.zeros(num_samples, columns_dtype(tasks))
    for name in rows.dtype.names or ():
        info = tasks[name]
        if info.kind == "multilabel":
            flags = np.zeros((num_samples, 8 * _num_bytes(info)), np.uint8)
            for flag, positives in zip(flags, labels[name], strict=True):
                assert positives is None or isinstance(positives, list)
                flag[positives or []] = 1
            rows[name] = np.packbits(flags, axis=1, bitorder="little")
        else:
            missing = NO_CLASS if info.kind == "classification" else math.nan
            rows[name] = [missing if label is None else label for label in labels[name]]
    return rows


def labels_at(columns: np.ndarray, row: int, tasks: Sequence[str]) -> dict[str, Label]:
    """The labels of one row, of those `tasks` that have a column, as a shard's JSON holds them."""
    labels: dict[str, Label] = {}
    for name in tasks:
        if name in (columns.dtype.names or ()):
            value = columns[name][row]
            labels[name] = np.flatnonzero(_bits(value)).tolist() if value.ndim else value.item()
    return labels


def counted(columns: np.ndarray, task: str, info: TaskInfo) -> tuple[int, ...]:
    """What a column holds: samples by class, positives by class, or of a regression the labels."""
    column = columns[task]
    if info.kind == "regression":
        return (int((~np.isnan(column)).sum()),)
    if info.kind == "multilabel":
        counts = np.unpackbits(column, axis=1, bitorder="little").sum(axis=0)
    else:
        counts = np.bincount(column[column != NO_CLASS].astype(np.uint32), minlength=len(info.classes))
    # Whatever is beyond the classes stays, and is told by it.
    return tuple(counts.tolist()[: max(len(info.classes), 1 + int(np.flatnonzero(counts).max(initial=-1)))])


def _bits(packed: np.ndarray) -> np.ndarray:
    return np.unpackbits(packed, bitorder="little")


def _num_bytes(info: TaskInfo) -> int:
    return -(-len(info.classes) // 8)
