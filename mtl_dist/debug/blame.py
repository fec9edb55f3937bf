"""Where a loss or a gradient first is not finite."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mtl_dist.balancing import Balancing
from mtl_dist.batch import Batch
from mtl_dist.engine.engine import Engine
from mtl_dist.step import RootModule, WindowTotals


def blame(root: RootModule, batch: Batch, totals: WindowTotals, engine: Engine, balancing: Balancing) -> str:
    """The operation of a skipped step that made the first value which is not finite; empty if none is found.

    The forward is looked through for an operation that makes NaN or infinity of finite inputs, and where
    there is none, autograd's anomaly detection names one of the backward.
    """
    forward = _FirstNotFinite()
    with torch.no_grad(), forward:
        root.losses(root.features(batch, None), batch, totals)
    if forward.name:
        return f" ({forward.name} made it of finite numbers)"
    try:
        with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
            warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
            engine.forward_backward(batch, totals, balancing.solve([batch], totals), last=True)
    except RuntimeError as error:
        return f" ({str(error).splitlines()[0].rstrip('.')})"
    return ""


class _FirstNotFinite(TorchDispatchMode):
    """Keeps the name of the first operation that makes a value which is not finite of values that are."""

    name = ""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        if not self.name and not _is_finite(made) and _is_finite(given):
            self.name = func.overloadpacket.__name__.strip("_")
        return made


def _is_finite(values: object) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _tensors(values) if tensor.is_floating_point())


def _tensors(values: object) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
