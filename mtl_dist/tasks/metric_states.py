"""What metrics have counted, as plain tensors: merged over ranks, and over the starts of a run.

As torchmetrics merges its metrics' states, but over any number of parts: whoever has seen no label of a task
(a rank, an earlier start) has no part, where torchmetrics would gather what is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum

State: TypeAlias = dict[str, Tensor | list[Tensor]]
"""What one part has counted, by the names of torchmetrics' states, on the host."""

_MERGING = (dim_zero_sum, dim_zero_cat, dim_zero_max, dim_zero_min)


def state_of(metric: Metric) -> State | None:
    """What `metric` has counted; None where it has seen nothing."""
    if not metric._update_count:
        return None
    state: State = {}
    for name, reduction in metric._reductions.items():
        value: Any = getattr(metric, name)
        if isinstance(value, list):
            joined = [dim_zero_cat(value)] if reduction is dim_zero_cat and value else value
            state[name] = [tensor.detach().cpu() for tensor in joined]
        else:
            state[name] = value.detach().cpu()
    return state


def merged(metric: Metric, states: Sequence[State]) -> list[State]:
    """The same in as few parts as possible: one, unless a state of the metric has no associative merge."""
    if len(states) < 2 or any(reduction not in _MERGING for reduction in metric._reductions.values()):
        return list(states)
    return [_reduced(metric, states)]


def _reduced(metric: Metric, states: Sequence[State]) -> State:
    return {
        name: _merge(reduction, [s[name] for s in states]) for name, reduction in metric._reductions.items()
    }


def _merge(reduction: Any, values: Sequence[Tensor | list[Tensor]]) -> Tensor | list[Tensor]:
    lists = [value for value in values if isinstance(value, list)]
    if lists:
        tensors = [tensor for each in lists for tensor in each]
        return [dim_zero_cat(tensors)] if reduction is dim_zero_cat and tensors else tensors
    stacked = torch.stack([value for value in values if isinstance(value, Tensor)])
    return stacked if reduction is None else reduction(stacked)


def without_repetition(metric: Metric, by_rank: Sequence[Sequence[State]]) -> list[list[State]]:
    """The same, sums of whole numbers in the first part alone: they are exact wherever they stand, and large
    where classes are counted against one another."""
    parts = [state for states in by_rank for state in states]
    counts = [
        name
        for name, reduction in metric._reductions.items()
        if reduction is dim_zero_sum and not metric._defaults[name].is_floating_point()  # type: ignore[union-attr]
    ]
    if len(parts) < 2 or not counts:
        return [list(states) for states in by_rank]
    totals = {name: _merge(dim_zero_sum, [state[name] for state in parts]) for name in counts}
    return [
        [
            state | totals
            if state is parts[0]
            else {name: value for name, value in state.items() if name not in counts}
            for state in states
        ]
        for states in by_rank
    ]


def restore(metric: Metric, state: State) -> None:
    """Let a metric that has seen nothing go on from what it had counted."""
    for name, value in state.items():
        is_list = isinstance(value, list)
        copies = [tensor.to(metric.device, copy=True) for tensor in (value if is_list else [value])]  # type: ignore[union-attr]
        setattr(metric, name, copies if is_list else copies[0])
    metric._update_count = 1
    metric._computed = None


def value_of(metric: Metric, states: Sequence[State]) -> Any:
    """What `metric` computes of all these parts; its own state stays as it is.

    torchmetrics' own `compute` would ask all ranks for theirs.
    """
    state = states[0] if len(states) == 1 else _reduced(metric, states)
    own = {name: getattr(metric, name) for name in state}
    try:
        for name, value in state.items():
            setattr(metric, name, _moved(value, metric.device))
        return type(metric).compute(metric)
    finally:
        for name, value in own.items():
            setattr(metric, name, value)


def _moved(value: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    return [tensor.to(device) for tensor in value] if isinstance(value, list) else value.to(device)


def flat(states: Sequence[State]) -> dict[str, Tensor]:
    """Parts as named tensors, for a checkpoint: `<part>/<state>`, or `<part>/<state>/<index>` of a list."""
    tensors: dict[str, Tensor] = {}
    for number, state in enumerate(states):
        for name, value in state.items():
            if isinstance(value, list):
                tensors |= {f"{number}/{name}/{index}": tensor for index, tensor in enumerate(value)}
            else:
                tensors[f"{number}/{name}"] = value
    return tensors


def from_flat(metric: Metric, tensors: Mapping[str, Tensor]) -> list[State]:
    """The parts of `metric` that `flat` has named."""
    states: list[State] = []
    for number in range(len({key.split("/")[0] for key in tensors})):
        state: State = {}
        for name, default in metric._defaults.items():
            if isinstance(default, list):
                prefix = f"{number}/{name}/"
                indices = sorted(int(key.removeprefix(prefix)) for key in tensors if key.startswith(prefix))
                state[name] = [tensors[f"{prefix}{index}"] for index in indices]
            else:
                state[name] = tensors.get(f"{number}/{name}", default)
        states.append(state)
    return states
