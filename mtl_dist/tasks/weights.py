"""Class weights of the losses: given, or balanced by the training split's counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field

from mtl_dist.errors import UserError
from mtl_dist.lazy import torch
from mtl_dist.specs import TaskInfo

if TYPE_CHECKING:
    from torch import Tensor

ClassWeights: TypeAlias = tuple[Annotated[float, Field(ge=0)], ...] | Literal["balanced"] | None
"""One weight per class in the dataset's order, `balanced`, or null for none."""


def class_weights(setting: ClassWeights, info: TaskInfo, where: str) -> Tensor | None:
    """The weights (C,) of a loss over exclusive classes.

    Balanced weights are N / (K n_c), for N labels in K classes that occur: a label's mean weight is 1 and
    every class that occurs weighs the same in total. A class that does not occur has weight 1, and so has
    every class of a task without labels.

    Raises:
        UserError: a wrong number of weights, all of them 0, or nothing to balance by.
    """
    if setting is None:
        return None
    if setting != "balanced":
        return _given(setting, info, where)
    counts_C = _counts(info, where)
    weights_C = counts_C.sum() / ((counts_C > 0).sum() * counts_C)
    return torch.where(counts_C > 0, weights_C, 1.0).float()


def positive_weights(setting: ClassWeights, info: TaskInfo, where: str) -> Tensor | None:
    """The weights (C,) of the positives of each label in a binary loss.

    Balanced weights are negatives / positives, so that both weigh the same in total. A label that is always
    or never present, and every label of a task without labels, has weight 1.

    Raises:
        UserError: a wrong number of weights, all of them 0, or nothing to balance by.
    """
    if setting is None:
        return None
    if setting != "balanced":
        return _given(setting, info, where)
    positives_C = _counts(info, where)
    negatives_C = info.num_labelled - positives_C
    return torch.where((positives_C > 0) & (negatives_C > 0), negatives_C / positives_C, 1.0).float()


def _given(weights: tuple[float, ...], info: TaskInfo, where: str) -> Tensor:
    if len(weights) != len(info.classes):
        raise UserError(
            f"{where}: expected {len(info.classes)} weights, one for each of {', '.join(info.classes)}, "
            f"found {len(weights)}. Give one weight per class in this order, or 'balanced'."
        )
    if not any(weights):
        raise UserError(f"{where}: expected a weight > 0, found only 0. Remove the task to switch it off.")
    return torch.tensor(weights, dtype=torch.float32)


def _counts(info: TaskInfo, where: str) -> Tensor:
    if info.num_labelled == 0:
        return torch.zeros(len(info.classes), dtype=torch.float64)
    if len(info.class_counts) != len(info.classes):
        raise UserError(
            f"{where}: expected label counts of {len(info.classes)} classes in the dataset, "
            f"found {len(info.class_counts)} counts. Give the weights as a list."
        )
    return torch.tensor(info.class_counts, dtype=torch.float64)
