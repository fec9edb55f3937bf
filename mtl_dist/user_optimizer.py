"""Optimizers by import path: any of torch.optim, or of the user's, over our groups of parameters.

The class is held against what a run needs of it before anything trains: it is built over made parameters, and
takes a few steps.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mtl_dist.config.errors import suggest
from mtl_dist.config.user_defined import PartError, imported
from mtl_dist.errors import UserError
from mtl_dist.lazy import torch

if TYPE_CHECKING:
    from torch import nn

OURS = ("params", "lr", "weight_decay")
"""The arguments that our groups of parameters bring."""

_STEPS = 3


def optimizer_class(path: str) -> type[torch.optim.Optimizer]:
    """The class at an import path.

    Raises:
        PartError: there is none, or it is no optimizer.
    """
    found = imported(path, lambda value: _is_optimizer(value))
    if not _is_optimizer(found):
        raise PartError(f"expected a subclass of torch.optim.Optimizer, found {path}.")
    step = inspect.signature(found.step).parameters.get("closure")
    if step is not None and step.default is step.empty:
        raise PartError(
            f"expected an optimizer whose step takes no closure, found {path}. It wants losses again "
            "within a step: choose another."
        )
    cls: type[torch.optim.Optimizer] = found
    return cls


def complete_arguments(path: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The stated arguments of the optimizer at `path`, and the defaults of the others where YAML has them.

    Raises:
        PartError: it has no such argument, one that our groups bring, or one without a value.
    """
    parameters = inspect.signature(optimizer_class(path)).parameters
    known = [
        name
        for name, each in parameters.items()
        if name not in OURS and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    takes_any = any(each.kind == each.VAR_KEYWORD for each in parameters.values())
    for name in stated:
        if name in OURS:
            raise PartError(f"expected {name} in `optim` itself, found it in `arguments`. Move it.")
        if name not in known and not takes_any:
            raise PartError(f"expected arguments of {path}, found {name}. {suggest(name, known)}")
    complete = dict(stated)
    for name in known:
        default = parameters[name].default
        if name in stated:
            continue
        if default is inspect.Parameter.empty:
            raise PartError(f"expected a value of the argument {name} of {path}, found none.")
        if _can_be_stated(default):
            complete[name] = json.loads(json.dumps(default))
    return complete


def build_user_optimizer(
    path: str, arguments: Mapping[str, Any], groups: Sequence[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The optimizer at `path` over these groups, tried before on made parameters.

    Raises:
        UserError: it cannot be built over them, or has what a run cannot keep.
    """
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in arguments.items()}
    cls: Any = optimizer_class(path)
    try:
        optimizer: torch.optim.Optimizer = cls(list(groups), **values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optim.kind: {path} cannot be built over this model's parameters: {error}") from None
    if "weight_decay" not in optimizer.defaults and any(group["weight_decay"] for group in groups):
        raise UserError(
            f"optim.weight_decay: expected 0 with {path}, which has no weight decay, found "
            f"{max(group['weight_decay'] for group in groups):g}."
        )
    settings = {key: value for key, value in groups[0].items() if key != "params"}
    try:
        tried = _steps(cls, values, settings, (4, 6))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optim.kind: {path} fails on a made matrix: {error}") from None
    _try(path, tried)
    return optimizer


def is_elementwise(path: str, arguments: Mapping[str, Any]) -> bool:
    """Whether each element of a parameter is updated for itself: then a part of it may be held alone."""
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in arguments.items()}
    cls = optimizer_class(path)
    try:
        whole = _steps(cls, values, {"lr": 0.1}, (4, 6))
        parts = _steps(cls, values, {"lr": 0.1}, (12,))
    except (TypeError, ValueError, RuntimeError):  # it wants matrices
        return False
    same_shape = all(
        value.ndim == 0 or value.shape == whole.parameters[0].shape
        for value in whole.optimizer.state[whole.parameters[0]].values()
        if isinstance(value, torch.Tensor)
    )
    flat = torch.cat([parameter.detach().flatten() for parameter in parts.parameters[:2]])
    return same_shape and torch.allclose(whole.parameters[0].detach().flatten(), flat, rtol=1e-5, atol=1e-7)


class _Tried:
    """An optimizer after a few steps on 24 made numbers, in one tensor or several."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        self.before = _numbers(optimizer)
        self.idle = parameters[-1].detach().clone()


def _steps(
    cls: type[torch.optim.Optimizer],
    values: Mapping[str, Any],
    settings: Mapping[str, Any],
    shape: tuple[int, ...],
) -> _Tried:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(24, generator=generator)
    pieces = [piece.reshape(shape).clone() for piece in start.split(torch.Size(shape).numel())]
    parameters = [torch.nn.Parameter(piece) for piece in (*pieces, torch.ones(shape))]
    optimizer = cls([{**settings, "params": parameters}], **values)
    tried = _Tried(optimizer, parameters)
    with torch.random.fork_rng(devices=[]):
        for _ in range(_STEPS):
            gradients = torch.randn(24, generator=generator).split(torch.Size(shape).numel())
            for parameter, gradient in zip(parameters[:-1], gradients, strict=True):
                parameter.grad = gradient.reshape(shape).clone()
            optimizer.step()
    return tried


def _try(path: str, tried: _Tried) -> None:
    """Refuse what a checkpoint would not hold, and what moves parameters that no loss reached."""
    changed = [key for key, value in _numbers(tried.optimizer).items() if tried.before.get(key) != value]
    if changed:
        raise UserError(
            f"optim.kind: expected an optimizer whose state is kept for each parameter, found {path}, which "
            f"keeps {', '.join(changed)} in its groups: a resumed run would not go on where it stopped."
        )
    kept = tried.optimizer.state[tried.parameters[0]]
    odd = [
        name for name, value in kept.items() if not isinstance(value, torch.Tensor | int | float | type(None))
    ]
    if odd:
        raise UserError(
            f"optim.kind: expected an optimizer whose state is tensors and numbers, found {path}, whose "
            f"{', '.join(odd)} is neither."
        )
    if not torch.equal(tried.parameters[-1].detach(), tried.idle):
        raise UserError(
            f"optim.kind: expected an optimizer that leaves parameters without a gradient as they are, found "
            f"{path}: a task without labels would change."
        )


def _numbers(optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """What the groups hold besides parameters."""
    return {
        key: value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else repr(value)
        for group in optimizer.param_groups
        for key, value in group.items()
        if key != "params"
    }


def _is_optimizer(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)


def _can_be_stated(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_can_be_stated, value))
    return value is None or isinstance(value, bool | int | float | str)
