"""Evaluation: every sample of a split once, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mtl_dist.batch import Batch, Outputs
from mtl_dist.data.device_prefetch import device_prefetch
from mtl_dist.engine.world import World
from mtl_dist.heartbeat import beat
from mtl_dist.sample_rows import SampleRows
from mtl_dist.step import RootModule, count_labels
from mtl_dist.tasks.metrics import mean_accuracy
from mtl_dist.tasks.task import Task
from mtl_dist.tasks.temperature import Calibrated
from mtl_dist.tasks.user_metrics import AllMetrics

_VALUES_HELD = 1 << 25
"""Values of outputs in their maps' own size that are held at once, where one sample alone has not more."""


@dataclass(frozen=True)
class BaselineMetrics:
    """What a constant answer reaches: its name ("majority", "mean"), and its metrics."""

    name: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one split.

    `loss` is the weighted sum of the tasks' mean losses and of the joint ones, which are among `tasks`; a
    task without a label in the split has no entry in `tasks` beyond `num_samples` 0. `confusion` holds (C, C)
    counts, rows true, columns predicted. `thresholds` are those that were chosen from this split, by task and
    label. `baselines` are the metrics of each task's constant answer on this split. `per_class` holds the
    metrics of each class, by task and class. `calibrated` are the probabilities of tasks at a temperature.
    """

    loss: float
    tasks: dict[str, dict[str, float]]
    confusion: dict[str, np.ndarray]
    num_samples: int
    thresholds: dict[str, dict[str, float]] = field(default_factory=dict)
    baselines: dict[str, BaselineMetrics] = field(default_factory=dict)
    per_class: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    calibrated: dict[str, Calibrated] = field(default_factory=dict)

    def add(self, task: Task, metrics: AllMetrics, loss: float | None) -> None:
        """Collective: take up what was measured of a task, and its mean loss if it has a label."""
        name = task.name
        values = metrics.compute()
        self.tasks[name] = values if loss is None else {"loss": loss, **values}
        chosen, of_classes = metrics.chosen_thresholds(), metrics.per_class()
        if chosen:
            self.thresholds[name] = dict(zip(task.decided_labels, chosen, strict=True))
        if of_classes:
            self.per_class[name] = dict(zip(task.parts, of_classes, strict=True))
        matrix, at_temperature = metrics.confusion_matrix(), metrics.calibrated()
        if matrix is not None:
            self.confusion[name] = matrix
        if at_temperature is not None:
            self.calibrated[name] = at_temperature

    def flat(self, split: str) -> dict[str, float]:
        """The metrics by path, as in `val/digit/accuracy`; `val/mean_accuracy` is over the tasks with one."""
        metrics = {f"{split}/loss": self.loss} | mean_accuracy(split, self.tasks)
        for task, values in self.tasks.items():
            metrics |= {f"{split}/{task}/{name}": value for name, value in values.items()}
        return metrics


@torch.no_grad()
def evaluate(
    root: RootModule,
    loader: Iterable[Batch],
    world: World,
    choosing: bool = False,
    rows: SampleRows | None = None,
    with_baselines: bool = False,
    temperatures: Mapping[str, float | None] | None = None,
) -> Evaluation:
    """Run the model over a split and compute loss and metrics of each task.

    `loader` yields this rank's part, padded with invalid samples to equally many batches on every rank.
    Losses are at the model's size, the metrics of maps at their own where a batch holds them so.
    The same metrics come back on every rank. With `choosing` the thresholds that a recipe leaves to the
    validation split are chosen from this one. With `temperatures` the probabilities of these tasks are
    measured at theirs as well; None is that which fits this split. `rows` are told of every sample;
    `with_baselines` the constant answers are measured as well.
    """
    was_training = root.training
    root.eval()
    measured = {
        name: AllMetrics(task, world.gather, choosing=choosing).to(world.device)
        for name, task in root.tasks.items()
    }
    for name, temperature in (temperatures or {}).items():
        measured[name].calibrate(temperature)
    losses = _Losses(root)
    baselines = _Baselines(root, world) if with_baselines else None
    for host_batch, batch in device_prefetch(loader, world.device):
        outputs = root.predict(batch.images_BCHW)
        losses.update(outputs, host_batch, batch)
        if rows is not None:
            rows.begin(host_batch)
        for name, task in root.tasks.items():
            output = outputs[name]
            if rows is not None:
                rows.losses(name, task.sample_losses(output, batch.targets[name], batch.labelled[name]))
            for part in _measured(batch, name, output, every_sample=rows is not None):
                measured[name].update(part.output, part.target, part.labelled_B)
                if baselines is not None:
                    baselines.update(name, part)
                if rows is not None:
                    rows.answers(name, part.rows, part.output, part.target, part.labelled_B.tolist())
        if rows is not None:
            rows.end()
    root.train(was_training)

    beat("the metrics", slow=True)
    loss, means, num_samples = losses.over_ranks(world)
    evaluation = Evaluation(loss, {}, {}, num_samples)
    for name, metrics in measured.items():
        beat(f"the metrics of {name}", slow=True)
        evaluation.add(root.tasks[name], metrics, means.pop(name, None))
    evaluation.tasks.update({joint: {"loss": mean} for joint, mean in means.items()})
    if baselines is not None:
        evaluation.baselines.update(baselines.compute())
    return evaluation


class _Losses:
    """The sums of all losses over a split, and how many labels each is of."""

    def __init__(self, root: RootModule) -> None:
        self._root = root
        self._sums_T = torch.zeros(len(root.terms), dtype=torch.float64)
        self._counts_T = torch.zeros(len(root.terms), dtype=torch.float64)
        self._num_samples = torch.zeros(1, dtype=torch.float64)

    def update(self, outputs: Outputs, host_batch: Batch, batch: Batch) -> None:
        """Count a batch; what is counted on the host waits for no device."""
        self._sums_T += self._root.loss_sums(outputs, batch).double().cpu()
        self._counts_T += count_labels(self._root.tasks, [host_batch], self._root.joints)
        self._num_samples += host_batch.valid_B.sum()

    def over_ranks(self, world: World) -> tuple[float, dict[str, float], int]:
        """Collective: the weighted sum of the mean losses, these by their names, those without a label left
        out, and the number of samples."""
        num_terms = len(self._sums_T)
        totals = world.sum(torch.cat([self._sums_T, self._counts_T, self._num_samples]))
        terms = zip(self._root.term_weights, totals[:num_terms], totals[num_terms:-1], strict=True)
        means = {name: float(total / num) for name, total, num in terms if num > 0}
        loss = sum((self._root.term_weights[name] * mean for name, mean in means.items()), 0.0)
        return loss, means, int(totals[-1])


@dataclass(frozen=True)
class _Part:
    """Some samples of a batch, by their rows, as a task is measured on them."""

    rows: list[int]
    output: Tensor
    target: Tensor
    labelled_B: Tensor


def _measured(batch: Batch, task: str, output: Tensor, every_sample: bool) -> Iterator[_Part]:
    """The samples of a batch, maps in their own size where the batch holds them so; those have a label. With
    `every_sample` the others follow, in the model's."""
    labelled_B = batch.labelled[task]
    if task not in batch.whole:
        yield _Part(list(range(len(batch))), output, batch.targets[task], labelled_B)
        return
    left = set(range(len(batch)))
    for rows, own, maps in batch.whole[task].beside(output, _VALUES_HELD):
        left -= set(rows)
        yield _Part(rows, own, maps, labelled_B[rows])
    if every_sample and left:
        rest = sorted(left)
        yield _Part(rest, output[rest], batch.targets[task][rest], torch.zeros_like(labelled_B[rest]))


class _Baselines:
    """The metrics of the tasks' constant answers; those of an order without keeping what ties."""

    def __init__(self, root: RootModule, world: World) -> None:
        self._tasks = root.tasks
        self._answers: dict[str, tuple[str, Tensor, AllMetrics]] = {}
        for name, task in root.tasks.items():
            baseline = task.baseline()
            if baseline is not None:
                metrics = AllMetrics(task, world.gather, ranking=False, added=False).to(world.device)
                self._answers[name] = baseline.name, baseline.output_C.to(world.device).float(), metrics

    def update(self, task: str, part: _Part) -> None:
        if task in self._answers:
            _, output_C, metrics = self._answers[task]
            if output_C.dim() == 1:
                single = output_C.view(1, -1, *[1] * (part.output.dim() - 2)).expand_as(part.output)
            else:
                single = output_C.expand(len(part.output), *output_C.shape)
            metrics.update(single, part.target, part.labelled_B)

    def compute(self) -> dict[str, BaselineMetrics]:
        """Collective: over all ranks."""
        found = {}
        for task, (name, _, metrics) in self._answers.items():
            beat(f"the metrics of a constant answer for {task}", slow=True)
            values, supports = metrics.compute(), [row.get("support", 0.0) for row in metrics.per_class()]
            num_samples = values.get("num_samples", 0.0)
            if num_samples > 0:
                values |= self._tasks[task].of_ties(supports, num_samples)
            found[task] = BaselineMetrics(name, values)
        return found
