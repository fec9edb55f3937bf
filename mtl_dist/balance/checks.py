"""What a method of balancing asks of its surroundings, said before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import ClassVar, Protocol

from mtl_dist.balance.balancer import Balancer
from mtl_dist.errors import UserError


class EngineCapabilities(Protocol):
    """What is asked of the engine; `WHOLE_PARAMETERS` is what to set where whole weights are wanted."""

    WHOLE_PARAMETERS: ClassVar[str]

    @property
    def name(self) -> str: ...
    @property
    def shards_parameters(self) -> bool: ...
    @property
    def has_whole_gradients(self) -> bool: ...


def check_balance(
    balancer: Balancer,
    method: str,
    *,
    engine: EngineCapabilities,
    num_shared: int,
    features: Mapping[str, Sequence[str]],
    disjoint: Sequence[tuple[str, str]],
    meet_at_features: bool = True,
) -> None:
    """Refuse a method that would be wrong, or would do nothing, with this engine, model and data.

    Args:
        balancer: built for the tasks
        method: its name in the recipe
        engine: what it can do
        num_shared: the trainable parameters that all tasks share
        features: by task, the names of those that its head reads
        disjoint: the pairs of tasks which are labelled, but never in the same training sample
        meet_at_features: whether all that tasks share lies before the features that they have in common

    Raises:
        UserError: one line per problem.
    """
    problems = [
        *_sharing_problems(balancer, method, num_shared),
        *_engine_problems(balancer, method, engine),
        *_feature_problems(balancer, engine, features, disjoint, meet_at_features),
    ]
    if problems:
        raise UserError("\n".join(problems))


def _sharing_problems(balancer: Balancer, method: str, num_shared: int) -> list[str]:
    if balancer.level is None or num_shared:
        return []
    return [
        f"balance.method: expected weights that the tasks share and train, which {method} balances, found "
        "none (model.frozen, model.sharing separate, model.adapter.per_task). Use a method on losses, "
        "such as fixed."
    ]


def _engine_problems(balancer: Balancer, method: str, engine: EngineCapabilities) -> list[str]:
    if balancer.needs == "jacobian" and not engine.has_whole_gradients:
        return [
            f"balance.method: expected whole gradients on every rank (one process or DDP), which {method} "
            "works on, found an engine that divides them. Start without DeepSpeed, or use another method, "
            "such as cagrad or nash."
        ]
    if balancer.level == "parameters" and engine.shards_parameters:
        return [
            f"balance.level: expected features under {engine.name}, which divides the weights whose "
            f"gradients would be compared, found parameters. Set it to features, or "
            f"{engine.WHOLE_PARAMETERS}."
        ]
    return []


def _feature_problems(
    balancer: Balancer,
    engine: EngineCapabilities,
    features: Mapping[str, Sequence[str]],
    disjoint: Sequence[tuple[str, str]],
    meet_at_features: bool,
) -> list[str]:
    if balancer.level != "features":
        return []
    way_out = "Set it to parameters"
    if engine.shards_parameters:
        way_out += f", and {engine.WHOLE_PARAMETERS}"
    if not meet_at_features:
        return [
            "balance.level: expected tasks that meet at the features alone, found a model (model.sharing "
            f"cross_stitch) whose tasks meet before them too: conflicts there would not be seen. {way_out}."
        ]
    for first, second in combinations(features, 2):
        if not set(features[first]) & set(features[second]):
            return [
                f"balance.level: expected tasks whose heads read the same features, found none for {first} "
                f"and {second}: no conflict between them would be seen. {way_out}."
            ]
    if not disjoint:
        return []
    first, second = disjoint[0]
    return [
        "balance.level: expected training samples labelled for both tasks of each pair, found none for "
        f"{first} and {second}: at the features no conflict between them would be seen. {way_out}."
    ]
