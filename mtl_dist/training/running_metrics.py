"""The training metrics: those of a task, of an epoch's training samples, from the steps' own outputs.

They are of the images as training saw them (augmented) and of the weights as they were at each step; no
sample is looked at twice. A blended image has no one label to be right about: it counts in none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from mtl_dist.batch import Batch, Outputs
from mtl_dist.data.settings import DataSettings
from mtl_dist.engine.world import World
from mtl_dist.errors import UserError
from mtl_dist.tasks.metric_states import Metric, State, flat, from_flat, restore, without_repetition
from mtl_dist.tasks.metrics import mean_accuracy
from mtl_dist.tasks.task import Task
from mtl_dist.tasks.user_metrics import AllMetrics

Seen: TypeAlias = dict[str, tuple[Tensor, Tensor, Tensor]]
"""By task: outputs, targets, and which samples count."""

MOST_SCORES = 2**24
"""Scores of an epoch (64 MB) up to which the metrics of an order, which keep all of them, are computed."""
_AT_ONCE = 2**18
"""Numbers in outputs that wait until they are counted together: many small steps cost one update."""


class RunningMetrics:
    """Counts the steps of an epoch; every rank calls it alike."""

    def __init__(self, tasks: Mapping[str, Task], world: World) -> None:
        self._tasks = tasks
        self._world = world
        self._metrics: dict[str, AllMetrics] = {}
        self.left_out: dict[str, tuple[str, ...]] = {}
        """By task the metrics that are not computed: they would keep too many scores."""
        for name, task in tasks.items():
            ranking = task.info.num_labelled * task.loss.num_outputs <= MOST_SCORES
            metrics = AllMetrics(task, world.gather, ranking)
            lacking = tuple(metric for metric in task.reported if metric not in metrics.names)
            self.left_out |= {name: lacking} if lacking else {}
            self._metrics[name] = metrics.to(world.device)
        self._waiting: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in tasks}
        self._num_waiting = dict.fromkeys(tasks, 0)
        self._earlier: dict[str, dict[str, list[State]]] = {name: {} for name in tasks}
        """What earlier starts of the run on other ranks had counted; on rank 0."""

    def exceptions(self, data: DataSettings) -> list[str]:
        """What the training metrics lack, and why, for people to read at the start of a run."""
        lines = [
            f"no train {', '.join(names)} of {task}: they would keep more than {MOST_SCORES:,} scores of an "
            "epoch."
            for task, names in self.left_out.items()
        ]
        if data.blending is not None:
            lines.append("blended images (data.blend) count in no training metric.")
        return lines

    def check_followed(self, names: Sequence[str], data: DataSettings) -> None:
        """Refuse to follow, as in `train/digit/auroc`, what is not computed.

        Raises:
            UserError: one of `names` is not.
        """
        for name in names:
            split, *task, metric = name.split("/")
            if split != "train" or metric == "loss":
                continue
            left_out = self.left_out.get("/".join(task), ())
            if metric in left_out or (data.blending is not None and data.blending.probability == 1):
                why = " ".join(self.exceptions(data))
                raise UserError(
                    f"monitor: expected a metric that is computed, found {name}: {why} Follow one of val."
                )

    @staticmethod
    def seen(batch: Batch, outputs: Outputs) -> Seen:
        """What there is to count of a micro-batch."""
        whole_B = None if batch.lam_B is None else batch.lam_B == 1
        return {
            name: (
                output,
                batch.targets[name],
                batch.labelled[name] if whole_B is None else batch.labelled[name] & whole_B,
            )
            for name, output in outputs.items()
        }

    def take(self, window: Sequence[Seen]) -> None:
        """Count a step, which was not skipped."""
        for seen in window:
            for name, each in seen.items():
                self._waiting[name].append(each)
                self._num_waiting[name] += each[0].numel()
        for name, num in self._num_waiting.items():
            if num >= _AT_ONCE:
                self._count(name)

    @torch.no_grad()
    def _count(self, name: str) -> None:
        waiting, self._waiting[name] = self._waiting[name], []
        self._num_waiting[name] = 0
        if self._tasks[name].layout == "vector" and waiting:
            outputs, targets, counted = zip(*waiting, strict=True)
            waiting = [(torch.cat(outputs), torch.cat(targets), torch.cat(counted))]
        for output, target, counted_B in waiting:
            self._metrics[name].update(output, target, counted_B)

    def of_epoch(self) -> dict[str, float]:
        """Collective: `train/TASK/METRIC` of the epoch so far, and `train/mean_accuracy`."""
        collected = self._collected()
        values = self._world.on_main(
            lambda: {name: metrics.values(collected[name]) for name, metrics in self._metrics.items()}
        )
        found = {f"train/{name}/{key}": value for name, own in values.items() for key, value in own.items()}
        return mean_accuracy("train", values) | found

    def _collected(self) -> dict[str, dict[str, list[list[State]]]]:
        for name in self._tasks:
            self._count(name)
        return {name: metrics.collected(self._earlier[name]) for name, metrics in self._metrics.items()}

    def begin_epoch(self) -> None:
        """Forget the epoch that is over."""
        for name, metrics in self._metrics.items():
            self._waiting[name], self._num_waiting[name], self._earlier[name] = [], 0, {}
            metrics.reset()

    # ------------------------------------------------------------------ state
    def tensors(self) -> dict[str, Tensor]:
        """Collective: a copy of what each rank has counted, for a checkpoint that is written meanwhile."""
        return {
            f"{task}/{part}/{rank}/{key}": tensor.clone()
            for task, parts in self._collected().items()
            for part, by_rank in parts.items()
            for rank, states in enumerate(without_repetition(self._metrics[task].parts[part], by_rank))
            for key, tensor in flat(states).items()
        }

    def load(self, tensors: Mapping[str, Tensor], num_ranks: int) -> None:
        """Go on from a checkpoint of so many ranks: on as many each takes its own again, so that sums are to
        the bit those of a run that was never stopped; else rank 0 takes all."""
        self.begin_epoch()
        ranks = [self._world.rank] if num_ranks == self._world.size else range(num_ranks)
        if num_ranks != self._world.size and not self._world.is_main:
            return
        for name, metrics in self._metrics.items():
            for part, metric in metrics.parts.items():
                states = [
                    state for rank in ranks for state in _parts_of(metric, tensors, f"{name}/{part}/{rank}/")
                ]
                if num_ranks == self._world.size and states:
                    restore(metric, states.pop())
                self._earlier[name][part] = states


def _parts_of(metric: Metric, tensors: Mapping[str, Tensor], prefix: str) -> list[State]:
    return from_flat(
        metric, {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    )
