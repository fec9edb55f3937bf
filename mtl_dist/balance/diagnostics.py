"""What a Gramian says about the tasks: how long their gradients are, and the cosines between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GradientDiagnostics:
    """Lengths of the tasks' gradients and the cosines between them; NaN where a task is absent
    or two cannot be compared.

    Cosines with a gradient of length 0 are 0.
    """

    tasks: tuple[str, ...]
    lengths_T: Tensor
    cosines_TT: Tensor

    def scalars(self) -> dict[str, float]:
        """By name, for a log: `gradient_norm/<task>` and `cosine/<task>/<task>`; the absent left out."""
        found: dict[str, float] = {}
        for i, first in enumerate(self.tasks):
            if not self.lengths_T[i].isnan():
                found[f"gradient_norm/{first}"] = float(self.lengths_T[i])
            for j in range(i + 1, len(self.tasks)):
                if not self.cosines_TT[i, j].isnan():
                    found[f"cosine/{first}/{self.tasks[j]}"] = float(self.cosines_TT[i, j])
        return found


def diagnose(
    tasks: Sequence[str], gramian_TT: Tensor, present_T: Tensor, comparable_TT: Tensor | None = None
) -> GradientDiagnostics:
    """Lengths and cosines from the global Gramian of the tasks' gradients, (T, T).

    Of pairs that are not comparable (None: all are) there is no cosine.
    """
    gramian_TT, present_T = gramian_TT.detach().cpu().double(), present_T.cpu()
    lengths_T = gramian_TT.diagonal().clamp_min(0).sqrt()
    products_TT = lengths_T[:, None] * lengths_T[None, :]
    cosines_TT = torch.where(products_TT > 0, gramian_TT / products_TT, 0.0).clamp(-1, 1)
    both_TT = present_T[:, None] & present_T[None, :]
    if comparable_TT is not None:
        both_TT = both_TT & comparable_TT.cpu()
    return GradientDiagnostics(
        tasks=tuple(tasks),
        lengths_T=torch.where(present_T, lengths_T, torch.nan),
        cosines_TT=torch.where(both_TT, cosines_TT, torch.nan),
    )
