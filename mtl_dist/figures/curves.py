"""learning_curves.png: the losses and metrics of a run over its epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtl_dist.figures.saving import save_png

_NAMED = 3
_WIDTH, _HEIGHT = 3.6, 2.5
"""Inches of a panel with its labels, which have `_LEFT`, `_RIGHT`, `_BOTTOM` and `_TOP` of them."""
_LEFT, _RIGHT, _BOTTOM, _TOP = 0.62, 0.12, 0.48, 0.3
TRAIN_COLOUR, VAL_COLOUR = "#8a8f98", "#2f6db5"


def draw_learning_curves(history: dict[str, Any], path: Path, monitored: str = "") -> None:
    """Draw one panel for the total loss and one row per task: its loss, then up to three of its metrics.

    The `monitored` one (such as val/digit/auroc) is the first of its task.
    """
    from matplotlib.figure import Figure

    panels = panels_of(history, monitored)
    columns = max(len(row) for row in panels)
    width, height = _WIDTH * columns, _HEIGHT * len(panels)
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(len(panels), columns, squeeze=False)
    # Without a layout engine, which draws everything twice to find out how much room the labels need.
    figure.subplots_adjust(
        left=_LEFT / width,
        right=1 - _RIGHT / width,
        bottom=_BOTTOM / height,
        top=1 - _TOP / height,
        wspace=(_LEFT + _RIGHT) / (_WIDTH - _LEFT - _RIGHT),
        hspace=(_BOTTOM + _TOP) / (_HEIGHT - _BOTTOM - _TOP),
    )
    epochs = history["epoch"]
    for row, names in zip(axes, panels, strict=True):
        for axis, name in zip(row, names + [""] * (columns - len(names)), strict=True):
            if not name:
                axis.set_axis_off()
                continue
            for split, colour in (("train", TRAIN_COLOUR), ("val", VAL_COLOUR)):
                values = history[split].get(name)
                if values:
                    floats = [float("nan") if value is None else value for value in values]
                    marker = "o" if len(floats) == 1 else ""
                    axis.plot(epochs, floats, color=colour, marker=marker, label=split, linewidth=1.6)
            axis.set_title(title_of(name, history), fontsize=9, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.25)
            axis.set_xlabel("epoch", fontsize=8)
    axes[0][0].legend(fontsize=8, frameon=False)
    save_png(figure, path)


def panels_of(history: dict[str, Any], monitored: str) -> list[list[str]]:
    """The names of the panels, row by row."""
    names = list(dict.fromkeys([*history["train"], *history["val"]]))
    tasks = dict.fromkeys(name.split("/")[0] for name in names if "/" in name)
    rows = [["loss"]]
    for task in tasks:
        metrics = [
            name
            for name in names
            if name.startswith(f"{task}/") and not name.endswith(("/loss", "/num_samples"))
        ]
        metrics.sort(key=lambda name: f"val/{name}" != monitored)
        rows.append([f"{task}/loss", *metrics[:3]])
    return rows


def title_of(name: str, history: dict[str, Any]) -> str:
    """A panel's title; of the total loss with the tasks that val's is over, where these are not all."""
    if name != "loss":
        return name.replace("/", " ")
    tasks = {
        split: [
            metric.removesuffix("/loss")
            for metric, values in history[split].items()
            if metric.endswith("/loss") and any(value is not None for value in values)
        ]
        for split in ("train", "val")
    }
    if not tasks["val"] or set(tasks["train"]) <= set(tasks["val"]):
        return name
    named = ", ".join(tasks["val"][:_NAMED]) + (", ..." if len(tasks["val"]) > _NAMED else "")
    return f"loss (val: of {named} alone)"
