"""What metrics have counted, as plain tensors: merged over ranks, and over the starts of a run.

Those of our own metrics and of torchmetrics' alike, over any number of parts: whoever has seen nothing (a
rank, an earlier start) has no part, where torchmetrics would gather what is not there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, get_args

import torch
from torch import Tensor

from mtl_dist.tasks.accumulator import Accumulator, Counted, Way, joined, moved

if TYPE_CHECKING:
    import torchmetrics

Metric: TypeAlias = "Accumulator | torchmetrics.Metric"
State: TypeAlias = dict[str, Counted]
"""What one part has counted, by the names of its states, on the host."""
Merging: TypeAlias = Way | Callable[[Tensor], Tensor] | None
"""A way; or what torchmetrics was told to do with the stacked states of the parts, None: nothing."""


def has_states(metrics: object) -> TypeGuard[Metric]:
    """Whether they are merged here."""
    library: Any = sys.modules.get("torchmetrics")  # not imported: nobody has a metric of it
    return isinstance(metrics, Accumulator) or (library is not None and isinstance(metrics, library.Metric))


def _merging(metric: Metric) -> dict[str, Merging]:
    if isinstance(metric, Accumulator):
        return dict(metric.ways)
    known = {f"dim_zero_{way}": way for way in get_args(Way)}
    return {
        name: known.get(getattr(reduction, "__name__", ""), reduction)
        for name, reduction in metric._reductions.items()
    }


def state_of(metric: Metric) -> State | None:
    """What `metric` has counted; None where it has seen nothing."""
    if not (metric.has_counted if isinstance(metric, Accumulator) else metric._update_count):
        return None
    state: State = {}
    for name, merging in _merging(metric).items():
        value: Any = getattr(metric, name)
        if isinstance(value, list):
            rows = [joined(value)] if merging == "cat" and value else value
            state[name] = [tensor.detach().cpu() for tensor in rows]
        else:
            state[name] = value.detach().cpu()
    return state


def merged(metric: Metric, states: Sequence[State]) -> list[State]:
    """The same in as few parts as possible: one, unless a state of the metric has no associative merge."""
    ways = get_args(Way)
    if len(states) < 2 or any(merging not in ways for merging in _merging(metric).values()):
        return list(states)
    return [_reduced(metric, states)]


def _reduced(metric: Metric, states: Sequence[State]) -> State:
    return {name: _merge(merging, [s[name] for s in states]) for name, merging in _merging(metric).items()}


def _merge(merging: Merging, values: Sequence[Counted]) -> Counted:
    lists = [value for value in values if isinstance(value, list)]
    if lists:
        tensors = [tensor for each in lists for tensor in each]
        return [joined(tensors)] if merging == "cat" and tensors else tensors
    stacked = torch.stack([value for value in values if isinstance(value, Tensor)])
    match merging:
        case "sum":
            return stacked.sum(dim=0)
        case "max":
            return stacked.amax(dim=0)
        case "min":
            return stacked.amin(dim=0)
        case "cat" | None:
            return stacked
    return merging(stacked)


def without_repetition(metric: Metric, by_rank: Sequence[Sequence[State]]) -> list[list[State]]:
    """The same, sums of whole numbers in the first part alone: they are exact wherever they stand, and large
    where classes are counted against one another."""
    parts = [state for states in by_rank for state in states]
    counts = [
        name
        for name, merging in _merging(metric).items()
        if merging == "sum" and not metric._defaults[name].is_floating_point()  # type: ignore[union-attr]
    ]
    if len(parts) < 2 or not counts:
        return [list(states) for states in by_rank]
    totals = {name: _merge("sum", [state[name] for state in parts]) for name in counts}
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
    copies = {name: _copied(value) for name, value in state.items()}
    if isinstance(metric, Accumulator):
        metric.hold(copies)
        metric.has_counted = True
        return
    for name, value in copies.items():
        setattr(metric, name, moved(value, metric.device))
    metric._update_count = 1
    metric._computed = None


def _copied(value: Counted) -> Counted:
    return [tensor.clone() for tensor in value] if isinstance(value, list) else value.clone()


def value_of(metric: Metric, states: Sequence[State]) -> Any:
    """What `metric` computes of all these parts, of none where it has seen nothing; its own state stays as it
    is.

    torchmetrics' own `compute` would ask all ranks for theirs.
    """
    state = states[0] if len(states) == 1 else _reduced(metric, states) if states else {}
    own = {name: getattr(metric, name) for name in state}
    try:
        for name, value in state.items():
            setattr(metric, name, moved(value, metric.device))
        return metric.recompute() if isinstance(metric, Accumulator) else type(metric).compute(metric)
    finally:
        for name, value in own.items():
            setattr(metric, name, value)


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
