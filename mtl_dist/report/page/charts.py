"""The charts of a task, from the rows of an evaluated split: what a kind has columns for is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from mtl_dist.figures import svg
from mtl_dist.figures.svg import Chart, Series
from mtl_dist.kinds.registry import kind_of
from mtl_dist.tasks.task import Task
from mtl_dist.tasks.temperature import NUM_BINS

Columns = Mapping[str, np.ndarray]

_FEW_CLASSES = 6
_MOST_CURVES = 40
_MOST_DRAWN = 60
"""Classes of a confusion matrix that are drawn: it grows with their square."""
_LISTED = 12
_MOST_PARTS = 4
_MOST_ROWS = 40
"""Classes, numbers or points that are listed one by one."""
_IN_THE_UNIT = ("mae", "rmse", "pinball", "interval_width", "mean_deviation")
"""Numbers of a vector that are drawn."""
_QUANTILE = "quantiles."
"""What the columns of quantiles begin with; the share follows."""


@dataclass(frozen=True)
class Figure:
    """A chart with its title and what it says in words; `wide` ones get a row of their own."""

    title: str
    svg: str
    caption: str = ""
    wide: bool = False
    legend: tuple[tuple[str, str], ...] = ()
    """(class of the style sheet, words) of each colour."""


@dataclass(frozen=True)
class Listing:
    """A small table."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    caption: str = ""


def figures_of(task: Task, columns: Columns, confusion: np.ndarray | None) -> list[Figure]:
    """All charts that the columns of labelled samples allow."""
    found: list[Figure] = []
    classes = task.info.classes
    if confusion is not None and len(classes) > 1:
        found.append(confusion_figure(confusion, classes, kind_of(task.info.kind).is_map))
    if not columns or not len(next(iter(columns.values()))):
        return found
    scores = scores_of(classes, columns)
    if scores is not None:
        truths_NC, scores_NC = scores
        found += ranking_figures(task, truths_NC, scores_NC)
        found += calibration_figures(columns, truths_NC, scores_NC)
    if "value" in columns and "label" in columns:
        found += regression_figures(columns, task.info.unit)
    for part in [part for part in task.parts if f"values.{part}" in columns][:_MOST_PARTS]:
        found += _part_figures(task, part, columns)
    if "covered" in columns:
        found += coverage_figures(columns)
    main = task.settings.compared[0]
    own = "dice" if "dice" in columns else main
    kind = kind_of(task.info.kind)
    if (kind.is_map or kind.is_drawn) and own in columns:
        each = "map" if kind.is_map else "image"
        values = columns[own].astype(np.float64)
        values = values[np.isfinite(values)]
        if len(values):
            caption = (
                f"Median {svg.short(float(np.median(values)))}{unit_of(task, own)} over {len(values):,} "
                f"{each}s, each on its own."
            )
            unit = unit_of(task, own).strip()
            drawn = svg.histogram(values, own, words(own) + (f" ({unit})" if unit else ""))
            found.append(Figure(f"{words(own)} of each {each}", drawn, caption))
    return [figure for figure in found if figure.svg]


def scores_of(classes: Sequence[str], columns: Columns) -> tuple[np.ndarray, np.ndarray] | None:
    """Truths and probabilities (N, C), of kinds that have both for every class."""
    names = [f"probabilities.{name}" for name in classes]
    if not classes or not all(name in columns for name in names):
        return None
    scores_NC = np.stack([columns[name] for name in names], axis=1).astype(np.float64)
    if "label_id" in columns:
        return (columns["label_id"].astype(int)[:, None] == np.arange(len(classes))), scores_NC
    if all(f"truths.{name}" in columns for name in classes):
        return np.stack([columns[f"truths.{name}"] > 0.5 for name in classes], axis=1), scores_NC
    return None


def confusion_figure(matrix: np.ndarray, classes: Sequence[str], is_map: bool) -> Figure:
    """Rows are true, columns predicted; colours are shares of the true class."""
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    what = "pixels" if is_map else "samples"
    num_classes = len(classes)
    if num_classes > _MOST_DRAWN:
        wrong = matrix.sum(0) + matrix.sum(1) - 2 * np.diag(matrix)
        kept = np.sort(np.argsort(-wrong, kind="stable")[:_MOST_DRAWN])
        matrix, shares = matrix[np.ix_(kept, kept)], shares[np.ix_(kept, kept)]
        classes = [classes[c] for c in kept]
    numbers = np.round(100 * shares, 1) if is_map else matrix
    drawn = svg.matrix(
        shares, classes, classes, "confusion matrix", numbers=numbers, x_label="predicted", y_label="true"
    )
    legend = (("share-0", "0 %"), ("share-1", "50 %"), ("share-2", "100 % of the true class"))
    caption = f"Numbers are {'per cent of the true class, in ' + what if is_map else what}."
    if len(classes) > svg.NUMBERS_UP_TO:
        caption = (
            f"{len(classes)} classes; a cell names itself under the pointer. Most frequent confusions below."
        )
    if num_classes > len(classes):
        caption = (
            f"The {len(classes)} classes with the most confusions, of {num_classes}; the others are not "
            "drawn. A cell names itself under the pointer."
        )
    return Figure("Confusion matrix", drawn, caption, wide=len(classes) > 8, legend=legend)


def confusions(matrix: np.ndarray, classes: Sequence[str]) -> Listing | None:
    """The most frequent confusions of classes, by their number."""
    wrong = matrix.astype(np.int64).copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(wrong, axis=None, kind="stable")[::-1][:_LISTED]
    rows = []
    for flat in order.tolist():
        i, j = divmod(flat, len(classes))
        if wrong[i, j]:
            share = wrong[i, j] / max(1, matrix[i].sum())
            rows.append((classes[i], classes[j], f"{wrong[i, j]:,}", f"{share:.0%}"))
    if not rows:
        return None
    return Listing("Most frequent confusions", ("true", "predicted", "samples", "of the class"), rows)


def hardest_classes(matrix: np.ndarray, classes: Sequence[str]) -> Listing:
    """Precision and recall of each class, of many the worst."""
    hits, true, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    recall = np.where(true > 0, hits / np.maximum(true, 1), np.nan)
    precision = np.where(predicted > 0, hits / np.maximum(predicted, 1), np.nan)
    order = np.argsort(np.where(true > 0, recall, 2.0), kind="stable")[:_LISTED]
    rows = [(classes[c], svg.short(recall[c]), svg.short(precision[c]), f"{int(true[c]):,}") for c in order]
    title = "Classes, the hardest first" + (
        f" ({_LISTED} of {len(classes)})" if len(classes) > _LISTED else ""
    )
    return Listing(title, ("class", "recall", "precision", "samples"), rows)


def ranking_figures(task: Task, truths_NC: np.ndarray, scores_NC: np.ndarray) -> list[Figure]:
    """ROC and precision-recall: of two classes the positive one; of more each against the rest, and mean."""
    classes = list(task.info.classes)
    shown = list(range(len(classes)))
    positive = getattr(task, "positive", None)
    if positive is not None:
        shown = [positive]
    shown = [c for c in shown if 0 < truths_NC[:, c].sum() < len(truths_NC)]
    if not shown:
        return []
    grid = np.linspace(0, 1, 101)
    roc, pr = {}, {}
    for c in shown:
        false_rate, true_rate, precision = _curve(truths_NC[:, c], scores_NC[:, c])
        roc[c] = np.interp(grid, false_rate, true_rate)
        pr[c] = np.interp(grid, true_rate, precision)
    x = grid.tolist()
    figures = []
    for title, curves, across, diagonal in (
        ("ROC", roc, "false positive rate", True),
        ("Precision and recall", pr, "recall", False),
    ):
        series: list[Series] = []
        legend: list[tuple[str, str]] = []
        if len(shown) == 1:
            series.append(Series(classes[shown[0]], x, curves[shown[0]].tolist(), "s0"))
        elif len(shown) <= _FEW_CLASSES:
            for number, c in enumerate(shown):
                series.append(Series(classes[c], x, curves[c].tolist(), f"s{number}"))
                legend.append((f"s{number}", classes[c]))
        else:
            series += [Series(classes[c], x, curves[c].tolist(), "faint") for c in shown[:_MOST_CURVES]]
            series.append(Series("mean", x, np.mean(list(curves.values()), axis=0).tolist(), "s0"))
            each = f"the first {_MOST_CURVES} of {len(shown)}" if len(shown) > _MOST_CURVES else "each class"
            legend = [("s0", "mean of the classes"), ("faint", f"{each} against the rest")]
        of = f"of {classes[shown[0]]}, " if len(shown) == 1 else ""
        up = "true positive rate" if diagonal else "precision"
        drawn = svg.lines(series, title, across, y=(0.0, 1.0), diagonal=diagonal)
        figures.append(
            Figure(title, drawn, f"{of}{up} over {across}".strip().capitalize() + ".", legend=tuple(legend))
        )
    return figures


def _curve(truths_N: np.ndarray, scores_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False positive rate, true positive rate and precision at each threshold, from none to all."""
    order = np.argsort(-scores_N, kind="stable")
    truths_N, scores_N = truths_N[order].astype(np.float64), scores_N[order]
    last = np.r_[scores_N[1:] != scores_N[:-1], True]
    hits, misses = truths_N.cumsum()[last], (1 - truths_N).cumsum()[last]
    precision = hits / (hits + misses)
    return (
        np.r_[0.0, misses / misses[-1]],
        np.r_[0.0, hits / hits[-1]],
        np.r_[precision[0], precision],
    )


def calibration_figures(columns: Columns, truths_NC: np.ndarray, scores_NC: np.ndarray) -> list[Figure]:
    """How often it is right when it says so: of single classes the confidence, of labels each probability."""
    if "class_id" in columns:
        says_N = columns["confidence"] if "confidence" in columns else scores_NC.max(axis=1)
        right_N = columns["correct"].astype(np.float64)
        what = "accuracy", "confidence of the answer"
    else:
        says_N, right_N = scores_NC.ravel(), truths_NC.astype(np.float64).ravel()
        what = "share of true labels", "probability of a label"
    says_N = says_N.astype(np.float64)
    bins = np.clip(np.ceil(says_N * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)  # those of the metric `ece`
    counts = np.bincount(bins, minlength=NUM_BINS)
    filled = counts > 0
    mean = np.bincount(bins, says_N, minlength=NUM_BINS)[filled] / counts[filled]
    rate = np.bincount(bins, right_N, minlength=NUM_BINS)[filled] / counts[filled]
    error = float((counts[filled] / counts.sum() * np.abs(mean - rate)).sum())
    chart = Chart((0.0, 1.0), (0.0, 1.0), what[1])
    chart.bars(np.linspace(0, 1, NUM_BINS + 1).tolist(), (0.25 * counts / counts.max()).tolist(), "faint")
    chart.segment((0.0, 0.0), (1.0, 1.0))
    chart.line(Series("calibration", mean.tolist(), rate.tolist(), "s0", dots=True))
    caption = (
        f"{what[0].capitalize()} over {what[1]}; on the dashed line it knows how sure it is. Expected "
        f"calibration error {error:.3f}; bars: how many samples."
    )
    return [Figure("Calibration", chart.svg("calibration"), caption)]


def regression_figures(columns: Columns, unit: str) -> list[Figure]:
    """Answers over labels, and the errors."""
    labels, values = columns["label"].astype(np.float64), columns["value"].astype(np.float64)
    low, high = svg.padded(float(min(labels.min(), values.min())), float(max(labels.max(), values.max())))
    of = f" ({unit})" if unit else ""
    chart = Chart((low, high), (low, high), f"label{of}", f"predicted{of}")
    chart.segment((low, low), (high, high))
    chart.points(labels, values)
    errors = values - labels
    spread = (
        f"Mean {svg.short(float(errors.mean()))}, standard deviation {svg.short(float(errors.std()))}{of}."
    )
    residual = Chart(
        (low, high), svg.padded(float(errors.min()), float(errors.max())), f"label{of}", f"error{of}"
    )
    if errors.min() < 0:
        residual.y = (float(errors.min()) * 1.06, residual.y[1])
    residual.segment((low, 0.0), (high, 0.0))
    residual.points(labels, errors)
    return [
        Figure("Predicted over label", chart.svg("predicted over label"), "On the dashed line it is right."),
        Figure("Error over label", residual.svg("error over label"), "A slope means: pulled to the mean."),
        Figure("Errors", svg.histogram(errors, "errors", f"error{of}", zero=True), spread),
    ]


def _part_figures(task: Task, part: str, columns: Columns) -> list[Figure]:
    """The figures of one number of a vector, over the samples that have its label."""
    labels = columns.get(f"label.{part}")
    if labels is None:
        return []
    there = np.isfinite(labels.astype(np.float64))
    if not there.any():
        return []
    own = {"label": labels[there], "value": columns[f"values.{part}"][there]}
    unit = kind_of(task.info.kind).numbers(task.info)[part].unit
    return [replace(figure, title=f"{part}: {figure.title}") for figure in regression_figures(own, unit)]


def coverage_figures(columns: Columns) -> list[Figure]:
    """How many labels lie below each quantile, or that of a predicted normal distribution, against how many
    are to."""
    labels = columns["label"].astype(np.float64)
    of_quantiles = {
        float(name.removeprefix(_QUANTILE)): float((labels < values.astype(np.float64)).mean())
        for name, values in columns.items()
        if name.startswith(_QUANTILE)
    }
    what = "quantiles"
    if "distance" in columns:
        normal, distances = NormalDist(), columns["distance"].astype(np.float64)
        shares = (0.025, *(tenth / 10 for tenth in range(1, 10)), 0.975)
        of_quantiles = {share: float((distances < normal.inv_cdf(share)).mean()) for share in shares}
        what = "predicted normal distributions"
    chart = Chart((0.0, 1.0), (0.0, 1.0), "share that is to lie below", "share of labels below")
    chart.segment((0.0, 0.0), (1.0, 1.0))
    chart.line(Series("coverage", list(of_quantiles), list(of_quantiles.values()), "s0", dots=True))
    caption = (
        f"Of the {what}; on the dashed line they are as wide as they say. "
        f"{float(columns['covered'].astype(np.float64).mean()):.1%} of the labels lie in their intervals."
    )
    return [Figure("Coverage", chart.svg("coverage"), caption)]


def parts_listing(task: Task, rows: Mapping[str, Mapping[str, float | None]]) -> Listing:
    """The metrics of each class, number or point of a task, in the order of the data."""
    names = dict.fromkeys(name for values in rows.values() for name in values)
    ordered = sorted(names, key=lambda name: name == "support")
    one = kind_of(task.info.kind).class_words[0]
    body = []
    for part, values in list(rows.items())[:_MOST_ROWS]:
        cells = [values.get(name) for name in ordered]
        shown = (
            "–" if value is None else f"{value:,.0f}" if name == "support" else svg.short(value)
            for name, value in zip(ordered, cells, strict=True)
        )
        body.append((part, *shown))
    more = f" (the first {_MOST_ROWS} of {len(rows)})" if len(rows) > _MOST_ROWS else ""
    return Listing(f"Each {one}{more}", (one, *map(words, ordered)), body)


def unit_of(task: Task, metric: str) -> str:
    """What stands behind a metric's value: "" or a unit after a space; degrees of angles.

    Of numbers with a unit each there is none for all.
    """
    if metric.endswith("_angle"):
        return "°"
    own = task.info.unit if metric in _IN_THE_UNIT and "," not in task.info.unit else ""
    return f" {own}" if own else ""


def words(name: str) -> str:
    """A metric's name for people.

    >>> words("balanced_accuracy"), words("auroc"), words("mae")
    ('balanced accuracy', 'AUROC', 'MAE')
    """
    known = {
        "auroc": "AUROC",
        "mae": "MAE",
        "rmse": "RMSE",
        "mse": "MSE",
        "r2": "R²",
        "nll": "NLL",
        "nrmse": "normalised RMSE",
        "iou": "IoU",
        "dice": "Dice",
        "ece": "ECE",
        "brier": "Brier score",
        "nme": "NME",
        "pck": "PCK",
        "silog": "SILog",
        "within_11_25": "within 11.25°",
        "within_22_5": "within 22.5°",
        "within_30": "within 30°",
    }
    return known.get(name, name.replace("_", " ").replace("f1", "F1"))
