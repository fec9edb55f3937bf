"""What the val split can say of each task: nothing without labels, little of classes that training lacks."""

from __future__ import annotations

from collections.abc import Iterator

from mtl_dist.data.loader import Data
from mtl_dist.data.task_infos import SourceFacts
from mtl_dist.specs import TaskInfo


def val_gaps(data: Data) -> Iterator[str]:
    """One line for each task without val labels, and for each with classes in val that train lacks."""
    facts = [source.facts for source in data.sources.get("val", ())]
    if not facts:
        return
    for name, info in data.task_infos.items():
        yield from _gaps(name, info, [one for one in facts if name in one.tasks])


def _gaps(name: str, info: TaskInfo, facts: list[SourceFacts]) -> Iterator[str]:
    labels = [one.labels(name) for one in facts]
    if not sum(counts.present for counts in labels):
        yield (
            f"task {name} has no label in val: it is not validated, and val/loss is over the other tasks. "
            "Prepare its dataset with --val 0.1."
        )
    elif info.num_labelled and info.class_counts:
        counts = zip(*(one.class_counts for one in labels if one.class_counts), strict=True)
        in_val = [sum(of_class) for of_class in counts]
        triples = zip(info.classes, info.class_counts, in_val, strict=False)
        lacking = [cls for cls, in_train, there in triples if there and not in_train]
        if lacking:
            yield f"task {name}: val has classes that train lacks, never right: {', '.join(lacking)}."
