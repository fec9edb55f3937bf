"""What val cannot say of a task is known before training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtl_dist.data.manifest import LabelCounts
from mtl_dist.data.val_labels import tasks_labelled_in, val_gaps
from mtl_dist.specs import TaskInfo


def source(path: str, **labels: LabelCounts) -> Any:
    facts = SimpleNamespace(path=Path(path), tasks=labels, labels=lambda task: labels[task])
    return SimpleNamespace(facts=facts)


def data(stated: Any = None, train: Sequence[Any] = (), **splits: Sequence[Any]) -> Any:
    infos = {
        "smell": TaskInfo("classification", ("a", "b"), num_labelled=4, class_counts=(4, 0)),
        "taste": TaskInfo("regression", num_labelled=3),
    }
    settings = SimpleNamespace(val=stated)
    return SimpleNamespace(task_infos=infos, sources={"train": train, **splits}, settings=settings)


SOME = LabelCounts(2, 0, (2, 0))
NONE = LabelCounts(0, 2)


def test_a_task_without_val_labels_is_named_with_the_remedy() -> None:
    (line,) = val_gaps(data(val=[source("a", smell=SOME, taste=NONE)]))
    assert "task taste has no label in val" in line
    assert "--val 0.1" in line


@pytest.mark.parametrize("split", ["val", "test"])
def test_classes_that_train_lacks_are_named(split: str) -> None:
    held_out = {"val": [source("a", smell=SOME, taste=SOME)]}
    held_out[split] = [source("a", smell=LabelCounts(2, 0, (1, 1)), taste=SOME)]
    (line,) = val_gaps(data(**held_out))
    assert line == f"task smell: {split} has classes that train lacks, never right: b."


def test_datasets_of_a_mix_that_val_knows_nothing_of_are_named_with_the_remedy() -> None:
    train = [source("a", smell=SOME, taste=SOME), source("b", smell=SOME), source("c", smell=SOME)]
    val = [source("a", smell=SOME, taste=SOME)]
    (line,) = val_gaps(data(train=train, val=val))
    assert line == "val holds nothing of b, c: no val split there. Prepare it with --val 0.1."
    assert list(val_gaps(data("stated", train, val=val))) == []


def test_a_task_that_is_trained_on_two_datasets_and_validated_on_one_is_named() -> None:
    train = [source("a", smell=SOME, taste=SOME), source("b", taste=SOME)]
    val = [source("a", smell=SOME, taste=SOME), source("b", taste=NONE)]
    (line,) = val_gaps(data(train=train, val=val))
    assert line == "task taste is trained, but not validated, on b: no label in val there."


def test_data_without_val_is_said_with_the_remedy() -> None:
    (line,) = val_gaps(data())
    assert "no val split" in line
    assert "--val 0.1" in line


def test_the_tasks_that_val_measures_are_known() -> None:
    assert tasks_labelled_in(data(val=[source("a", smell=SOME, taste=NONE)]), "val") == ["smell"]
