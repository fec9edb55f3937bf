"""Precision: what autocast computes in, TF32, and the loss scale that fp16 needs.

Weights, gradients and optimizer state are float32 under every precision; autocast is the root module's, so
it is the same under every engine.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mtl_dist.engine.settings import Precision
from mtl_dist.errors import UserError

AUTOCAST_DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000
"""Finite steps in a row after which the scale is doubled."""
MAX_SKIPPED_IN_A_ROW = 25
"""The scale is then below 1: not the scale is too large, the gradients themselves are not finite."""


class LossScaler:
    """The factor on an fp16 loss that keeps small gradients from becoming 0.

    A step with a gradient that is not finite is skipped by all ranks together (the gradient has been averaged
    over them, and inf and NaN survive any average), and the scale halved. The same numbers on every rank.

    `num_skipped` counts the skipped steps of the whole run.
    """

    def __init__(self) -> None:
        self.scale = INITIAL_SCALE
        self.num_skipped = 0
        self._finite_in_a_row = 0
        self._skipped_in_a_row = 0

    def update(self, finite: bool) -> None:
        """Take in whether this step's gradient was finite, and so whether the step was made.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        if finite:
            self._skipped_in_a_row = 0
            self._finite_in_a_row += 1
            if self._finite_in_a_row == GROWTH_INTERVAL:
                self._finite_in_a_row = 0
                self.scale *= 2
            return
        self.num_skipped += 1
        self._finite_in_a_row = 0
        self._skipped_in_a_row += 1
        self.scale /= 2
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"train.precision: expected finite gradients, found inf or NaN in {MAX_SKIPPED_IN_A_ROW} "
                f"steps in a row, down to a loss scale of {self.scale:g}. Use bf16, or lower optim.lr."
            )

    def state_dict(self) -> dict[str, float]:
        """Plain numbers, for a checkpoint."""
        return {
            "scale": self.scale,
            "num_skipped": self.num_skipped,
            "finite_in_a_row": self._finite_in_a_row,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.scale = float(state["scale"])
        self.num_skipped = int(state["num_skipped"])
        self._finite_in_a_row = int(state["finite_in_a_row"])
        self._skipped_in_a_row = int(state["skipped_in_a_row"])


def build_scaler(precision: Precision) -> LossScaler | None:
    """The scaler that a precision needs: only fp16 does, whose smallest gradients are 0."""
    return LossScaler() if precision == "fp16" else None


def set_tf32(allowed: bool) -> None:
    """Whether float32 products on a GPU may round their factors to TF32 (10 bits of mantissa)."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
