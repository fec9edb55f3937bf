"""All balancing methods by name. A new one is a file, a line in each of the two lists here, and a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, TypeAlias

from pydantic import Field

from mtl_dist.balance.aligned import Aligned, AlignedSettings
from mtl_dist.balance.balancer import BalancedTasks, Balancer, BalancerFactory, MethodSettings
from mtl_dist.balance.cagrad import CAGrad, CAGradSettings
from mtl_dist.balance.db_mtl import DBMTL, DBMTLSettings
from mtl_dist.balance.dualproj import DualProj, DualProjSettings
from mtl_dist.balance.dwa import DWA, DWASettings
from mtl_dist.balance.equal import Equal, EqualSettings
from mtl_dist.balance.fairgrad import FairGrad, FairGradSettings
from mtl_dist.balance.famo import FAMO, FAMOSettings
from mtl_dist.balance.fixed import Fixed, FixedSettings
from mtl_dist.balance.gls import GLS, GLSSettings
from mtl_dist.balance.graddrop import GradDrop, GradDropSettings
from mtl_dist.balance.gradient import GradientSettings
from mtl_dist.balance.gradnorm import GradNorm, GradNormSettings
from mtl_dist.balance.imtl_g import IMTLG, IMTLGSettings
from mtl_dist.balance.imtl_l import IMTLL, IMTLLSettings
from mtl_dist.balance.mgda import MGDA, MGDASettings
from mtl_dist.balance.nash import Nash, NashSettings
from mtl_dist.balance.pcgrad import PCGrad, PCGradSettings
from mtl_dist.balance.rlw import RLW, RLWSettings
from mtl_dist.balance.stch import STCH, STCHSettings
from mtl_dist.balance.uncertainty import Uncertainty, UncertaintySettings
from mtl_dist.balance.upgrad import UPGrad, UPGradSettings
from mtl_dist.config.parts import OwnParts, OwnSettings
from mtl_dist.errors import UserError
from mtl_dist.specs import TaskKind


class OwnMethodSettings(OwnSettings, MethodSettings):
    """A method of the user's; its constructor may ask for `tasks` and for these `settings`."""

    part_base = "mtl_dist.balance.balancer.Balancer"
    provides = ("settings", "tasks")


class OwnGradientMethodSettings(OwnSettings, GradientSettings):
    """The same of a method on gradients, with the settings that these have in common."""

    part_base = "mtl_dist.balance.gradient.GradientBalancer"
    provides = ("settings", "tasks")


BalanceSettings: TypeAlias = Annotated[
    AlignedSettings
    | CAGradSettings
    | DBMTLSettings
    | DualProjSettings
    | DWASettings
    | EqualSettings
    | FairGradSettings
    | FAMOSettings
    | FixedSettings
    | GLSSettings
    | GradDropSettings
    | GradNormSettings
    | IMTLGSettings
    | IMTLLSettings
    | MGDASettings
    | NashSettings
    | PCGradSettings
    | RLWSettings
    | STCHSettings
    | UncertaintySettings
    | UPGradSettings,
    Field(discriminator="method"),
    OwnParts((OwnGradientMethodSettings, OwnMethodSettings), key="method"),
]

METHODS: dict[type[MethodSettings], BalancerFactory] = {
    AlignedSettings: Aligned,
    CAGradSettings: CAGrad,
    DBMTLSettings: DBMTL,
    DualProjSettings: DualProj,
    DWASettings: DWA,
    EqualSettings: Equal,
    FairGradSettings: FairGrad,
    FAMOSettings: FAMO,
    FixedSettings: Fixed,
    GLSSettings: GLS,
    GradDropSettings: GradDrop,
    GradNormSettings: GradNorm,
    IMTLGSettings: IMTLG,
    IMTLLSettings: IMTLL,
    MGDASettings: MGDA,
    NashSettings: Nash,
    PCGradSettings: PCGrad,
    RLWSettings: RLW,
    STCHSettings: STCH,
    UncertaintySettings: Uncertainty,
    UPGradSettings: UPGrad,
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
    if isinstance(settings, OwnSettings):
        balancer: Balancer = settings.make(settings=settings, tasks=facts)
    else:
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
