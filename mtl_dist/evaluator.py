"""Evaluation: every sample of a split once, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from mtl_dist.batch import Batch
from mtl_dist.data.device_prefetch import device_prefetch
from mtl_dist.engine.world import World
from mtl_dist.step import RootModule
from mtl_dist.tasks.metrics import mean_accuracy

_VALUES_HELD = 1 << 25
"""Values of outputs in their maps' own size that are held at once, where one sample alone has not more."""


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one split.

    `loss` is the weighted sum of the tasks' mean losses; a task without a label in the split has no entry in
    `tasks` beyond `num_samples` 0. `confusion` holds (C, C) counts, rows true, columns predicted.
    `thresholds` are those that were chosen from this split, by task and label.
    """

    loss: float
    tasks: dict[str, dict[str, float]]
    confusion: dict[str, np.ndarray]
    num_samples: int
    thresholds: dict[str, dict[str, float]] = field(default_factory=dict)

    def flat(self, split: str) -> dict[str, float]:
        """The metrics by path, as in `val/digit/accuracy`; `val/mean_accuracy` is over the tasks with one."""
        metrics = {f"{split}/loss": self.loss} | mean_accuracy(split, self.tasks)
        for task, values in self.tasks.items():
            metrics |= {f"{split}/{task}/{name}": value for name, value in values.items()}
        return metrics


@torch.no_grad()
def evaluate(root: RootModule, loader: Iterable[Batch], world: World, choosing: bool = False) -> Evaluation:
    """Run the model over a split and compute loss and metrics of each task.

    `loader` yields this rank's part, padded with invalid samples to equally many batches on every rank.
    Losses are at the model's size, the metrics of maps at their own where a batch holds them so.
    The same metrics come back on every rank. With `choosing` the thresholds that a recipe leaves to the
    validation split are chosen from this one.
    """
    # torchmetrics takes seconds to import.
    from mtl_dist.tasks.user_metrics import AllMetrics

    was_training = root.training
    root.eval()
    accumulators = {
        name: AllMetrics(task, world.gather, choosing=choosing).to(world.device)
        for name, task in root.tasks.items()
    }
    num_tasks = len(root.tasks)
    sums_T = torch.zeros(num_tasks, dtype=torch.float64)
    counts_T = torch.zeros(num_tasks, dtype=torch.float64)
    num_samples = torch.zeros(1, dtype=torch.float64)
    for host_batch, batch in device_prefetch(loader, world.device):
        outputs = root.predict(batch.images_BCHW)
        sums_T += root.loss_sums(outputs, batch).double().cpu()
        num_samples += host_batch.valid_B.sum()
        for t, (name, task) in enumerate(root.tasks.items()):
            target, labelled_B = batch.targets[name], batch.labelled[name]
            counts_T[t] += task.count(host_batch.targets[name], host_batch.labelled[name]).double()
            if name in batch.whole:
                pairs = batch.whole[name].beside(outputs[name], _VALUES_HELD)
                for rows, output, maps in pairs:
                    accumulators[name].update(output, maps, labelled_B[rows])
            else:
                accumulators[name].update(outputs[name], target, labelled_B)
    root.train(was_training)

    totals = world.sum(torch.cat([sums_T, counts_T, num_samples]))
    sums_T, counts_T = totals[:num_tasks], totals[num_tasks : 2 * num_tasks]
    metrics: dict[str, dict[str, float]] = {}
    confusion = {}
    thresholds: dict[str, dict[str, float]] = {}
    loss = 0.0
    for t, name in enumerate(root.tasks):
        metrics[name] = accumulators[name].compute()
        if counts_T[t] > 0:
            task_loss = float(sums_T[t] / counts_T[t])
            metrics[name] = {"loss": task_loss, **metrics[name]}
            loss += root.task_weights[name] * task_loss
        chosen = accumulators[name].chosen_thresholds()
        if chosen:
            thresholds[name] = dict(zip(root.tasks[name].decided_labels, chosen, strict=True))
        matrix = accumulators[name].confusion_matrix()
        if matrix is not None:
            confusion[name] = matrix
    return Evaluation(loss, metrics, confusion, int(totals[-1]), thresholds)
