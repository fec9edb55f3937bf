"""What a method of balancing asks of its surroundings, said before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from mtl_dist.balance.balancer import Balancer
from mtl_dist.errors import UserError


def check_balance(
    balancer: Balancer,
    method: str,
    *,
    deepspeed: bool,
    zero_stage: int,
    num_shared: int,
    features: Mapping[str, Sequence[str]],
    strangers: Sequence[tuple[str, str]],
) -> None:
    """Refuse a method that would be wrong, or would do nothing, with this engine, model and data.

    Args:
        balancer: built for the tasks
        method: its name in the recipe
        deepspeed, zero_stage: the engine
        num_shared: the trainable parameters that all tasks share
        features: by task, the names of those that its head reads
        strangers: the pairs of tasks which are labelled, but never in the same training sample

    Raises:
        UserError: one line per problem.
    """
    problems = [
        *_sharing_problems(balancer, method, num_shared),
        *_engine_problems(balancer, method, deepspeed, zero_stage),
        *_feature_problems(balancer, zero_stage, features, strangers),
    ]
    if problems:
        raise UserError("\n".join(problems))


def _sharing_problems(balancer: Balancer, method: str, num_shared: int) -> list[str]:
    if balancer.level is None or num_shared:
        return []
    return [
        f"balance.method: expected weights that the tasks share and train, which {method} balances, found "
        "none (model.frozen, or model.shared false). Use a method on losses, such as fixed or uncertainty."
    ]


def _engine_problems(balancer: Balancer, method: str, deepspeed: bool, zero_stage: int) -> list[str]:
    if balancer.needs == "jacobian" and deepspeed:
        return [
            f"balance.method: expected one process or DDP, where {method} sees whole gradients, found "
            "DeepSpeed. Start without it, or use another method, such as cagrad or nash."
        ]
    if balancer.level == "parameters" and zero_stage == 3:
        return [
            "balance.level: expected features under ZeRO 3, which divides the weights whose gradients would "
            "be compared, found parameters. Set it to features, or engine.zero_stage to 2."
        ]
    return []


def _feature_problems(
    balancer: Balancer,
    zero_stage: int,
    features: Mapping[str, Sequence[str]],
    strangers: Sequence[tuple[str, str]],
) -> list[str]:
    if balancer.level != "features":
        return []
    way_out = "Set it to parameters"
    if zero_stage == 3:
        way_out += ", with engine.zero_stage 2"
    for first, second in combinations(features, 2):
        if not set(features[first]) & set(features[second]):
            return [
                f"balance.level: expected tasks whose heads read the same features, found none for {first} "
                f"and {second}: no conflict between them would be seen. {way_out}."
            ]
    if not strangers:
        return []
    first, second = strangers[0]
    return [
        "balance.level: expected training samples labelled for both tasks of each pair, found none for "
        f"{first} and {second}: at the features no conflict between them would be seen. {way_out}."
    ]
