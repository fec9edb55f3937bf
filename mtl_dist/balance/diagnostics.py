"""What a Gramian says about the tasks: whose gradients conflict, and whose are largest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

CONFLICT = -0.1
"""Two tasks conflict where the cosine of their gradients is below this."""
DOMINANCE = 10.0
"""One gradient drowns another where it is longer by this factor."""


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

    def sentences(self) -> list[str]:
        """A plain sentence for each pair of tasks that conflict, the worst first."""
        pairs = [
            (float(self.cosines_TT[i, j]), i, j)
            for i in range(len(self.tasks))
            for j in range(i + 1, len(self.tasks))
            if self.cosines_TT[i, j] < CONFLICT
        ]
        return [self._sentence(*pair) for pair in sorted(pairs)]

    def _sentence(self, cosine: float, i: int, j: int) -> str:
        longer, shorter = (i, j) if self.lengths_T[i] >= self.lengths_T[j] else (j, i)
        ratio = float(self.lengths_T[longer] / self.lengths_T[shorter])
        text = f"{self.tasks[i]} and {self.tasks[j]} conflict: the cosine of their gradients is {cosine:.2f}"
        if ratio >= DOMINANCE:
            text += f", and {self.tasks[longer]}'s gradient is {ratio:.0f} times as long: it wins"
        return text + "."


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
