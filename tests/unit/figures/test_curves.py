"""The panels of the learning curves."""

from __future__ import annotations

from mtl_dist.figures.curves import panels_of, title_of


def test_the_learning_curves_show_the_monitored_metric_of_any_number() -> None:
    names = ["loss", "digit/loss", "digit/accuracy", "digit/f1", "digit/recall", "digit/auroc", "age/loss"]
    history = {"train": {"loss": [1.0]}, "val": {name: [1.0] for name in names}}
    shown = ["digit/loss", "digit/auroc", "digit/accuracy", "digit/f1"]
    assert panels_of(history, "val/digit/auroc") == [["loss"], shown, ["age/loss"]]


def test_the_panel_of_the_total_loss_names_the_tasks_of_val_where_these_are_not_all() -> None:
    history = {"train": {"a/loss": [1.0], "b/loss": [1.0]}, "val": {"a/loss": [1.0, None], "b/loss": [None]}}
    assert title_of("loss", history) == "loss (val: of a alone)"
    assert title_of("a/loss", history) == "a loss"
    assert title_of("loss", {"train": history["train"], "val": {}}) == "loss"
    assert title_of("loss", {"train": {"a/loss": [1.0]}, "val": history["val"]}) == "loss"
