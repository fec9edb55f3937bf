"""The panels of the learning curves."""

from __future__ import annotations

from mtl_dist.figures.curves import panels_of


def test_the_learning_curves_show_the_monitored_metric_of_any_number() -> None:
    names = ["loss", "digit/loss", "digit/accuracy", "digit/f1", "digit/recall", "digit/auroc", "age/loss"]
    history = {"train": {"loss": [1.0]}, "val": {name: [1.0] for name in names}}
    shown = ["digit/loss", "digit/auroc", "digit/accuracy", "digit/f1"]
    assert panels_of(history, "val/digit/auroc") == [["loss"], shown, ["age/loss"]]
