"""Losses of `torch.nn`, per sample: numerator and denominator of what their `reduction="mean"` is over all.

    cross entropy, NLL    the sum of w_y l over the labels that are not ignored; the sum of their w_y
    element-wise losses   the mean over a sample's numbers; 1. Of maps: the sum over the labelled pixels;
                          their number

They are handed outputs as they want them: NLLLoss logarithms of probabilities, BCELoss probabilities,
SoftMarginLoss labels of -1 and 1. So a class weight or an `ignore_index` means over ranks and micro-batches
what it means to torch in one batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import MapKind
from mtl_dist.kinds.registry import kind_of
from mtl_dist.specs import IGNORE, TaskInfo
from mtl_dist.tasks.loss import Loss

_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_OF_ONE_CLASS_EACH = (*_OF_CLASSES, nn.MultiMarginLoss)
_OF_YES_AND_NO = (nn.BCEWithLogitsLoss, nn.BCELoss, nn.SoftMarginLoss)
_OF_SOMETHING_ELSE = (nn.KLDivLoss, nn.HingeEmbeddingLoss, nn.MultiLabelMarginLoss)
"""These want targets that no task has (distributions, distances, lists of classes), and would take others."""


def build_library_loss(module: nn.Module, info: TaskInfo, where: str) -> Loss:
    """`module`, whose reduction is "none", as a loss of the task that the dataset knows as `info`.

    Raises:
        UserError: it is a loss of something else than a task's outputs and targets.
    """
    of_yes_and_no = isinstance(module, (*_OF_YES_AND_NO, nn.MultiLabelSoftMarginLoss))
    wants_more = isinstance(module, _OF_SOMETHING_ELSE) or any(True for _ in module.parameters())
    if wants_more or (of_yes_and_no and not info.classes):
        raise UserError(
            f"{where}.kind: expected a loss of outputs and targets, found {type(module).__name__}, which is "
            f"none of a task of {info.kind}."
        )
    for name, weights in list(module.named_buffers(recurse=False)):
        setattr(module, name, weights.float())  # [1, 5] in a recipe, whole numbers
    kind = kind_of(info.kind)
    is_map = isinstance(kind, MapKind)
    if is_map and len(info.classes) == 2 and isinstance(module, _OF_YES_AND_NO):
        return LibraryLoss(module, 1, is_map, of_foreground=True)
    num_outputs = len(info.classes) or (kind.channels if isinstance(kind, MapKind) else 0) or 1
    return LibraryLoss(module, num_outputs, is_map)


@dataclass(frozen=True, eq=False)
class LibraryLoss(Loss):
    """A loss of torch.nn; `of_foreground`: of one output, against whether a pixel is the foreground."""

    module: nn.Module
    size: int
    is_map: bool
    of_foreground: bool = False

    @property
    def num_outputs(self) -> int:
        return self.size

    def numerators(self, output: Tensor, target: Tensor) -> Tensor:
        valid = self._valid(target)
        losses = self._on(output.device)(*self._inputs(output, target, valid))
        if not self.is_map:
            return losses if losses.ndim == 1 else losses.flatten(1).mean(dim=1)
        valid = valid if losses.ndim == valid.ndim else valid[:, None]
        losses = torch.where(valid, losses, 0.0)
        return (losses if losses.ndim == 3 else losses.mean(dim=1)).sum(dim=(1, 2))

    def denominators(self, target: Tensor) -> Tensor:
        if not isinstance(self.module, _OF_CLASSES) or target.is_floating_point():
            if not self.is_map:
                return target.new_ones(len(target), dtype=torch.float32)
            valid = self._valid(target)
            valid = valid if valid.ndim == 3 else valid.all(dim=1)
            return valid.sum(dim=(1, 2), dtype=torch.float32)
        counted = self._valid(target) & (target != self.module.ignore_index)
        classes = torch.where(counted, target, 0).long()
        weights_C = self.module.weight
        weights = torch.ones_like(classes, dtype=torch.float32)
        if weights_C is not None:
            weights = weights_C.to(target.device, non_blocking=True).float()[classes]
        weights = torch.where(counted, weights, 0.0)
        return weights.flatten(1).sum(dim=1) if self.is_map else weights

    def _valid(self, target: Tensor) -> Tensor:
        if not self.is_map:
            return torch.ones_like(target, dtype=torch.bool)
        return torch.isfinite(target) if target.is_floating_point() else target != IGNORE

    def _inputs(self, output: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and targets in one shape, without what there is no label of."""
        if self.is_map:
            target = torch.where(valid, target, 0)
        if self.of_foreground:
            target = (target == 1).float()
        elif not target.is_floating_point():
            if not isinstance(self.module, _OF_ONE_CLASS_EACH):
                raise TypeError("it compares numbers, and the targets are classes")
            is_log = isinstance(self.module, nn.NLLLoss)
            return output.log_softmax(dim=1) if is_log else output, target.long()
        if output.ndim == target.ndim + 1 and output.shape[1] == 1:
            output = output.squeeze(1)
        if output.shape != target.shape:
            raise ValueError(f"outputs are {tuple(output.shape)}, targets {tuple(target.shape)}")
        if isinstance(self.module, nn.BCELoss):
            output = output.sigmoid()
        return output, 2 * target - 1 if isinstance(self.module, nn.SoftMarginLoss) else target

    def _on(self, device: torch.device) -> nn.Module:
        """The module with its weights where the outputs are."""
        return self.module.to(device)
