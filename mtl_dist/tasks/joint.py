"""Joint losses: of the outputs of several tasks together, by import path.

    joint_losses:
      parity: {kind: my_project.joint.SameParity, tasks: [digit, even], weight: 0.5}

One is a term of the total loss as a task's loss is: a mean over the samples of the whole global batch that it
counts, on however many ranks they lie. To balancing it is one task more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import Field

from mtl_dist.config.user_defined import UserDefined, UserDefinedSettings
from mtl_dist.errors import UserError
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mtl_dist.batch import Batch
    from mtl_dist.tasks.task import Task


class JointLoss(ABC):
    """A loss of several tasks' outputs per sample, as numerator and denominator.

    It sees the tasks that it is stated for, by name: float32 outputs; targets as the tasks' own losses see
    them, so that of a regression both are standardised, unless it says `standardise: false`; and which
    samples are `labelled`, bool (B,). A target that is missing is harmless (255 in a mask, NaN in a map of
    numbers). A sample whose denominator is 0 comes with outputs of zeros, and adds nothing.
    """

    @abstractmethod
    def numerators(
        self, outputs: dict[str, Tensor], targets: dict[str, Tensor], labelled: dict[str, Tensor]
    ) -> Tensor:
        """Each sample's part of the sum, (B,)."""

    def denominators(self, targets: dict[str, Tensor], labelled: dict[str, Tensor]) -> Tensor:
        """Each sample's part of the count, (B,): 1 where all of the tasks have a label, if not overridden."""
        return torch.stack(list(labelled.values())).all(dim=0).float()


class JointLossSettings(UserDefinedSettings):
    """A joint loss of the user's."""

    part_base = "mtl_dist.tasks.joint.JointLoss"

    kind: str
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """The tasks whose outputs it sees."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its weight in the total loss; the balancing method applies it."""

    def build(self, name: str, tasks: Mapping[str, Task]) -> Joint:
        of_tasks = {task: tasks[task] for task in self.tasks}
        return Joint(name, of_tasks, self.weight, self.make(), self.kind)


UserJointLoss: TypeAlias = Annotated[JointLossSettings, UserDefined((JointLossSettings,), only=True)]
JointName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")]


@dataclass(frozen=True, eq=False)
class Joint:
    """A joint loss of these tasks: a term of the total loss."""

    name: str
    of_tasks: Mapping[str, Task]
    weight: float
    loss: JointLoss
    path: str

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.of_tasks)

    def used(self, batch: Batch) -> Tensor:
        """The samples that it counts, bool (B,)."""
        return self._counts(batch, self._targets(batch)) != 0

    def count(self, batch: Batch) -> Tensor:
        """The loss's denominator, from labels alone: float32 scalar."""
        own_B = self._counts(batch, self._targets(batch))
        if not self._is_blended(batch):
            return own_B.sum(dtype=torch.float32)
        partner_B = self._counts(batch, self._targets(batch, of_partners=True))
        assert batch.lam_B is not None
        return (batch.lam_B * own_B + (1 - batch.lam_B) * partner_B).sum(dtype=torch.float32)

    def loss_sum(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The loss's numerator: float32 scalar, over both labels of each blended sample."""
        if not self._is_blended(batch):
            return self._losses(outputs, batch, self._targets(batch)).sum()
        assert batch.lam_B is not None
        own_B = self._losses(outputs, batch, self._targets(batch))
        partner_B = self._losses(outputs, batch, self._targets(batch, of_partners=True))
        return (batch.lam_B * own_B + (1 - batch.lam_B) * partner_B).sum()

    def _is_blended(self, batch: Batch) -> bool:
        return batch.lam_B is not None and any(name in batch.partners for name in self.tasks)

    def _targets(self, batch: Batch, of_partners: bool = False) -> dict[str, Tensor]:
        stored = {**batch.targets, **batch.partners} if of_partners else batch.targets
        return {
            name: task.loss_target(stored[name], batch.labelled[name]) for name, task in self.of_tasks.items()
        }

    def _labelled(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch.labelled[name] for name in self.tasks}

    def _counts(self, batch: Batch, targets: dict[str, Tensor]) -> Tensor:
        counts_B = self.loss.denominators(targets, self._labelled(batch))
        self._require_one_each("denominators", counts_B, batch)
        return torch.where(batch.valid_B, counts_B.float(), 0.0)

    def _losses(self, outputs: Mapping[str, Tensor], batch: Batch, targets: dict[str, Tensor]) -> Tensor:
        used_B = self._counts(batch, targets) != 0
        with torch.autocast(used_B.device.type, enabled=False):
            # Masking the loss would not do: an infinite one has the gradient NaN, also multiplied by 0.
            safe = {
                name: torch.where(
                    used_B.view(-1, *[1] * (outputs[name].dim() - 1)), outputs[name].float(), 0.0
                )
                for name in self.tasks
            }
            losses_B = self.loss.numerators(safe, targets, self._labelled(batch))
            self._require_one_each("numerators", losses_B, batch)
            return torch.where(used_B, losses_B, 0.0)

    def _require_one_each(self, name: str, values: object, batch: Batch) -> None:
        """Refuse what the user's code returns, before it is broadcast to something else."""
        shape = tuple(batch.valid_B.shape)
        if not (isinstance(values, torch.Tensor) and values.shape == shape):
            found = tuple(values.shape) if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
            raise UserError(
                f"joint_losses.{self.name}: expected {name} of shape {shape}, one for each sample, found "
                f"{found}. Correct it in {self.path}."
            )


def try_joint(joint: Joint, tasks: Mapping[str, Task]) -> None:
    """Let it compute once, on made samples.

    Raises:
        UserError: it cannot, or has no gradient.
    """
    from mtl_dist.batch import Batch

    examples = {name: tasks[name].example() for name in joint.tasks}
    outputs, targets = {}, {}
    for name, example in examples.items():
        if example is None:  # its kind has none
            return
        outputs[name], targets[name] = example[0].requires_grad_(), example[1]
    size = min(len(target) for target in targets.values())
    valid_B = torch.ones(size, dtype=torch.bool)
    batch = Batch(
        images_BCHW=torch.zeros(size, 1, 1, 1),
        targets={name: target[:size] for name, target in targets.items()},
        labelled=dict.fromkeys(joint.tasks, valid_B),
        valid_B=valid_B,
        positions_B=torch.arange(size),
        keys=[""] * size,
    )
    try:
        total = joint.loss_sum({name: output[:size] for name, output in outputs.items()}, batch)
    except UserError:
        raise
    except Exception as error:  # whatever the user's code raises
        shapes = ", ".join(f"{name} {tuple(output.shape)}" for name, output in outputs.items())
        raise UserError(
            f"joint_losses.{joint.name}: expected a loss of the outputs {shapes}, found "
            f"{type(error).__name__} in {joint.path}: {' '.join(str(error).split())}."
        ) from error
    if not total.requires_grad:
        raise UserError(
            f"joint_losses.{joint.name}: expected a loss with a gradient, found none in {joint.path}. "
            "Compute it of the outputs themselves: argmax, rounding, comparing and detach() have none."
        )
    if not total.isfinite():
        raise UserError(
            f"joint_losses.{joint.name}: expected a finite loss of made samples, found {total.item():g} from "
            f"{joint.path}."
        )
