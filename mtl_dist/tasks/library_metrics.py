"""What torchmetrics' own metrics are handed, each in the form that it wants.

    Binary...        the probability of the positive class, and whether it is the class        (N,), (N,)
    Multiclass...    the classes' probabilities, and the class                                 (N, C), (N,)
    Multilabel...    the labels' probabilities, and which are there                            (N, L), (N, L)
    segmentation     one-hot masks, in which a pixel without a label is of no class        (B, C, H, W), twice
    regression       numbers in their unit                                                     (N,), (N,)

N are samples, or the pixels that have a label. Of maps a metric that asks for samples (`multidim_average:
samplewise`) gets (B, C, H W). Any other metric, and a user-defined one, sees `Task.metric_inputs`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from mtl_dist.errors import UserError
from mtl_dist.kinds.registry import kind_of
from mtl_dist.specs import IGNORE
from mtl_dist.tasks.multilabel import MultilabelTask
from mtl_dist.tasks.task import Task

Form: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From what `Task.metric_inputs` gives to what a metric wants."""
Family = Literal["Binary", "Multiclass", "Multilabel", "segmentation", "regression"]


def form_of(metric: Any, task: Task, where: str) -> Form:
    """The form of a metric for a task; `where` is the path of its settings.

    Raises:
        UserError: the metric is for another sort of task.
    """
    family = family_of(metric)
    of_numbers = bool(kind_of(task.info.kind).numbers(task.info))
    num_classes, is_multilabel = 0 if of_numbers else len(task.info.classes), isinstance(task, MultilabelTask)
    name = type(metric).__name__
    if family is None:
        return lambda seen, wanted: (seen, wanted)
    if family == "regression":
        if num_classes:
            raise UserError(f"{where}: expected a metric of classes, found {name}, one of numbers.")
        return _numbers
    if not num_classes or (family != "Binary" and is_multilabel != (family == "Multilabel")):
        fitting = "Multilabel" if is_multilabel else "Multiclass" if num_classes else "regression"
        raise UserError(f"{where}: expected a {fitting} metric for {task.info.kind}, found {name}.")
    if family == "Binary" and num_classes != (1 if is_multilabel else 2):
        raise UserError(
            f"{where}: expected a task of two classes for {name}, found one of {num_classes}. "
            f"Take {name.replace('Binary', 'Multilabel' if is_multilabel else 'Multiclass')}."
        )
    if is_multilabel:
        return _one_label if family == "Binary" else _labels
    positive = task.info.classes.index(task.decided_labels[0]) if task.decided_labels else 1
    whole = getattr(metric, "multidim_average", "global") == "samplewise"
    if family == "Binary":
        return lambda seen, wanted: _positive(*_classes(seen, wanted, whole), positive)
    if family == "Multiclass":
        return lambda seen, wanted: _classes(seen, wanted, whole)
    if getattr(metric, "input_format", "one-hot") != "one-hot":
        raise UserError(
            f"{where}.input_format: expected one-hot, in which a pixel without a label is of no class, found "
            f"{metric.input_format}. Remove it."
        )
    return _one_hot


def family_of(metric: Any) -> Family | None:
    """Which of torchmetrics' families a metric is of; None: of none, or user-defined."""
    for part in type(metric).__mro__:
        package = part.__module__.split(".")[:2]
        if package == ["torchmetrics", "classification"]:
            for family in ("Binary", "Multiclass", "Multilabel"):
                if part.__name__.startswith(family):
                    return family
        if package[0] == "torchmetrics" and package[-1] in ("segmentation", "regression"):
            return package[-1]  # type: ignore[return-value]
    return None


def _probabilities(seen: Tensor) -> Tensor:
    """Of exclusive classes (B, C, ...), also where one output stands for two."""
    if seen.shape[1] > 1:
        return seen.softmax(dim=1)
    of_second = seen.sigmoid()
    return torch.cat([1 - of_second, of_second], dim=1)


def _classes(seen: Tensor, wanted: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    probabilities = _probabilities(seen)
    if wanted.ndim == 1:
        return probabilities, wanted
    if whole:
        return probabilities.flatten(2), wanted.flatten(1)
    valid = wanted != IGNORE
    return probabilities.movedim(1, -1)[valid], wanted[valid]


def _positive(probabilities: Tensor, wanted: Tensor, positive: int) -> tuple[Tensor, Tensor]:
    is_positive = torch.where(wanted == IGNORE, wanted, (wanted == positive).long())
    return probabilities[:, positive], is_positive


def _labels(seen: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    return seen.sigmoid(), (wanted > 0.5).long()


def _one_label(seen: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    return seen[:, 0].sigmoid(), (wanted[:, 0] > 0.5).long()


def _one_hot(seen: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = _probabilities(seen)
    valid = wanted != IGNORE
    num_classes = probabilities.shape[1]
    masks = [
        torch.nn.functional.one_hot(torch.where(valid, classes, 0), num_classes).movedim(-1, 1)
        for classes in (probabilities.argmax(dim=1), wanted)
    ]
    return masks[0] * valid[:, None], masks[1] * valid[:, None]


def _numbers(seen: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    if wanted.ndim == 1:
        return seen, wanted
    valid = torch.isfinite(wanted)
    return seen[valid], wanted[valid]
