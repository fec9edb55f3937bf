"""What val cannot say of a task is known before training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mtl_dist.data.manifest import LabelCounts
from mtl_dist.data.val_labels import val_gaps
from mtl_dist.specs import TaskInfo


def data(**val: LabelCounts) -> Any:
    infos = {
        "smell": TaskInfo("classification", ("a", "b"), num_labelled=4, class_counts=(4, 0)),
        "taste": TaskInfo("regression", num_labelled=3),
    }
    facts = SimpleNamespace(tasks=infos, labels=lambda task: val[task])
    return SimpleNamespace(task_infos=infos, sources={"val": (SimpleNamespace(facts=facts),)} if val else {})


def test_a_task_without_val_labels_is_named_with_the_remedy() -> None:
    (line,) = val_gaps(data(smell=LabelCounts(2, 0, (2, 0)), taste=LabelCounts(0, 2)))
    assert "task taste has no label in val" in line
    assert "--val 0.1" in line


def test_classes_in_val_that_train_lacks_are_named() -> None:
    (line,) = val_gaps(data(smell=LabelCounts(2, 0, (1, 1)), taste=LabelCounts(1, 1)))
    assert line.endswith("never right: b.")


def test_a_recipe_without_val_has_no_gaps() -> None:
    assert list(val_gaps(data())) == []
