"""The loss scale of fp16: halved by a step that is not finite, doubled after many that are, bounded."""

from __future__ import annotations

import pytest
import torch

from mtl_dist.engine.precision import (
    GROWTH_INTERVAL,
    INITIAL_SCALE,
    MAX_SKIPPED_IN_A_ROW,
    LossScaler,
    build_scaler,
    set_tf32,
)
from mtl_dist.errors import UserError


def test_only_fp16_needs_a_scale() -> None:
    assert build_scaler("fp32") is None
    assert build_scaler("bf16") is None
    assert build_scaler("fp16") is not None


def test_the_scale_is_halved_and_grows_again() -> None:
    scaler = LossScaler()
    scaler.update(finite=False)
    assert scaler.scale == INITIAL_SCALE / 2
    assert scaler.num_skipped == 1
    for _ in range(GROWTH_INTERVAL - 1):
        scaler.update(finite=True)
    assert scaler.scale == INITIAL_SCALE / 2
    scaler.update(finite=True)
    assert scaler.scale == INITIAL_SCALE


def test_a_skipped_step_starts_the_count_of_finite_ones_again() -> None:
    scaler = LossScaler()
    for finite in [True] * (GROWTH_INTERVAL - 1) + [False] + [True] * (GROWTH_INTERVAL - 1):
        scaler.update(finite)
    assert scaler.scale == INITIAL_SCALE / 2


def test_too_many_skipped_steps_in_a_row_end_the_run() -> None:
    scaler = LossScaler()
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        scaler.update(finite=False)
    scaler.update(finite=True)
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        scaler.update(finite=False)
    with pytest.raises(UserError, match="inf or NaN in 25 steps in a row"):
        scaler.update(finite=False)


def test_the_state_goes_through_plain_numbers() -> None:
    scaler, copy = LossScaler(), LossScaler()
    for finite in (True, False, False, True):
        scaler.update(finite)
    copy.load_state_dict(scaler.state_dict())
    assert copy.state_dict() == scaler.state_dict()
    assert all(isinstance(value, (int, float)) for value in scaler.state_dict().values())


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_for_products_and_convolutions(allowed: bool) -> None:
    set_tf32(allowed)
    assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert torch.backends.cudnn.allow_tf32 is allowed
