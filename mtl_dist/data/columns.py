"""Label columns: the labels of a split that are not maps, as one packed row per sample.

    train.labels.npy    a field <task> of the type that the task's kind says (`ScalarKind.column_type`):
                        <i4 for a class, -1 where there is no label; <f8 for a number, NaN for none;
                        u1 (ceil(C / 8),) for several classes, bit c % 8 of byte c // 8 for class c

The rows are those of the index, which also says whether a multilabel sample has no positive class or no
label. Columns answer what no row alone can, such as "which samples are of this class"; and they hold the
labels of tars that someone else wrote, in which labels may stand in any form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtl_dist.data.remote import Place
from mtl_dist.kinds.kind import Label, ScalarKind
from mtl_dist.kinds.registry import kind_of, scalar_kind
from mtl_dist.specs import TaskInfo


def labels_path(directory: Place, split: str) -> Place:
    """Where the label columns of a split lie."""
    return directory / f"{split}.labels.npy"


def columns_dtype(tasks: Mapping[str, TaskInfo]) -> np.dtype[np.void]:
    """The packed row of the label columns of these tasks; those whose labels are maps have no column."""
    fields: list[Any] = []
    for name, info in tasks.items():
        kind = kind_of(info.kind)
        if isinstance(kind, ScalarKind):
            stored = kind.column_type(info)
            fields.append((name, stored) if isinstance(stored, str) else (name, *stored))
    return np.dtype(fields)


def label_columns(
    tasks: Mapping[str, TaskInfo], labels: Mapping[str, Sequence[Label | None]], num_samples: int
) -> np.ndarray:
    """The columns of some samples; `labels` holds, by task, the label of each or None."""
    rows = np.zeros(num_samples, columns_dtype(tasks))
    for name in rows.dtype.names or ():
        rows[name] = scalar_kind(tasks[name].kind).encode(labels[name], tasks[name])
    return rows


def labels_at(columns: np.ndarray, row: int, task_infos: Mapping[str, TaskInfo]) -> dict[str, Label]:
    """The labels of one row, of those tasks that have a column, as a shard's JSON holds them."""
    return {
        name: scalar_kind(task_infos[name].kind).decode(columns[name][row], task_infos[name])
        for name in columns.dtype.names or ()
        if name in task_infos
    }


def counted(columns: np.ndarray, task: str, info: TaskInfo) -> tuple[int, ...]:
    """What a column holds: labels by class, or of a kind without classes the number of labels."""
    return scalar_kind(info.kind).counts(columns[task], info)
