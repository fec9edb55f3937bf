"""The list of methods: every one is a recipe's word away."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from mtl_dist.balance.methods import METHODS, BalanceSettings, build_balancer

ADAPTER: TypeAdapter[BalanceSettings] = TypeAdapter(BalanceSettings)
TASKS = ("digit", "thickness")
FACTORS = {"digit": 1.0, "thickness": 0.5}
NAMES = {
    *("equal", "fixed", "uncertainty", "dwa", "rlw", "gls", "stch", "famo", "gradnorm", "mgda", "pcgrad"),
    *(
        "cagrad",
        "imtl-g",
        "imtl-l",
        "nash",
        "fairgrad",
        "aligned",
        "upgrad",
        "dualproj",
        "graddrop",
        "db-mtl",
    ),
}


def test_every_method_is_a_recipes_word_away() -> None:
    assert {settings.model_fields["method"].default for settings in METHODS} == NAMES


@pytest.mark.parametrize("method", sorted(NAMES))
def test_every_method_is_built_by_its_name_and_asks_for_something_known(method: str) -> None:
    settings = ADAPTER.validate_python({"method": method})
    balancer = build_balancer(settings, TASKS, FACTORS, dict.fromkeys(TASKS, 1.0))
    assert balancer.needs_at(0) in ("nothing", "losses", "gramian", "jacobian")
    assert (balancer.level is None) == (balancer.needs in ("nothing", "losses"))
    assert balancer.scale_heads == (balancer.level is None)


@pytest.mark.parametrize("method", sorted(NAMES))
def test_the_state_is_in_the_root_modules_state_dict_and_moves_with_it(method: str) -> None:
    settings = ADAPTER.validate_python({"method": method})
    root = torch.nn.Module()
    root.balancer = build_balancer(settings, TASKS, FACTORS, dict.fromkeys(TASKS, 1.0))
    assert {"balancer.last_weights_T", "balancer.num_unconverged"} <= set(root.state_dict())
    root.to("meta")
    assert all(value.device.type == "meta" for value in root.state_dict().values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "cagrad", "c": 1.0},
        {"method": "cagrad", "level": "logits"},
        {"method": "cagrad", "every": 0},
        {"method": "equal", "level": "features"},
        {"method": "dwa", "temperature": 0.0},
        {"method": "nash", "alpha": 1.0},
    ],
    ids=str,
)
def test_a_setting_that_means_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(wrong)
