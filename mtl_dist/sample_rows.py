"""One row per sample of an evaluated split: its key, its labels, the model's answers, and how good these are.

    position, dataset, key, digit.class_name, digit.confidence, digit.probabilities.0, ..., digit.label,
    digit.correct, digit.loss, ...

A column is empty where a sample has no label, or a kind does not say such a thing of it. Rows come in the
order of the split, whatever the ranks; samples that cannot be read have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from mtl_dist.batch import Batch
from mtl_dist.engine.world import World
from mtl_dist.tasks.task import Task

MOST_CLASSES = 200
"""Values by class, such as probabilities, are left out of a task that has more classes."""
_DIGITS = 6
_BATCHES_HELD = 16
"""Batches whose rows wait for being sent to rank 0."""

PLACE = ("position", "dataset", "key")


@dataclass
class SampleRows:
    """Collects the rows of a split, on rank 0 those of all ranks.

    `datasets` are the names and lengths of the split's sources, one after the other.
    """

    tasks: Mapping[str, Task]
    world: World
    datasets: Sequence[tuple[str, int]]
    _batch: list[dict[str, Any]] = field(default_factory=list)
    _waiting: list[dict[str, Any]] = field(default_factory=list)
    _num_batches: int = 0
    _blocks: list[dict[str, np.ndarray]] = field(default_factory=list)

    def begin(self, batch: Batch) -> None:
        """The next batch, on the host."""
        self._batch = [
            {"position": position, "dataset": self._dataset(position), "key": key} if valid else {}
            for position, key, valid in zip(
                batch.positions_B.tolist(), batch.keys, batch.valid_B.tolist(), strict=True
            )
        ]

    def losses(self, task: str, losses_B: Tensor) -> None:
        """Each sample's loss, NaN where it has no label."""
        for row, loss in zip(self._batch, losses_B.tolist(), strict=True):
            if row and loss == loss:
                row[f"{task}.loss"] = loss

    def answers(
        self, task: str, rows: Sequence[int], output: Tensor, target: Tensor, labelled: Sequence[bool]
    ) -> None:
        """What the outputs of some samples say, and their labels of them; maps in the size of the targets."""
        for at, row in enumerate(rows):
            if not self._batch[row]:
                continue
            own = output[at : at + 1]
            answer = self.tasks[task].placed(self.tasks[task].decode(own)[0], target[at].cpu().numpy())
            said = dict(answer)
            if labelled[at]:
                said |= self.tasks[task].judged(answer, own, target[at : at + 1])
            self._batch[row] |= _flat(said, f"{task}.")

    def end(self) -> None:
        """Collective: the batch is done."""
        self._waiting += [row for row in self._batch if row]
        self._num_batches += 1
        if self._num_batches % _BATCHES_HELD == 0:
            self._send()

    def table(self) -> Table | None:
        """Collective: all rows in the split's order, on rank 0."""
        self._send()
        return _joined(self._blocks, list(self.tasks)) if self.world.is_main else None

    def _send(self) -> None:
        blocks = self.world.gather(_columns(self._waiting))
        if self.world.is_main:
            self._blocks += [block for block in blocks if block]
        self._waiting = []

    def _dataset(self, position: int) -> str:
        for name, length in self.datasets:
            if position < length:
                return name
            position -= length
        raise AssertionError("a position beyond its split")


@dataclass(frozen=True)
class Table:
    """Rows as columns of one length: float64 (NaN where empty) or objects (None where empty)."""

    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["position"]) if self.columns else 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each as plain values, None where it is empty; numbers with six digits."""
        lists = {name: _plain(values) for name, values in self.columns.items()}
        for number in range(len(self)):
            yield {name: values[number] for name, values in lists.items()}

    def of_task(self, task: str) -> dict[str, np.ndarray]:
        """A task's columns, without its name: the rows that have its label."""
        prefix = f"{task}."
        found = {
            name.removeprefix(prefix): values
            for name, values in self.columns.items()
            if name.startswith(prefix)
        }
        if not found:
            return found
        has = ~np.isnan(found["loss"].astype(np.float64)) if "loss" in found else np.zeros(len(self), bool)
        return {"position": self.columns["position"][has]} | {n: values[has] for n, values in found.items()}


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Values by path, those of a vector by number; without arrays and without what has a value for each of
    very many classes."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name == "units":
            continue
        if is_vector(value):
            value = {str(number): one for number, one in enumerate(value)}
        if isinstance(value, Mapping):
            if len(value) <= MOST_CLASSES:
                flat |= _flat(value, f"{prefix}{name}.")
        elif name != "unit" and not isinstance(value, np.ndarray):
            flat[f"{prefix}{name}"] = value
    return flat


def is_vector(value: Any) -> bool:
    """Whether it is a list of numbers, which have a column each."""
    return isinstance(value, list) and bool(value) and all(type(one) in (int, float) for one in value)


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _column([row.get(name) for row in rows]) for name in names}


def _column(values: Sequence[Any]) -> np.ndarray:
    """Real numbers as float64 with NaN for None, everything else as objects."""
    if all(value is None or type(value) is float for value in values):
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def _joined(blocks: Sequence[dict[str, np.ndarray]], tasks: Sequence[str]) -> Table:
    names = dict.fromkeys(name for block in blocks for name in block)
    order = [*PLACE, *(name for task in tasks for name in names if name.startswith(f"{task}."))]
    lengths = [len(block["position"]) for block in blocks]
    columns: dict[str, np.ndarray] = {}
    for name in order if blocks else ():
        parts = [
            block.get(name, np.full(length, np.nan)) for block, length in zip(blocks, lengths, strict=True)
        ]
        if any(part.dtype == object for part in parts):
            parts = [_as_objects(part) for part in parts]
        columns[name] = np.concatenate(parts)
    if columns:
        at = np.argsort(columns["position"].astype(np.int64), kind="stable")
        columns = {name: values[at] for name, values in columns.items()}
    return Table(columns)


def _as_objects(values: np.ndarray) -> np.ndarray:
    if values.dtype == object:
        return values
    column = np.empty(len(values), dtype=object)
    column[:] = [None if value != value else value for value in values.tolist()]
    return column


def _plain(values: np.ndarray) -> list[Any]:
    if values.dtype == object:
        return values.tolist()
    return [float(f"{value:.{_DIGITS}g}") if value == value else None for value in values.tolist()]
