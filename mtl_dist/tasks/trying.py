"""Losses and metrics by import path, tried on a few made samples before an epoch is spent on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mtl_dist.config.user_defined import UserDefinedSettings
from mtl_dist.errors import UserError
from mtl_dist.lazy import torch
from mtl_dist.tasks.joint import Joint, try_joint
from mtl_dist.tasks.task import Task


def try_parts(tasks: Mapping[str, Task], joints: Sequence[Joint] = ()) -> None:
    """Let every loss, joint loss and metric that a recipe names by its path compute once.

    Raises:
        UserError: one line for each that cannot.
    """
    problems = []
    for task in tasks.values():
        for attempt in (_try_loss, _try_metrics):
            try:
                attempt(task)
            except UserError as error:
                problems.append(str(error))
    for joint in joints:
        try:
            try_joint(joint, tasks)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def _try_loss(task: Task) -> None:
    settings, example = getattr(task.settings, "loss", None), task.example()
    if not isinstance(settings, UserDefinedSettings) or example is None:
        return
    output, target = example
    output.requires_grad_()
    labelled_B = torch.ones(len(target), dtype=torch.bool)
    try:
        total = task.loss_sum(output, target, labelled_B) / task.count(target, labelled_B)
    except UserError:
        raise
    except Exception as error:  # whatever a loss raises at what it cannot read
        raise UserError(
            f"tasks.{task.name}.loss: expected a loss of outputs {tuple(output.shape)} and targets "
            f"{tuple(target.shape)}, found {type(error).__name__} in {settings.path}: "
            f"{' '.join(str(error).split())}."
        ) from error
    if not total.requires_grad:
        raise UserError(
            f"tasks.{task.name}.loss: expected a loss with a gradient, found none in {settings.path}. "
            "Compute it of the outputs themselves: argmax, rounding, comparing and detach() have none."
        )
    if not total.isfinite():
        raise UserError(
            f"tasks.{task.name}.loss: expected a finite loss of made samples, found {total.item():g} from "
            f"{settings.path}."
        )


def _try_metrics(task: Task) -> None:
    if task.settings.metrics:
        from mtl_dist.tasks.user_metrics import try_metrics  # imports torch

        try_metrics(task)
