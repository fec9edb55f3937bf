"""The pictures of docs/balancing.md: what is drawn in them is computed, not invented.

labels.svg     a batch on two ranks with missing labels, and how far the mean of the ranks' means is off
conflict.svg   two gradients that disagree, and the update that some methods make of them
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from mtl_dist.balance.methods import MGDA, CAGrad, PCGrad, UPGrad

RANKS, PER_RANK = (2, 4, 8, 16), 8
SHARES = np.array([0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0])
DRAWS = 4000
METHODS = {
    "equal weights": None,
    "mgda": MGDA(),
    "pcgrad": PCGrad(),
    "cagrad": CAGrad(c=0.5),
    "upgrad": UPGrad(),
}
GRADIENTS_TP = np.array([[2.4, 0.4], [-1.2, 0.8]])
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "mtl_dist",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(out: Path) -> list[Path]:
    """Write both pictures into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    with plt.rc_context(_STYLE):
        for name, figure in (("labels", _labels()), ("conflict", _conflict())):
            paths.append(out / f"{name}.svg")
            figure.savefig(paths[-1], bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
    return paths


def error_of_means(share: float, num_ranks: int, draws: int = DRAWS, seed: int = 0) -> float:
    """How far the mean of the ranks' means is from the mean over all labelled samples: the root mean square,
    in deviations of a sample's loss from the average one. A rank without a label counts as 0.

    Args:
        share: of the samples that have a label
        num_ranks: of `PER_RANK` samples each
    """
    generator = np.random.default_rng(seed)
    losses = 1 + generator.standard_normal((draws, num_ranks, PER_RANK))
    labelled = generator.random(losses.shape) < share
    kept = np.where(labelled, losses, 0.0)
    means = kept.sum(2) / np.maximum(labelled.sum(2), 1)
    total = labelled.sum((1, 2))
    there = total > 0
    exact = kept.sum((1, 2))[there] / total[there]
    return float(np.sqrt(np.mean((means.mean(1)[there] - exact) ** 2)))


def _labels() -> plt.Figure:
    figure, (batch, errors) = plt.subplots(
        1, 2, figsize=(9.5, 3.1), gridspec_kw={"width_ratios": [1.15, 1], "wspace": 0.3}
    )
    tasks = ("breed", "emotion", "age")
    has = np.array([[1, 1, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1, 0, 0], [1, 1, 1, 0, 1, 1, 1, 1]], bool)
    for (task, sample), there in np.ndenumerate(has):
        at = sample + (0.5 if sample >= 4 else 0)
        colour = f"C{task}" if there else "none"
        batch.add_patch(
            plt.Rectangle((at, -task), 0.86, 0.8, facecolor=colour, edgecolor="0.55", linewidth=0.8)
        )
    for task, name in enumerate(tasks):
        own = has[task]
        batch.text(-0.2, -task + 0.4, name, ha="right", va="center")
        batch.text(8.7, -task + 0.4, f"{own[:4].sum()} + {own[4:].sum()} = {own.sum()}", va="center")
    batch.text(2, 1.0, "rank 0", ha="center")
    batch.text(6.5, 1.0, "rank 1", ha="center")
    batch.text(8.7, 1.0, "labels", ha="left")
    batch.set_xlim(-2.2, 11.2)
    batch.set_ylim(-2.4, 1.5)
    batch.axis("off")
    for num in RANKS:
        found = [error_of_means(float(share), num) for share in SHARES]
        errors.plot(100 * SHARES, found, marker="o", markersize=3, label=f"{num} ranks")
    errors.axhline(0, color="black", linewidth=1.5, label="global counts")
    errors.set_xlabel("samples with a label, %")
    errors.set_ylabel("error of the loss\n(deviations of a sample's)")
    errors.legend(frameon=False, fontsize=8)
    return figure


def _conflict() -> plt.Figure:
    figure, axes = plt.subplots(1, len(METHODS), figsize=(11, 2.6), sharex=True, sharey=True)
    gramian_TT = GRADIENTS_TP @ GRADIENTS_TP.T
    for axis, (name, method) in zip(axes, METHODS.items(), strict=True):
        weights_T = np.ones(2) if method is None else np.asarray(method.weights(gramian_TT), float)
        for task, gradient in enumerate(GRADIENTS_TP):
            _arrow(axis, gradient, f"C{task}", 1.6)
        update = weights_T @ GRADIENTS_TP
        _arrow(axis, update, "black", 2.4)
        gains = GRADIENTS_TP @ update
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("\n".join(f"task {t}: {gain:+.2f}" for t, gain in enumerate(gains)), fontsize=8)
        axis.set_xlim(-1.5, 2.7)
        axis.set_ylim(-0.2, 2.6)
        axis.set_aspect("equal")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[["left", "bottom"]].set_visible(False)
    return figure


def _arrow(axis: plt.Axes, vector: np.ndarray, colour: str, width: float) -> None:
    axis.annotate(
        "",
        xy=(float(vector[0]), float(vector[1])),
        xytext=(0, 0),
        arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0},
    )
