"""Metrics of weighted samples, for intervals: R sets of weights at once, from a column per label and answer.

`columns` are those of labelled samples: what `Task.decode` and `Task.judged` say, their keys joined by dots.
With weights of 1 the metrics are the split's own, up to the six digits that columns are written with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

Columns: TypeAlias = Mapping[str, np.ndarray]
Metrics: TypeAlias = dict[str, np.ndarray]


def of_classes(columns: Columns, weights_RN: np.ndarray, num_classes: int, positive: int | None) -> Metrics:
    """What a confusion matrix says, as `ClassificationMetrics` has it."""
    true_NC = _one_hot(columns["label_id"], num_classes)
    predicted_NC = _one_hot(columns["class_id"], num_classes)
    true_RC, predicted_RC = weights_RN @ true_NC, weights_RN @ predicted_NC
    hits_RC = weights_RN @ (true_NC * predicted_NC)
    metrics = {"accuracy": _ratio(hits_RC.sum(1), true_RC.sum(1))}
    metrics["balanced_accuracy"] = _mean(_ratio(hits_RC, true_RC), true_RC > 0)
    if positive is not None:
        hits, true, predicted = hits_RC[:, positive], true_RC[:, positive], predicted_RC[:, positive]
        negative = 1 - positive
        metrics["precision"] = _ratio(hits, np.where(true + predicted > 0, np.maximum(predicted, 1e-9), 0))
        metrics["recall"] = _ratio(hits, true)
        metrics["specificity"] = _ratio(hits_RC[:, negative], true_RC[:, negative])
        metrics["f1"] = _ratio(2 * hits, true + predicted)
    return metrics | _averages(hits_RC, true_RC, predicted_RC)


def of_scores(
    columns: Columns, classes: Sequence[str], weights_RN: np.ndarray, positive: int | None
) -> Metrics:
    """The metrics of an order, where the columns hold every probability."""
    names = [f"probabilities.{name}" for name in classes]
    if not all(name in columns for name in names):
        return {}
    true_NC = _one_hot(columns["label_id"], len(classes))
    if positive is None:
        each = [auroc(columns[name], true_NC[:, c], weights_RN) for c, name in enumerate(names)]
        values_CR = np.stack(each)
        return {"auroc": _mean(values_CR.T, np.isfinite(values_CR.T))}
    scores_N, truths_N = columns[names[positive]], true_NC[:, positive]
    return {
        "auroc": auroc(scores_N, truths_N, weights_RN),
        "average_precision": average_precision(scores_N, truths_N, weights_RN),
    }


def of_confidences(
    columns: Columns, classes: Sequence[str], weights_RN: np.ndarray, top_k: int | None
) -> Metrics:
    """What `ClassificationMetrics` says of the probabilities, where the columns hold every one.

    Without ece: samples drawn again look worse calibrated than the split, so that an interval would lie above
    the metric.
    """
    names = [f"probabilities.{name}" for name in classes]
    if not all(name in columns for name in names):
        return {}
    p_NC = np.stack([columns[name] for name in names], axis=1).astype(np.float64)
    true_NC = _one_hot(columns["label_id"], len(classes))
    own_N1 = (p_NC * true_NC).sum(1, keepdims=True)
    first_NC = np.arange(len(classes)) < columns["label_id"].astype(np.int64)[:, None]
    ranks_N = ((p_NC > own_N1) | ((p_NC == own_N1) & first_NC)).sum(1)
    total_R = weights_RN.sum(1)
    metrics: Metrics = {}
    if top_k is not None:
        metrics["top_k_accuracy"] = _ratio(weights_RN @ (ranks_N < top_k).astype(np.float64), total_R)
    metrics["brier"] = _ratio(weights_RN @ ((p_NC - true_NC) ** 2).sum(1), total_R)
    return metrics


def of_labels(columns: Columns, classes: Sequence[str], weights_RN: np.ndarray, ranking: bool) -> Metrics:
    """As `MultilabelMetrics` has them."""
    if not all(f"truths.{name}" in columns for name in classes):
        return {}
    true_NC = np.stack([columns[f"truths.{name}"] for name in classes], axis=1).astype(np.float64)
    decided_NC = np.stack([columns[f"decided.{name}"] for name in classes], axis=1).astype(np.float64)
    true_RC, decided_RC = weights_RN @ true_NC, weights_RN @ decided_NC
    right_RC = weights_RN @ (true_NC == decided_NC).astype(np.float64)
    total_R = weights_RN.sum(1)
    metrics = {"accuracy": _ratio(right_RC.sum(1), total_R * len(classes))}
    metrics |= _averages(weights_RN @ (true_NC * decided_NC), true_RC, decided_RC)
    if ranking:
        scores = [columns[f"probabilities.{name}"] for name in classes]
        for name, measure in (("auroc", auroc), ("mean_average_precision", average_precision)):
            values_RC = np.stack(
                [measure(scores_N, true_NC[:, c], weights_RN) for c, scores_N in enumerate(scores)], axis=1
            )
            metrics[name] = _mean(values_RC, np.isfinite(values_RC))
    p_NC = np.stack([columns[f"probabilities.{name}"] for name in classes], axis=1).astype(np.float64)
    metrics["brier"] = _ratio(weights_RN @ ((p_NC - true_NC) ** 2).mean(axis=1), total_R)
    return metrics


def of_errors(columns: Columns, weights_RN: np.ndarray) -> Metrics:
    """As `RegressionMetrics` has them."""
    errors_N = columns["error"].astype(np.float64)
    labels_N = columns["label"].astype(np.float64)
    centred_N = labels_N - labels_N.mean() if len(labels_N) else labels_N
    total_R = weights_RN.sum(1)
    squared_R = weights_RN @ errors_N**2
    deviation_R = weights_RN @ centred_N**2 - _ratio((weights_RN @ centred_N) ** 2, total_R)
    return {
        "mae": _ratio(weights_RN @ np.abs(errors_N), total_R),
        "rmse": np.sqrt(_ratio(squared_R, total_R)),
        "mse": _ratio(squared_R, total_R),
        "r2": 1 - _ratio(squared_R, np.where(deviation_R > 1e-12 * total_R, deviation_R, 0)),
    }


def of_quantiles(columns: Columns, weights_RN: np.ndarray, shares: Sequence[float]) -> Metrics:
    """As `QuantileMetrics` has them, but coverage_error: like ece it would lie above the metric."""
    labels_N, total_R = columns["label"].astype(np.float64), weights_RN.sum(1)
    losses_N = np.zeros(len(labels_N))
    for share in shares:
        errors_N = labels_N - columns[f"quantiles.{share:g}"].astype(np.float64)
        losses_N += np.maximum(share * errors_N, (share - 1) * errors_N) / len(shares)
    metrics = {"pinball": _ratio(weights_RN @ losses_N, total_R)}
    if len(shares) > 1:
        metrics["coverage"] = _ratio(weights_RN @ columns["covered"].astype(np.float64), total_R)
        metrics["interval_width"] = _ratio(weights_RN @ columns["width"].astype(np.float64), total_R)
    return metrics


def of_deviations(columns: Columns, weights_RN: np.ndarray) -> Metrics:
    """As `GaussianMetrics` has them, but coverage_error: like ece it would lie above the metric."""
    total_R = weights_RN.sum(1)
    named = {"nll": "nll", "coverage": "covered", "mean_deviation": "deviation"}
    return {
        metric: _ratio(weights_RN @ columns[column].astype(np.float64), total_R)
        for metric, column in named.items()
    }


def of_vectors(columns: Columns, weights_RN: np.ndarray, scales: Mapping[str, float]) -> Metrics:
    """As `VectorMetrics` has them; `scales` by name."""
    found: dict[str, list[np.ndarray]] = {}
    for name, scale in scales.items():
        if f"error.{name}" not in columns:
            continue
        there_N = np.isfinite(columns[f"error.{name}"].astype(np.float64))
        own = {key: columns[f"{key}.{name}"][there_N] for key in ("label", "error")}
        for metric, values_R in of_errors(own, weights_RN[:, there_N]).items():
            found.setdefault(metric, []).append(values_R)
        found.setdefault("nrmse", []).append(found["rmse"][-1] / scale)
    of_numbers = {metric: np.stack(rows, axis=1) for metric, rows in found.items() if metric != "mse"}
    return {metric: _mean(values_RK, np.isfinite(values_RK)) for metric, values_RK in of_numbers.items()}


def of_grades(columns: Columns, weights_RN: np.ndarray, num_classes: int) -> Metrics:
    """As `OrdinalMetrics` has them."""
    labels_N, grades_N = columns["label_id"].astype(np.int64), columns["class_id"].astype(np.int64)
    steps_N = np.abs(grades_N - labels_N).astype(np.float64)
    total_R = weights_RN.sum(1)
    squares_CC = (np.arange(num_classes)[:, None] - np.arange(num_classes)) ** 2.0
    true_RC = weights_RN @ _one_hot(labels_N, num_classes)
    predicted_RC = weights_RN @ _one_hot(grades_N, num_classes)
    by_chance_R = np.einsum("rc,cd,rd->r", true_RC, squares_CC, predicted_RC)
    return {
        "mae": _ratio(weights_RN @ steps_N, total_R),
        "kappa": 1 - _ratio((weights_RN @ steps_N**2) * total_R, by_chance_R),
        "within_one": _ratio(weights_RN @ (steps_N <= 1).astype(np.float64), total_R),
        "accuracy": _ratio(weights_RN @ (steps_N == 0).astype(np.float64), total_R),
    }


def of_overlaps(columns: Columns, classes: Sequence[str], weights_RN: np.ndarray) -> Metrics:
    """As `SegmentationMetrics` has them: over the pixels of all masks together."""
    if not all(f"pixels.hits.{name}" in columns for name in classes):
        return {}
    hits_RC, true_RC, predicted_RC = (
        weights_RN
        @ np.stack([columns[f"pixels.{key}.{name}"] for name in classes], axis=1).astype(np.float64)
        for key in ("hits", "true", "predicted")
    )
    both_RC = true_RC + predicted_RC
    seen_RC = (both_RC > 0)[:, 1:]
    return {
        "dice": _mean(_ratio(2 * hits_RC, both_RC)[:, 1:], seen_RC),
        "iou": _mean(_ratio(hits_RC, both_RC - hits_RC)[:, 1:], seen_RC),
        "pixel_accuracy": _ratio(hits_RC.sum(1), true_RC.sum(1)),
    }


def of_pixels(columns: Columns, names: Sequence[str], count: str, weights_RN: np.ndarray) -> Metrics:
    """Means over the pixels of all maps: of each map's own mean, and its number of pixels `count`."""
    counts_N = columns[count].astype(np.float64)
    total_R = weights_RN @ counts_N
    return {
        name: _ratio(weights_RN @ (np.nan_to_num(columns[name].astype(np.float64)) * counts_N), total_R)
        for name in names
    }


def auroc(scores_N: np.ndarray, truths_N: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """The chance that a positive scores above a negative, ties half; NaN (R,) where one sort is missing."""
    positive_RG, negative_RG = _by_score(scores_N, truths_N, weights_RN)
    below_RG = negative_RG.cumsum(1) - negative_RG / 2
    return _ratio((positive_RG * below_RG).sum(1), positive_RG.sum(1) * negative_RG.sum(1))


def average_precision(scores_N: np.ndarray, truths_N: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """The area under the precision-recall steps; NaN (R,) without a positive."""
    positive_RG, negative_RG = (sums_RG[:, ::-1] for sums_RG in _by_score(scores_N, truths_N, weights_RN))
    hits_RG, seen_RG = positive_RG.cumsum(1), (positive_RG + negative_RG).cumsum(1)
    precision_RG = hits_RG / np.maximum(seen_RG, 1e-12)
    return _ratio((precision_RG * positive_RG).sum(1), positive_RG.sum(1))


def _by_score(
    scores_N: np.ndarray, truths_N: np.ndarray, weights_RN: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The weights of positives and of negatives with each score, ascending, (R, G)."""
    order_N = np.argsort(scores_N, kind="stable")
    ordered_N = scores_N[order_N]
    starts_G = np.flatnonzero(np.r_[True, ordered_N[1:] != ordered_N[:-1]])
    weights_RN, truths_N = weights_RN[:, order_N], truths_N[order_N].astype(np.float64)
    positive_RG = np.add.reduceat(weights_RN * truths_N, starts_G, axis=1)
    return positive_RG, np.add.reduceat(weights_RN, starts_G, axis=1) - positive_RG


def _one_hot(ids_N: np.ndarray, num_classes: int) -> np.ndarray:
    return (ids_N.astype(np.int64)[:, None] == np.arange(num_classes)).astype(np.float64)


def _averages(hits_RC: np.ndarray, true_RC: np.ndarray, predicted_RC: np.ndarray) -> Metrics:
    seen_RC = true_RC + predicted_RC > 0
    micro = {
        "micro_precision": _ratio(hits_RC.sum(1), np.maximum(predicted_RC.sum(1), 1e-9)),
        "micro_recall": _ratio(hits_RC.sum(1), true_RC.sum(1)),
        "micro_f1": _ratio(2 * hits_RC.sum(1), (true_RC + predicted_RC).sum(1)),
    }
    return {
        "macro_precision": _mean(np.nan_to_num(_ratio(hits_RC, predicted_RC)), seen_RC),
        "macro_recall": _mean(np.nan_to_num(_ratio(hits_RC, true_RC)), seen_RC),
        "macro_f1": _mean(_ratio(2 * hits_RC, true_RC + predicted_RC), seen_RC),
    } | micro


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The quotient, NaN where nothing was counted."""
    safe = np.where(whole > 0, whole, 1.0)
    return np.where(whole > 0, part / safe, np.nan)


def _mean(values_RC: np.ndarray, counted_RC: np.ndarray) -> np.ndarray:
    return _ratio(np.where(counted_RC, np.nan_to_num(values_RC), 0.0).sum(1), counted_RC.sum(1))
