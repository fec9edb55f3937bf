"""Whether gradients reach every layer, and of what size, over the first steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from torch import nn

from mtl_dist.config.describe import listed
from mtl_dist.models.multitask import MultitaskModel, TaskModules

_TIMES_THE_MEDIAN = 1000.0
"""A layer whose gradient is so many times the median of all layers, and larger than its weights, explodes."""
_TIMES_THE_WEIGHTS = 1e5
"""So does one whose gradient is so many times its weights, whatever the others'."""


class GradientWatch:
    """Looks at a model's gradients after some backwards; only the largest of each layer counts.

    At the first step a layer before one that begins at zero has no gradient, and is not dead.
    """

    def __init__(self, model: MultitaskModel) -> None:
        self._layers = {
            name: [p for p in layer.parameters(recurse=False) if p.requires_grad]
            for name, layer in model.named_modules()
        }
        self._layers = {name: own for name, own in self._layers.items() if own}
        self._parts = list(_parts(model))
        self.norms = dict.fromkeys(self._layers, 0.0)

    def look(self) -> None:
        """Once after each backward, before the optimizer's step."""
        for name, parameters in self._layers.items():
            norm = math.hypot(*(float(p.grad.float().norm()) for p in parameters if p.grad is not None))
            self.norms[name] = self.norms[name] if norm <= self.norms[name] else norm  # NaN stays

    @property
    def dead(self) -> list[str]:
        """The layers that no gradient has reached."""
        return [name for name, norm in self.norms.items() if norm == 0]

    @property
    def exploding(self) -> list[str]:
        """The layers whose gradients were not finite, or far larger than all others' and than the weights."""
        usual = median(self.norms.values()) if self.norms else 0.0
        return [name for name, norm in self.norms.items() if self._explodes(norm, usual, self._layers[name])]

    def lines(self) -> list[str]:
        """Each part's norm beside that of its weights; then the layers that stand out, by name."""
        lines = ["gradients, the largest of the first steps, beside the weights"]
        for part in self._parts:
            inside = [name for name in self._layers if name == part or name.startswith(f"{part}.")]
            if not inside:
                lines.append(f"  {part}: frozen")
                continue
            norm = math.hypot(*(self.norms[name] for name in inside))
            weight = math.hypot(*(_weight(self._layers[name]) for name in inside))
            lines.append(f"  {part}: {norm:.3g} beside {weight:.3g}")
        if self.dead:
            lines.append(f"  no gradient reaches {listed(self.dead)}: what is there is not learnt")
        if self.exploding:
            lines.append(f"  exploding: {listed(self.exploding)}")
        return lines

    def _explodes(self, norm: float, usual: float, parameters: list[nn.Parameter]) -> bool:
        weight = _weight(parameters)
        return (
            not math.isfinite(norm)
            or (usual > 0 and norm > max(_TIMES_THE_MEDIAN * usual, weight))
            or norm > _TIMES_THE_WEIGHTS * max(weight, 1.0)
        )


def _parts(model: MultitaskModel) -> Iterator[str]:
    for name, child in model.named_children():
        if isinstance(child, TaskModules):
            yield from (f"{name}.{task}" for task, _ in child.named_children())
        else:
            yield name


def _weight(parameters: list[nn.Parameter]) -> float:
    return math.hypot(*(float(p.detach().float().norm()) for p in parameters))
