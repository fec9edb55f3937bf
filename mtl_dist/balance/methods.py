"""All balancing methods. A new one is a file, a member of the union here, and a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, TypeAlias, get_args

from pydantic import Field

from mtl_dist.balance.aligned import Aligned
from mtl_dist.balance.cagrad import CAGrad
from mtl_dist.balance.db_mtl import DBMTL
from mtl_dist.balance.dualproj import DualProj
from mtl_dist.balance.dwa import DWA
from mtl_dist.balance.equal import Equal
from mtl_dist.balance.fairgrad import FairGrad
from mtl_dist.balance.famo import FAMO
from mtl_dist.balance.fixed import Fixed
from mtl_dist.balance.gls import GLS
from mtl_dist.balance.graddrop import GradDrop
from mtl_dist.balance.gradnorm import GradNorm
from mtl_dist.balance.imtl_g import IMTLG
from mtl_dist.balance.imtl_l import IMTLL
from mtl_dist.balance.method import BalancedTasks, Method
from mtl_dist.balance.mgda import MGDA
from mtl_dist.balance.nash import Nash
from mtl_dist.balance.pcgrad import PCGrad
from mtl_dist.balance.rlw import RLW
from mtl_dist.balance.stch import STCH
from mtl_dist.balance.uncertainty import Uncertainty
from mtl_dist.balance.upgrad import UPGrad
from mtl_dist.config.user_defined import UserDefined, UserDefinedSettings
from mtl_dist.errors import UserError

if TYPE_CHECKING:
    from mtl_dist.balance.balancer import Balancer


class UserMethodSettings(UserDefinedSettings):
    """A method of the user's: a subclass of `Method`, or of one of the classes derived from it."""

    part_base = "mtl_dist.balance.method.Method"
    settings_base = Method


BalanceSettings: TypeAlias = Annotated[
    Aligned
    | CAGrad
    | DBMTL
    | DualProj
    | DWA
    | Equal
    | FairGrad
    | FAMO
    | Fixed
    | GLS
    | GradDrop
    | GradNorm
    | IMTLG
    | IMTLL
    | MGDA
    | Nash
    | PCGrad
    | RLW
    | STCH
    | Uncertainty
    | UPGrad,
    Field(discriminator="method"),
    UserDefined((UserMethodSettings,), key="method"),
]

METHODS: tuple[type[Method], ...] = get_args(get_args(BalanceSettings)[0])
"""Those that are built in."""


def build_balancer(
    method: Method,
    tasks: Sequence[str],
    noise_factors: Mapping[str, float],
    task_weights: Mapping[str, float],
) -> Balancer:
    """The method at work on these tasks, in this order; joint losses are among them, with the noise factor 1.

    Raises:
        UserError: a task has a weight other than 1, and the method does not look at it.
    """
    from mtl_dist.balance.balancer import Balancer  # a torch module, for which reading a recipe doesn't wait

    weights = tuple(float(task_weights[name]) for name in tasks)
    if not method.uses_task_weights:
        problems = [
            f"{'tasks' if name in noise_factors else 'joint_losses'}.{name}.weight: expected 1 under "
            f"balance.method {method.method}, which finds the weights itself, found {weight:g}. Remove it, "
            "or set balance.method to fixed."
            for name, weight in zip(tasks, weights, strict=True)
            if weight != 1.0
        ]
        if problems:
            raise UserError("\n".join(problems))
    return Balancer(
        method, BalancedTasks(tuple(tasks), tuple(noise_factors.get(name, 1.0) for name in tasks), weights)
    )
