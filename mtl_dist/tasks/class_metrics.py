"""The metrics of classes, one or several for a sample or one for a pixel; their states are counts and sums.

Everything that can be computed from a confusion matrix or from a few sums is: memory is constant, and merging
ranks is an exact addition. Only the metrics of an order (AUROC, mean average precision) keep every sample's
scores, and `ranking=False` leaves those out.

`count` never waits for the device: unlabelled samples are masked, not selected.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from mtl_dist.specs import IGNORE
from mtl_dist.tasks.accumulator import Accumulator, joined
from mtl_dist.tasks.maps import predicted_classes, resized
from mtl_dist.tasks.ranking import auroc, average_precision
from mtl_dist.tasks.temperature import NUM_BINS, Scores, calibrated
from mtl_dist.tasks.thresholds import Decision, Rule, choose, log_odds

UNLABELLED = -1


class ClassificationMetrics(Accumulator):
    """Accuracy and its kin for one class per sample.

    Of two classes precision, recall, specificity, f1 and average_precision are those of the positive one,
    which is decided above the task's threshold. balanced_accuracy is the mean recall of the classes that
    occur; macro_precision, macro_recall and macro_f1 are means over the classes that occur or are predicted,
    where a class never predicted has precision 0 and a class that does not occur has recall 0 (scikit-learn's
    macro averages). Their micro averages are over all decisions together: with one class per sample all
    three are the accuracy. auroc is the mean, over the classes that occur beside others, of one class against
    the rest. top_k_accuracy, with a `top_k`, counts a label as right that is among so many likeliest classes,
    of equally likely ones the first; ece and brier are of the probabilities, whatever the threshold.

    With `ranking` it keeps 4 bytes per sample and class (per sample for two classes) on each rank, and those
    of all ranks on each while it computes: 50,000 samples of 1,000 classes are 200 MB. With a `rule` the
    threshold is chosen from them.
    """

    confusion: Tensor
    in_top_k: Tensor
    bins: Tensor
    squares: Tensor
    scores: list[Tensor]
    truths: list[Tensor]

    def __init__(
        self, decision: Decision, ranking: bool, rule: Rule | None = None, top_k: int | None = None
    ) -> None:
        super().__init__()
        self._top_k = top_k
        self._decision = decision
        self._num_classes = decision.num_classes
        self._ranking = ranking
        self._rule = rule if decision.positive is not None else None
        self.add_sum("confusion", torch.zeros(self._num_classes, self._num_classes, dtype=torch.int64))
        if top_k is not None:
            self.add_sum("in_top_k", torch.zeros((), dtype=torch.int64))
        self.add_sum("bins", torch.zeros(2, NUM_BINS, dtype=torch.float64))
        self.add_sum("squares", torch.zeros((), dtype=torch.float64))
        if ranking:
            # Of two classes one's scores say all.
            self.add_list("scores", torch.empty(0, self._num_classes if decision.positive is None else 1))
            self.add_list("truths", torch.empty(0, dtype=torch.int64))

    def count(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        """Count logits (B, C) against classes (B,)."""
        predicted_B = self._decision.classes(output)
        self.confusion += count_pairs(target[None], predicted_B[None], labelled_B[None], self._num_classes)
        safe_B = torch.where(labelled_B, target, 0)
        if self._top_k is not None:
            self.in_top_k += (labelled_B & (_ranks(output, safe_B) < self._top_k)).sum()
        p_BC = summable(output.detach().double().softmax(dim=1))
        top_B, likeliest_B = p_BC.max(dim=1)
        self.bins += binned(top_B, likeliest_B == safe_B, labelled_B)
        # (p_c - t_c)^2 over the classes, as it is without a one-hot target.
        squares_B = summable(p_BC.square().sum(dim=1) + 1 - 2 * p_BC.gather(1, safe_B[:, None])[:, 0])
        self.squares += torch.where(labelled_B, squares_B, 0.0).sum()
        if self._ranking:
            # From float64: in float32 the probabilities of all confident ones round to 1 and tie.
            if self._decision.positive is None:
                self.scores.append(output.double().log_softmax(dim=1).float())
            else:
                self.scores.append(self._decision.log_odds(output)[:, None].float())
            self.truths.append(torch.where(labelled_B, target, UNLABELLED))

    def metrics(self) -> dict[str, float]:
        positive, confusion = self._decision.positive, self.confusion
        if self._ranking:
            truth_N = joined(self.truths)
            labelled_N = truth_N != UNLABELLED
            truth_N, scores_NC = truth_N[labelled_N], joined(self.scores)[labelled_N]
            if self._calibrates:
                scores = Scores(scores_NC, truth_N)
                if positive is not None:
                    scores = Scores.of_two(scores_NC[:, 0], truth_N == positive)
                self._calibrated = calibrated(scores, self._temperature)
            if self._rule is not None and positive is not None:
                self._chosen = (choose(self._rule, scores_NC[:, 0], truth_N == positive),)
                above_N = scores_NC[:, 0].double() > log_odds(self._chosen[0])
                predicted_N = torch.where(above_N, positive, 1 - positive)
                everyone = torch.ones_like(above_N)
                confusion = count_pairs(truth_N[None], predicted_N[None], everyone[None], 2)
        self._confusion = confusion.cpu().numpy().copy()
        hits_C, true_C, predicted_C = _margins(confusion)
        self._per_class = of_decisions(hits_C, true_C, predicted_C)
        occurs_C = true_C > 0
        values = {
            "accuracy": _ratio(hits_C.sum(), true_C.sum()),
            "balanced_accuracy": _mean(hits_C / true_C.clamp(min=1), occurs_C),
        }
        if positive is not None:
            values |= _of_positive(hits_C, true_C, predicted_C, positive)
        if self._ranking and positive is None:
            values["auroc"] = _defined_mean(
                [auroc(each_N, truth_N == c) for c, each_N in enumerate(scores_NC.T)]
            )
        elif self._ranking and positive is not None:
            scores_N, positive_N = scores_NC[:, 0], truth_N.eq(positive)
            values["auroc"] = auroc(scores_N, positive_N)
            values["average_precision"] = average_precision(scores_N, positive_N)
        values |= _averages(hits_C, true_C, predicted_C)
        num = true_C.sum()
        if self._top_k is not None:
            values["top_k_accuracy"] = _ratio(self.in_top_k, num)
        values["ece"] = _ratio((self.bins[0] - self.bins[1]).abs().sum(), num)
        values["brier"] = _ratio(self.squares, num)
        if self._rule is not None:
            values["threshold"] = self._chosen[0]
        return values | {"num_samples": float(true_C.sum())}


class MultilabelMetrics(Accumulator):
    """Accuracy and its kin for several labels per sample, each decided above its threshold.

    accuracy is the share of right decisions, one per sample and class (Hamming); macro_precision and its kin
    are means over the classes that occur or are predicted, micro_precision and its kin those of all decisions
    together; auroc is over the classes that occur in some samples and not in others; mean_average_precision
    over the classes that occur; ece and brier are over all probabilities, one per sample and class.

    With `ranking` it keeps 5 bytes per sample and class on each rank, and those of all ranks while it
    computes. With a `rule` the thresholds are chosen from them.
    """

    counts: Tensor
    bins: Tensor
    squares: Tensor
    scores: list[Tensor]
    truths: list[Tensor]

    def __init__(self, thresholds: tuple[float, ...], ranking: bool, rule: Rule | None = None) -> None:
        super().__init__()
        num_classes = len(thresholds)
        self._ranking = ranking
        self._rule = rule
        self._limits = torch.tensor([log_odds(threshold) for threshold in thresholds], dtype=torch.float64)
        self.add_sum("counts", torch.zeros(4, num_classes, dtype=torch.int64))
        self.add_sum("bins", torch.zeros(2, NUM_BINS, dtype=torch.float64))
        self.add_sum("squares", torch.zeros((), dtype=torch.float64))
        if ranking:
            self.add_list("scores", torch.empty(0, num_classes))
            self.add_list("truths", torch.empty(0, num_classes, dtype=torch.int8))

    def to(self, device: torch.device) -> Self:
        self._limits = self._limits.to(device)
        return super().to(device)

    def count(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        """Count logits (B, C) against labels (B, C) of 0 and 1."""
        counted_BC = labelled_B[:, None].expand_as(target)
        true_BC = (target > 0.5) & counted_BC
        predicted_BC = (output.double() > self._limits) & counted_BC
        self.counts += _decisions(true_BC, predicted_BC, counted_BC)
        p_BC = summable(output.detach().double().sigmoid())
        self.bins += binned(p_BC.flatten(), true_BC.flatten(), counted_BC.flatten())
        self.squares += torch.where(counted_BC, summable((p_BC - true_BC.double()).square()), 0.0).sum()
        if self._ranking:
            self.scores.append(output.detach().float())
            self.truths.append(torch.where(counted_BC, true_BC.to(torch.int8), UNLABELLED))

    def metrics(self) -> dict[str, float]:
        counts = self.counts
        if self._ranking:
            truth_NC = joined(self.truths)
            labelled_N = truth_NC[:, 0] != UNLABELLED
            truth_NC, scores_NC = truth_NC[labelled_N], joined(self.scores)[labelled_N]
            columns = list(zip(scores_NC.T, truth_NC.T, strict=True))
            if self._calibrates:
                self._calibrated = calibrated(Scores(scores_NC, truth_NC), self._temperature)
            if self._rule is not None:
                self._chosen = tuple(choose(self._rule, *column) for column in columns)
                limits = self._limits.new_tensor([log_odds(threshold) for threshold in self._chosen])
                everyone = torch.ones_like(truth_NC, dtype=torch.bool)
                counts = _decisions(truth_NC > 0, scores_NC.double() > limits, everyone)
        hits_C, true_C, predicted_C, counted_C = counts.double()
        self._per_class = of_decisions(hits_C, true_C, predicted_C)
        wrong_C = true_C + predicted_C - 2 * hits_C
        values = {"accuracy": _ratio((counted_C - wrong_C).sum(), counted_C.sum())}
        values |= _averages(hits_C, true_C, predicted_C)
        if self._ranking:
            values["auroc"] = _defined_mean([auroc(*column) for column in columns])
            values["mean_average_precision"] = _defined_mean(
                [average_precision(*column) for column in columns]
            )
        values["ece"] = _ratio((self.bins[0] - self.bins[1]).abs().sum(), counted_C.sum())
        values["brier"] = _ratio(self.squares, counted_C.sum())
        return values | {"num_samples": float(counted_C[0])}


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
        self.add_sum("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64))
        self.add_sum("num_samples", torch.zeros((), dtype=torch.int64))

    def count(self, output: Tensor, target: Tensor, labelled_B: Tensor) -> None:
        """Count logits (B, C, h, w) against masks (B, H, W)."""
        predicted_BHW = predicted_classes(resized(output, target.shape[-2:]))
        valid_BN = ((target != IGNORE) & labelled_B[:, None, None]).flatten(1)
        self.confusion += count_pairs(
            target.flatten(1).long(), predicted_BHW.flatten(1), valid_BN, self._num_classes
        )
        self.num_samples += labelled_B.sum()

    def metrics(self) -> dict[str, float]:
        self._confusion = self.confusion.cpu().numpy().copy()
        hits_C, true_C, predicted_C = _margins(self.confusion)
        both_C = true_C + predicted_C
        seen_C = (both_C > 0)[1:]
        self._per_class = _rows(
            iou=(hits_C, both_C - hits_C),
            dice=(2 * hits_C, both_C),
            support=(true_C, torch.ones_like(true_C)),
        )
        return {
            "dice": _mean((2 * hits_C / both_C.clamp(min=1))[1:], seen_C),
            "iou": _mean((hits_C / (both_C - hits_C).clamp(min=1))[1:], seen_C),
            "pixel_accuracy": _ratio(hits_C.sum(), true_C.sum()),
            "num_samples": float(self.num_samples),
        }


def summable(values: Tensor) -> Tensor:
    """Values of about 1 in multiples of 2^-32: two million of them have one sum, in whatever order and parts.

    A run that goes on, on other ranks too, so reports what it would have reported.
    """
    return (values * 2**32).round() / 2**32


def binned(p_N: Tensor, true_N: Tensor, counted_N: Tensor) -> Tensor:
    """Sums of probabilities, and of how often they came true, by bins of the probability: float64 (2, M).

    Bin m of M holds those in (m / M, (m + 1) / M]; one that is not a number makes its bin so.
    """
    edges = torch.arange(1, NUM_BINS, dtype=torch.float64, device=p_N.device) / NUM_BINS
    bins_N = torch.bucketize(p_N.contiguous(), edges)
    bins_MN = torch.arange(NUM_BINS, device=p_N.device)[:, None] == bins_N
    both_2N = torch.stack([p_N, true_N.double()])
    return torch.where(bins_MN & counted_N, both_2N[:, None], 0.0).sum(dim=2)


def _ranks(output: Tensor, target: Tensor) -> Tensor:
    """How many classes come before the true one, int64 (B,): likelier ones, and equally likely earlier ones.

    What is not a number comes before the true class, whichever of the two it is of.
    """
    classes_C = torch.arange(output.shape[1], device=output.device)
    own_B1 = output.gather(1, target[:, None])
    before_BC = torch.where(classes_C < target[:, None], ~(own_B1 > output), ~(own_B1 >= output))
    return (before_BC & (classes_C != target[:, None])).sum(dim=1)


def _decisions(true_BC: Tensor, predicted_BC: Tensor, counted_BC: Tensor) -> Tensor:
    """Per class: right, true, predicted and all decisions, int64 (4, C)."""
    counts = [true_BC & predicted_BC, true_BC, predicted_BC, counted_BC]
    return torch.stack([count.sum(dim=0) for count in counts])


def of_decisions(hits_C: Tensor, true_C: Tensor, predicted_C: Tensor) -> list[dict[str, float]]:
    """Of each class precision, recall, F1 and how often it is true.

    Precision is 0 for a class that occurs and is never predicted.
    """
    of_predicted_C = torch.where(true_C > 0, predicted_C.clamp(min=1), predicted_C)
    return _rows(
        precision=(hits_C, of_predicted_C),
        recall=(hits_C, true_C),
        f1=(2 * hits_C, true_C + predicted_C),
        support=(true_C, torch.ones_like(true_C)),
    )


def _rows(**metrics: tuple[Tensor, Tensor]) -> list[dict[str, float]]:
    """Quotients by name as one dictionary for each class; NaN where nothing was counted."""
    columns = [
        torch.where(whole_C > 0, part_C / whole_C.clamp(min=1), math.nan).tolist()
        for part_C, whole_C in metrics.values()
    ]
    return [dict(zip(metrics, row, strict=True)) for row in zip(*columns, strict=True)]


def _of_positive(hits_C: Tensor, true_C: Tensor, predicted_C: Tensor, positive: int) -> dict[str, float]:
    """What is known of one of two classes; NaN where it, or the other one, does not occur."""
    hits, true, predicted = hits_C[positive], true_C[positive], predicted_C[positive]
    negative = 1 - positive
    return {
        "precision": _ratio(hits, predicted.clamp(min=1)) if true + predicted > 0 else math.nan,
        "recall": _ratio(hits, true),
        "specificity": _ratio(hits_C[negative], true_C[negative]),
        "f1": _ratio(2 * hits, true + predicted),
    }


def _averages(hits_C: Tensor, true_C: Tensor, predicted_C: Tensor) -> dict[str, float]:
    """Precision, recall and F1 over the classes: the means of theirs, and of all decisions together."""
    seen_C = true_C + predicted_C > 0
    return {
        "macro_precision": _mean(hits_C / predicted_C.clamp(min=1), seen_C),
        "macro_recall": _mean(hits_C / true_C.clamp(min=1), seen_C),
        "macro_f1": _mean(2 * hits_C / (true_C + predicted_C).clamp(min=1), seen_C),
        "micro_precision": _ratio(hits_C.sum(), predicted_C.sum().clamp(min=1)) if seen_C.any() else math.nan,
        "micro_recall": _ratio(hits_C.sum(), true_C.sum()),
        "micro_f1": _ratio(2 * hits_C.sum(), (true_C + predicted_C).sum()),
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
