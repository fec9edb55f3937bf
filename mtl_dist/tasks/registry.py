"""All kinds of task: their settings as one union, and the tasks built from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, get_args

from pydantic import Field

from mtl_dist.config.errors import suggest
from mtl_dist.config.settings import Settings
from mtl_dist.config.user_defined import PartError, UserDefined, UserDefinedSettings, imported, named
from mtl_dist.errors import UserError
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.classification import ClassificationSettings
from mtl_dist.tasks.depth import DepthSettings
from mtl_dist.tasks.keypoints import KeypointsSettings
from mtl_dist.tasks.multilabel import MultilabelSettings
from mtl_dist.tasks.normals import NormalsSettings
from mtl_dist.tasks.ordinal import OrdinalSettings
from mtl_dist.tasks.regression import RegressionSettings
from mtl_dist.tasks.segmentation import SegmentationSettings
from mtl_dist.tasks.task import CommonTaskSettings, Task
from mtl_dist.tasks.vector import VectorSettings


class UserTaskSettings(UserDefinedSettings):
    """A kind of task of the user's: the path names what its labels are, which names how it is learnt."""

    part_base = "mtl_dist.kinds.kind.Kind"

    @classmethod
    def settings_for(cls, part: Any, key: str, path: str) -> type[Settings]:
        if not part.task_settings:
            raise PartError(f"expected task_settings, an import path, in {path}, found none.")
        settings = imported(part.task_settings)
        if not (isinstance(settings, type) and issubclass(settings, CommonTaskSettings)):
            raise PartError(
                f"expected a subclass of mtl_dist.tasks.task.CommonTaskSettings, found {part.task_settings}."
            )
        return named(settings, key, path)


TaskSettings: TypeAlias = Annotated[
    ClassificationSettings
    | MultilabelSettings
    | RegressionSettings
    | SegmentationSettings
    | DepthSettings
    | NormalsSettings
    | OrdinalSettings
    | KeypointsSettings
    | VectorSettings,
    Field(discriminator="kind"),
    UserDefined((UserTaskSettings,)),
]

TASKS: dict[str, type[CommonTaskSettings]] = {
    settings.model_fields["kind"].default: settings for settings in get_args(get_args(TaskSettings)[0])
}
"""The settings of each built-in kind of task."""


def build_tasks(
    settings: Mapping[str, CommonTaskSettings], task_infos: Mapping[str, TaskInfo]
) -> dict[str, Task]:
    """The tasks of a recipe for a dataset that knows `task_infos`, in the recipe's order.

    Raises:
        UserError: one line for every task that the dataset lacks or that does not fit it.
    """
    tasks: dict[str, Task] = {}
    mistakes: list[str] = []
    for name, task_settings in settings.items():
        try:
            if name not in task_infos:
                advice = suggest(name, task_infos, "The dataset's tasks")
                raise UserError(f"tasks.{name}: expected a task of the dataset, found none such. {advice}")
            tasks[name] = task_settings.build(name, task_infos[name])
            _check_outputs(tasks[name])
        except UserError as mistake:
            mistakes.append(str(mistake))
    if mistakes:
        raise UserError("\n".join(mistakes))
    return tasks


def _check_outputs(task: Task) -> None:
    """Refuse a loss, of the user's, for outputs that metrics and predictions could not read."""
    num_classes, allowed = len(task.info.classes), task.allowed_outputs
    if task.loss.num_outputs not in allowed:
        raise UserError(
            f"tasks.{task.name}.loss: expected num_outputs {' or '.join(map(str, allowed))} for "
            f"{task.info.kind}{f' of {num_classes} classes' if num_classes else ''}, found "
            f"{task.loss.num_outputs}. Correct it in {type(task.loss).__name__}."
        )
