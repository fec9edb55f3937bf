"""The run folder: what is recorded of a start."""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path

from mtl_dist.run_folder import RunFolder, installed


def test_a_package_that_is_not_installed_is_not_recorded() -> None:
    assert installed(["torch", "a-package-of-nobody"]) == {"torch": version("torch")}


def test_the_metrics_of_each_class_are_kept_apart_from_the_tasks_own(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for split in ("val", "test"):
        folder.write_metrics(
            split,
            {"digit": {"accuracy": 0.5}, "age": {"mae": 2.0}},
            {"digit": {"a": {"recall": 0.5, "support": 2.0}, "b": {"recall": math.nan, "support": 0.0}}},
        )
    assert folder.read_metrics()["val"] == {"digit": {"accuracy": 0.5}, "age": {"mae": 2.0}}
    assert folder.read_per_class()["val"] == {
        "digit": {"a": {"recall": 0.5, "support": 2.0}, "b": {"recall": None, "support": 0.0}}
    }
    assert set(folder.read_per_class()) == {"val", "test"}
