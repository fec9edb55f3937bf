"""All kinds of task: their settings as one union, and the tasks built from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeAlias

from pydantic import Field

from mtl_dist.config.errors import suggest
from mtl_dist.errors import UserError
from mtl_dist.specs import TaskInfo, TaskKind
from mtl_dist.tasks.classification import ClassificationSettings
from mtl_dist.tasks.multilabel import MultilabelSettings
from mtl_dist.tasks.regression import RegressionSettings
from mtl_dist.tasks.segmentation import SegmentationSettings
from mtl_dist.tasks.task import Task

TaskSettings: TypeAlias = Annotated[
    ClassificationSettings | MultilabelSettings | RegressionSettings | SegmentationSettings,
    Field(discriminator="kind"),
]


DEFAULTS: dict[TaskKind, TaskSettings] = {
    "classification": ClassificationSettings(),
    "multilabel": MultilabelSettings(),
    "regression": RegressionSettings(),
    "segmentation": SegmentationSettings(),
}
"""What a task is learnt with where the recipe does not say."""


def build_tasks(settings: Mapping[str, TaskSettings], infos: Mapping[str, TaskInfo]) -> dict[str, Task]:
    """The tasks of a recipe for a dataset that knows `infos`, in the recipe's order.

    Raises:
        UserError: one line for every task that the dataset lacks or that does not fit it.
    """
    tasks: dict[str, Task] = {}
    mistakes: list[str] = []
    for name, task_settings in settings.items():
        try:
            if name not in infos:
                advice = suggest(name, infos, "The dataset's tasks")
                raise UserError(f"tasks.{name}: expected a task of the dataset, found none such. {advice}")
            tasks[name] = task_settings.build(name, infos[name])
            _check_outputs(tasks[name])
        except UserError as mistake:
            mistakes.append(str(mistake))
    if mistakes:
        raise UserError("\n".join(mistakes))
    return tasks


def _check_outputs(task: Task) -> None:
    """Refuse a loss, of the user's, for outputs that metrics and predictions could not read."""
    num_classes = len(task.info.classes)
    allowed = [1] if task.info.kind == "regression" else [num_classes]
    if task.info.kind == "segmentation" and num_classes == 2:
        allowed.append(1)
    if task.loss.num_outputs not in allowed:
        raise UserError(
            f"tasks.{task.name}.loss: expected num_outputs {' or '.join(map(str, allowed))} for "
            f"{task.info.kind}{f' of {num_classes} classes' if num_classes else ''}, found "
            f"{task.loss.num_outputs}. Correct it in {type(task.loss).__name__}."
        )
