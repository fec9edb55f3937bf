"""What the losses know of how frequent classes are: weights and priors, from the training split's counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field

from mtl_dist.errors import UserError
from mtl_dist.lazy import torch
from mtl_dist.specs import TaskInfo

if TYPE_CHECKING:
    from torch import Tensor

PositiveWeights: TypeAlias = tuple[Annotated[float, Field(ge=0)], ...] | Literal["balanced"] | None
"""One weight per class in the dataset's order, `balanced`, or null for none."""
ClassWeights: TypeAlias = PositiveWeights | Literal["effective"]
"""The same, or `effective`: by the effective numbers of labels."""
Beta: TypeAlias = Annotated[float, Field(ge=0, lt=1)] | None
"""Of effective class weights: 0 weighs all classes the same, 1 would weigh them as `balanced` does."""
LogitAdjustment: TypeAlias = bool | Annotated[float, Field(gt=0)]
"""Whether logits are adjusted by the classes' log-priors in the loss, or their factor tau (true: 1)."""


def class_weights(
    setting: ClassWeights, info: TaskInfo, where: str, beta: Beta = None, default: float | None = None
) -> Tensor | None:
    """The weights (C,) of a loss over exclusive classes; `where` is the path of the loss's settings.

    Balanced weights are N / (K n_c), for N labels in K classes that occur: a label's mean weight is 1 and
    every class that occurs weighs the same in total. Effective ones are proportional to
    (1 - beta) / (1 - beta^n_c) (https://arxiv.org/abs/1901.05555), with mean weight 1 too; beta is `default`
    where none is stated. A class that does not occur has weight 1, and so has every class of a task without
    labels.

    Raises:
        UserError: a wrong number of weights, all of them 0, nothing to balance by, a beta for other weights,
            or none where there is no default.
    """
    if beta is not None and setting != "effective":
        raise UserError(
            f"{where}.beta: expected class_weights: effective, which it is of, found {setting or 'none'}. "
            "Remove it, or set these."
        )
    where = f"{where}.class_weights"
    if setting is None:
        return None
    if not isinstance(setting, str):
        return _given(setting, info, where)
    counts_C = _counts(info, where)
    if setting == "balanced":
        shares_C = 1 / counts_C
    else:
        beta = default if beta is None else beta
        if beta is None:
            raise UserError(
                f"{where}: expected a beta beside effective, where pixels are counted, found none. "
                "State one near 1 - 1 / (pixels of a rare class), such as beta: 0.999999."
            )
        log_beta = torch.tensor(beta, dtype=torch.float64).log()
        shares_C = -1 / torch.expm1(log_beta * counts_C)
    occurs_C = counts_C > 0
    total = torch.where(occurs_C, counts_C * shares_C, 0.0).sum()
    return torch.where(occurs_C, shares_C * counts_C.sum() / total, 1.0).float()


def adjustments(setting: LogitAdjustment, info: TaskInfo, where: str) -> Tensor | None:
    """What is added to logits (C,) in the loss: tau log(n_c / N) (https://arxiv.org/abs/2007.07314).

    A class without a label in the training split counts as if it had one; without any label nothing is
    added.

    Raises:
        UserError: it is not known how many labels each class has.
    """
    if setting is False:
        return None
    counts_C = _counts(info, where).clamp(min=1)
    return (float(setting) * (counts_C / counts_C.sum()).log()).float() if info.num_labelled else None


def positive_weights(setting: PositiveWeights, info: TaskInfo, where: str) -> Tensor | None:
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
