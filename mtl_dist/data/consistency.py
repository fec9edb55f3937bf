"""Whether a split's tables are those that its manifest was written with, and hold what it counts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest

import numpy as np

from mtl_dist.data.columns import counted
from mtl_dist.data.manifest import MANIFEST_NAME
from mtl_dist.data.table_hashes import TABLES
from mtl_dist.data.task_infos import SourceFacts
from mtl_dist.errors import UserError
from mtl_dist.specs import TaskInfo

_ROWS_AT_A_TIME = 1 << 20
_SHOWN = 12


def check_tables(
    facts: SourceFacts, index: np.ndarray, columns: np.ndarray | None, hashes: Mapping[str, str]
) -> None:
    """Refuse tables of a split that are not its own; `hashes` are those found, by name.

    Raises:
        UserError: one has another hash than the manifest says, or other labels than it counts.
    """
    for name, expected in facts.info.tables.items():
        if hashes[name] != expected:
            path = facts.path / f"{facts.split}.{name}.npy"
            found = f"others (SHA-256 {hashes[name][:12]}...)" if hashes[name] else "none"
            raise UserError(
                f"{path}: expected the {TABLES[name]} that dataset.json was written with (SHA-256 "
                f"{expected[:12]}...), found {found}: damaged, or changed since. Copy the dataset again, or "
                "prepare it again."
            )
    for bit, task in enumerate(facts.manifest.tasks):
        labelled = int(np.count_nonzero(index["labelled"] & np.uint64(1 << bit)))
        _compare(facts, task, "samples with a label", (facts.info.labels[task].present,), (labelled,))
    if columns is not None:
        for task in columns.dtype.names or ():
            info, counts = facts.manifest.tasks[task], facts.info.labels[task]
            stated = counts.class_counts if info.classes else (counts.present,)
            _compare(facts, task, "labels of each class", stated, _counts(columns, task, info))


def _counts(columns: np.ndarray, task: str, info: TaskInfo) -> tuple[int, ...]:
    """What a column holds, counted in parts: a column of multilabel takes eight times its memory for it."""
    starts = range(0, len(columns), _ROWS_AT_A_TIME)
    parts = [counted(columns[start : start + _ROWS_AT_A_TIME], task, info) for start in starts]
    return tuple(map(sum, zip_longest(*parts, fillvalue=0)))


def _compare(
    facts: SourceFacts, task: str, what: str, stated: tuple[int, ...], found: tuple[int, ...]
) -> None:
    if stated != found and facts.info.num_samples:
        raise UserError(
            f"{facts.path / MANIFEST_NAME}: expected the {what} of {task} in {facts.split} that are there "
            f"({_shown(found)}), found {_shown(stated)} stated. Copy the dataset again, or prepare it again."
        )


def _shown(counts: tuple[int, ...]) -> str:
    more = ", ..." if len(counts) > _SHOWN else ""
    return ", ".join(f"{count}" for count in counts[:_SHOWN]) + more
