"""What is said at the end of an epoch: a line for all tasks, and one for each against what it is to beat."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mtl_dist.evaluator import BaselineMetrics
from mtl_dist.plural import readable
from mtl_dist.tasks.task import Task


@dataclass
class EpochTable:
    """The main metric of each task, the best so far and that of the constant answer, all on val.

    `record` are the lines of metrics.jsonl so far: a resumed run knows what was best before.
    """

    tasks: Mapping[str, Task]
    record: Sequence[str] = ()
    baselines: dict[str, BaselineMetrics] = field(default_factory=dict)
    _best: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for line in self.record:
            if '"epoch"' in line:
                row = json.loads(line)
                for name in self.tasks if row.get("kind") == "epoch" else ():
                    value = row.get(self._key(name))
                    if value is not None:
                        self._take(name, value)

    def lines(self, metrics: Mapping[str, float]) -> list[str]:
        """One for each task that was measured on val."""
        rows = []
        for name, task in self.tasks.items():
            value = metrics.get(self._key(name), math.nan)
            if math.isnan(value):
                continue
            self._take(name, value)
            metric = task.settings.compared[0]
            row = [name, metric, readable(value), f"best {readable(self._best[name])}"]
            baseline = self.baselines.get(name)
            reached = math.nan if baseline is None else baseline.metrics.get(metric, math.nan)
            row.append(f"{baseline.name} {readable(reached)}" if baseline and not math.isnan(reached) else "")
            rows.append(row)
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(5)]
        return [
            "  " + "  ".join(c.ljust(width) for c, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]

    def _key(self, name: str) -> str:
        return f"val/{name}/{self.tasks[name].settings.compared[0]}"

    def _take(self, name: str, value: float) -> None:
        settings = self.tasks[name].settings
        better = max if settings.modes.get(settings.compared[0]) == "max" else min
        self._best[name] = better(value, self._best.get(name, value))
