"""What the val split can say of each task: nothing without labels, little of classes that training lacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mtl_dist.data.loader import Data
from mtl_dist.data.task_infos import SourceFacts
from mtl_dist.plural import first_few
from mtl_dist.specs import TaskInfo

_REMEDY = "Prepare it with --val 0.1"


def val_gaps(data: Data) -> Iterator[str]:
    """One line for each task or dataset without val labels, or with classes that train lacks."""
    facts = {split: [source.facts for source in data.sources.get(split, ())] for split in ("val", "test")}
    if facts["val"]:
        yield from _datasets_without(data, facts["val"])
        for name in data.task_infos:
            yield from _unlabelled(data, name, facts["val"])
    else:
        yield (
            f"the data has no val split: nothing is evaluated, the newest checkpoint is the best. {_REMEDY}."
        )
    for split, sources in facts.items():
        for name, info in data.task_infos.items():
            yield from _lacking(split, name, info, [one for one in sources if name in one.tasks])


def tasks_labelled_in(data: Data, split: str) -> list[str]:
    """The tasks that have a label in the split."""
    return [name for name in data.task_infos if num_labels(data, name, split)]


def num_labels(data: Data, task: str, split: str) -> int:
    """The labels of a task in a split, over its sources."""
    return _num_labels(task, [source.facts for source in data.sources.get(split, ())])


def _datasets_without(data: Data, val: Sequence[SourceFacts]) -> Iterator[str]:
    """The training datasets without a val split, where the recipe leaves val to the datasets."""
    if data.settings.val is not None:
        return
    with_val = [one.path for one in val]
    without = dict.fromkeys(
        source.facts.path.name for source in data.sources["train"] if source.facts.path not in with_val
    )
    if without:
        yield f"val holds nothing of {first_few(list(without))}: no val split there. {_REMEDY}."


def _unlabelled(data: Data, name: str, val: Sequence[SourceFacts]) -> Iterator[str]:
    """Whether a task has no val label at all, or none in a dataset that trains it."""
    if not _num_labels(name, val):
        yield (
            f"task {name} has no label in val: it is not validated, and val/loss is over the other tasks. "
            "Prepare its dataset with --val 0.1."
        )
        return
    if data.settings.val is not None:
        return
    training = {source.facts.path: source.facts for source in data.sources["train"]}
    without = [
        one.path.name
        for one in val
        if one.path in training and _num_labels(name, [training[one.path]]) and not _num_labels(name, [one])
    ]
    if without:
        yield f"task {name} is trained, but not validated, on {first_few(without)}: no label in val there."


def _lacking(split: str, name: str, info: TaskInfo, facts: Sequence[SourceFacts]) -> Iterator[str]:
    """The classes of a split that training lacks: no prediction of these is ever right."""
    if not info.num_labelled or not info.class_counts:
        return
    found = [one.labels(name).class_counts for one in facts]
    there = [sum(of_class) for of_class in zip(*(counts for counts in found if counts), strict=True)]
    triples = zip(info.classes, info.class_counts, there, strict=False)
    lacking = [cls for cls, in_train, in_split in triples if in_split and not in_train]
    if lacking:
        yield f"task {name}: {split} has classes that train lacks, never right: {first_few(lacking)}."


def _num_labels(name: str, facts: Sequence[SourceFacts]) -> int:
    return sum(one.labels(name).present for one in facts if name in one.tasks)
