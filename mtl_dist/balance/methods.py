"""All balancing methods by name. A new one is a file, a line in each of the two lists here, and a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, TypeAlias

from pydantic import Field

from mtl_dist.balance.balancer import BalancedTasks, Balancer, BalancerFactory
from mtl_dist.balance.dwa import DWA, DWASettings
from mtl_dist.balance.equal import Equal, EqualSettings
from mtl_dist.balance.famo import FAMO, FAMOSettings
from mtl_dist.balance.fixed import Fixed, FixedSettings
from mtl_dist.balance.gls import GLS, GLSSettings
from mtl_dist.balance.imtl_l import IMTLL, IMTLLSettings
from mtl_dist.balance.rlw import RLW, RLWSettings
from mtl_dist.balance.stch import STCH, STCHSettings
from mtl_dist.balance.uncertainty import Uncertainty, UncertaintySettings
from mtl_dist.config.settings import Settings
from mtl_dist.errors import UserError
from mtl_dist.specs import TaskKind

BalanceSettings: TypeAlias = Annotated[
    DWASettings
    | EqualSettings
    | FAMOSettings
    | FixedSettings
    | GLSSettings
    | IMTLLSettings
    | RLWSettings
    | STCHSettings
    | UncertaintySettings,
    Field(discriminator="method"),
]

METHODS: dict[type[Settings], BalancerFactory] = {
    DWASettings: DWA,
    EqualSettings: Equal,
    FAMOSettings: FAMO,
    FixedSettings: Fixed,
    GLSSettings: GLS,
    IMTLLSettings: IMTLL,
    RLWSettings: RLW,
    STCHSettings: STCH,
    UncertaintySettings: Uncertainty,
}


def build_balancer(
    settings: BalanceSettings,
    tasks: Sequence[str],
    kinds: Mapping[str, TaskKind],
    task_weights: Mapping[str, float],
) -> Balancer:
    """The balancer for these tasks, in this order.

    Raises:
        UserError: a task has a weight other than 1, and the method does not look at it.
    """
    names = tuple(tasks)
    facts = BalancedTasks(
        names=names,
        kinds=tuple(kinds[name] for name in names),
        weights=tuple(float(task_weights[name]) for name in names),
    )
    balancer = METHODS[type(settings)](settings, facts)
    if not balancer.uses_task_weights:
        problems = [
            f"tasks.{name}.weight: expected 1 under balance.method {settings.method}, "
            f"which finds the weights itself, found {weight:g}. Remove it, or set balance.method to fixed."
            for name, weight in zip(names, facts.weights, strict=True)
            if weight != 1.0
        ]
        if problems:
            raise UserError("\n".join(problems))
    return balancer
