"""The metrics of each kind of task, as torchmetrics metrics whose states are counts and sums.

Everything that can be computed from a confusion matrix or from a few sums is: memory is constant, and merging
ranks is an exact addition. Only the metrics of an order (AUROC, mean average precision) keep every sample's
scores, and `ranking=False` leaves those out.

`update` never waits for the device: unlabelled samples are masked, not selected.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from mtl_dist.specs import IGNORE
from mtl_dist.tasks.maps import predicted_classes, resized
from mtl_dist.tasks.ranking import auroc, average_precision

UNLABELLED = -1


class Accumulator(Metric):
    """What the metrics of all kinds share: `TaskMetrics` on the ground of torchmetrics.

    torchmetrics gathers list states by the shape of what a rank holds, so a rank without samples breaks or
    stalls the others. Every list therefore starts with an empty tensor of the right shape and dtype.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self) -> None:
        super().__init__()
        self._empties: dict[str, Tensor] = {}
        self._confusion: np.ndarray | None = None

    @property
    def update_called(self) -> bool:
        """True: a split without a sample has metrics too, all NaN, and torchmetrics need not warn of it."""
        return True

    def add_list(self, name: str, empty: Tensor) -> None:
        """Add a list state of tensors like `empty`, which has no row."""
        self.add_state(name, [], dist_reduce_fx="cat")
        self._empties[name] = empty
        getattr(self, name).append(empty.to(self.device))

    def reset(self) -> None:
        super().reset()
        for name, empty in self._empties.items():
            getattr(self, name).append(empty.to(self.device))

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The metrics; torchmetrics has merged the ranks' states before."""

    def confusion_matrix(self) -> np.ndarray | None:
        """The counts over all ranks, as `compute` saw them."""
        self.compute()
        return self._confusion


class ClassificationMetrics(Accumulator):
    """Accuracy and its kin for one class per sample.

    balanced_accuracy is the mean recall of the classes that occur; precision, recall and f1 are means over
    the classes that occur or are predicted, where a class never predicted has precision 0 and a class that
    does not occur has recall 0 (scikit-learn's macro averages). auroc is the mean, over the classes that
    occur beside others, of one class against the rest.

    With `ranking` it keeps 4 bytes per sample and class (per sample for two classes) on each rank, and those
    of all ranks on each while it computes: 50,000 samples of 1,000 classes are 200 MB.
    """

    confusion: Tensor
    scores: list[Tensor]
    truths: list[Tensor]

    def __init__(self, num_classes: int, ranking: bool) -> None:
        super().__init__()
        self._num_classes = num_classes
        self._ranking = ranking
        # Of two classes one's scores say all.
        self._first_ranked = 1 if num_classes == 2 else 0
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), "sum")
        if ranking:
            self.add_list("scores", torch.empty(0, num_classes - self._first_ranked))
            self.add_list("truths", torch.empty(0, dtype=torch.int64))

    def update(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        """Count logits (B, C) against classes (B,)."""
        self.confusion += count_pairs(
            target[None], output.argmax(dim=1)[None], labelled_B[None], self._num_classes
        )
        if self._ranking:
            # Logarithms of probabilities, from float64: in float32 all confident ones round to 1 and tie.
            scores_BC = output.double().log_softmax(dim=1).float()
            self.scores.append(scores_BC[:, self._first_ranked :])
            self.truths.append(torch.where(labelled_B, target, UNLABELLED))

    def compute(self) -> dict[str, float]:
        self._confusion = self.confusion.cpu().numpy().copy()
        hits_C, true_C, predicted_C = _margins(self.confusion)
        occurs_C, seen_C = true_C > 0, true_C + predicted_C > 0
        recall_C = hits_C / true_C.clamp(min=1)
        values = {
            "accuracy": _ratio(hits_C.sum(), true_C.sum()),
            "balanced_accuracy": _mean(recall_C, occurs_C),
            "precision": _mean(hits_C / predicted_C.clamp(min=1), seen_C),
            "recall": _mean(recall_C, seen_C),
            "f1": _mean(2 * hits_C / (true_C + predicted_C).clamp(min=1), seen_C),
        }
        if self._ranking:
            truth_N = dim_zero_cat(self.truths)
            labelled_N = truth_N != UNLABELLED
            truth_N, scores_NC = truth_N[labelled_N], dim_zero_cat(self.scores)[labelled_N]
            values["auroc"] = _defined_mean(
                [auroc(scores_N, truth_N == c) for c, scores_N in enumerate(scores_NC.T, self._first_ranked)]
            )
        return values | {"num_samples": float(true_C.sum())}


class MultilabelMetrics(Accumulator):
    """Accuracy and its kin for several labels per sample, each decided at a probability of 0.5.

    accuracy is the share of right decisions, one per sample and class (Hamming); precision, recall and f1 are
    means over the classes that occur or are predicted; auroc over the classes that occur in some samples and
    not in others; mean_average_precision over the classes that occur.

    With `ranking` it keeps 5 bytes per sample and class on each rank, and those of all ranks while it
    computes.
    """

    counts: Tensor
    scores: list[Tensor]
    truths: list[Tensor]

    def __init__(self, num_classes: int, ranking: bool) -> None:
        super().__init__()
        self._ranking = ranking
        self.add_state("counts", torch.zeros(4, num_classes, dtype=torch.int64), "sum")
        if ranking:
            self.add_list("scores", torch.empty(0, num_classes))
            self.add_list("truths", torch.empty(0, num_classes, dtype=torch.int8))

    def update(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        """Count logits (B, C) against labels (B, C) of 0 and 1."""
        counted_BC = labelled_B[:, None].expand_as(target)
        true_BC, predicted_BC = (target > 0.5) & counted_BC, (output > 0) & counted_BC
        counts = [true_BC & predicted_BC, true_BC, predicted_BC, counted_BC]
        self.counts += torch.stack([count.sum(dim=0) for count in counts])
        if self._ranking:
            self.scores.append(output.detach().float())
            self.truths.append(torch.where(counted_BC, true_BC.to(torch.int8), UNLABELLED))

    def compute(self) -> dict[str, float]:
        hits_C, true_C, predicted_C, counted_C = self.counts.double()
        seen_C = true_C + predicted_C > 0
        wrong_C = true_C + predicted_C - 2 * hits_C
        values = {
            "accuracy": _ratio((counted_C - wrong_C).sum(), counted_C.sum()),
            "precision": _mean(hits_C / predicted_C.clamp(min=1), seen_C),
            "recall": _mean(hits_C / true_C.clamp(min=1), seen_C),
            "f1": _mean(2 * hits_C / (true_C + predicted_C).clamp(min=1), seen_C),
        }
        if self._ranking:
            truth_NC = dim_zero_cat(self.truths)
            labelled_N = truth_NC[:, 0] != UNLABELLED
            columns = list(zip(dim_zero_cat(self.scores)[labelled_N].T, truth_NC[labelled_N].T, strict=True))
            values["auroc"] = _defined_mean([auroc(*column) for column in columns])
            values["mean_average_precision"] = _defined_mean(
                [average_precision(*column) for column in columns]
            )
        return values | {"num_samples": float(counted_C[0])}


class RegressionMetrics(Accumulator):
    """Errors in the target's own unit, from float64 sums.

    r2 is 1 - (squared error) / (squared deviation from the mean of the split's targets), NaN where the
    targets do not vary. torchmetrics' own sums targets in float32, which cancels when their mean is far from
    0, and takes every squared error below 1e-4 for none.
    """

    sums: Tensor

    def __init__(self, mean: float, scale: float) -> None:
        super().__init__()
        self._mean = mean
        self._scale = scale
        self.add_state("sums", torch.zeros(5, dtype=torch.float64), "sum")

    def update(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        """Count standardised outputs (B, 1) against targets (B,) in their unit."""
        centred_B = target.double() - self._mean
        error_B = output.double().squeeze(1) * self._scale - centred_B
        terms_5B = torch.stack(
            [torch.ones_like(error_B), error_B.abs(), error_B.square(), centred_B, centred_B.square()]
        )
        self.sums += torch.where(labelled_B, terms_5B, 0.0).sum(dim=1)

    def compute(self) -> dict[str, float]:
        num, absolute, squared, total, total_squared = self.sums.tolist()
        if num == 0:
            return dict.fromkeys(("mae", "rmse", "mse", "r2"), math.nan) | {"num_samples": 0.0}
        deviation = total_squared - total * total / num
        # What remains below is the rounding of the subtraction, not a deviation.
        varies = num >= 2 and deviation > 1e-12 * total_squared
        return {
            "mae": absolute / num,
            "rmse": math.sqrt(squared / num),
            "mse": squared / num,
            "r2": 1 - squared / deviation if varies else math.nan,
            "num_samples": num,
        }


class SegmentationMetrics(Accumulator):
    """Overlap of masks, counted in pixels over the whole split.

    dice and iou are those of each class's pixels in the whole split together (not the mean of each image's),
    averaged over the foreground classes: all but class 0, the background. A class without a pixel, true or
    predicted, is left out. pixel_accuracy counts all classes. Pixels marked 255 do not exist. In evaluation
    masks come in their own size, unless the view crops them.
    """

    confusion: Tensor
    num_samples: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self._num_classes = num_classes
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), "sum")
        self.add_state("num_samples", torch.zeros((), dtype=torch.int64), "sum")

    def update(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        """Count logits (B, C, h, w) against masks (B, H, W)."""
        predicted_BHW = predicted_classes(resized(output, target.shape[-2:]))
        valid_BN = ((target != IGNORE) & labelled_B[:, None, None]).flatten(1)
        self.confusion += count_pairs(
            target.flatten(1).long(), predicted_BHW.flatten(1), valid_BN, self._num_classes
        )
        self.num_samples += labelled_B.sum()

    def compute(self) -> dict[str, float]:
        self._confusion = self.confusion.cpu().numpy().copy()
        hits_C, true_C, predicted_C = _margins(self.confusion)
        both_C = true_C + predicted_C
        seen_C = (both_C > 0)[1:]
        return {
            "dice": _mean((2 * hits_C / both_C.clamp(min=1))[1:], seen_C),
            "iou": _mean((hits_C / (both_C - hits_C).clamp(min=1))[1:], seen_C),
            "pixel_accuracy": _ratio(hits_C.sum(), true_C.sum()),
            "num_samples": float(self.num_samples),
        }


def count_pairs(truth_BN: Tensor, predicted_BN: Tensor, valid_BN: Tensor, num_classes: int) -> Tensor:
    """How often each (true, predicted) pair of classes occurs among the valid entries: int64 (C, C).

    Each row of the batch has a histogram of its own, so that a device's threads seldom wait to add to the
    same address: give pixels by sample, and a batch of single classes as one row.
    """
    num_rows = truth_BN.shape[0]
    num_cells = num_classes * num_classes + 1
    cells_BN = torch.where(valid_BN, truth_BN * num_classes + predicted_BN, num_cells - 1)
    cells_BN = cells_BN + num_cells * torch.arange(num_rows, device=cells_BN.device)[:, None]
    counts = cells_BN.new_zeros(num_rows * num_cells)
    counts.scatter_add_(0, cells_BN.flatten(), counts.new_ones(1).expand(cells_BN.numel()))
    return counts.view(num_rows, num_cells)[:, :-1].sum(dim=0).view(num_classes, num_classes)


def _margins(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per class: right, true and predicted counts, as float64."""
    return confusion.diagonal().double(), confusion.sum(dim=1).double(), confusion.sum(dim=0).double()


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole > 0 else math.nan


def _mean(values_C: Tensor, counted_C: Tensor) -> float:
    return float(values_C[counted_C].mean()) if bool(counted_C.any()) else math.nan


def _defined_mean(values: list[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan
