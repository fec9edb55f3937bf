"""Who takes turns: steps of our trainer, of a plain loop, of torchjd and of LibMTL.

All train the same model from the same seed, on the same batch, with the same optimizer. Ours is `Trainer.run`
itself, with everything it does in a step: counts, masks, gradient norm, log. torchjd's step is as its
documentation has it (mtl_backward, then jac_to_grad), LibMTL's as its trainer has it.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measuring import Advance, Steps, first
from benchmarks.training import EQUAL, Scene, build_parts, build_trainer, random_batch
from mtl_dist.batch import Batch
from mtl_dist.engine.connect import Connection
from mtl_dist.engine.precision import AUTOCAST_DTYPES
from mtl_dist.optim import build_optimizer

METHODS: dict[str, Mapping[str, Any]] = {
    "equal": EQUAL,
    "uncertainty": {"method": "uncertainty"},
    "dwa": {"method": "dwa"},
    "stch": {"method": "stch"},
    "famo": {"method": "famo"},
    "cagrad, features": {"method": "cagrad", "level": "features"},
    "upgrad, features": {"method": "upgrad", "level": "features"},
    "pcgrad, parameters": {"method": "pcgrad", "level": "parameters"},
    "pcgrad, parameters, every 10": {"method": "pcgrad", "level": "parameters", "every": 10},
    "graddrop": {"method": "graddrop"},
}
TORCHJD = {"torchjd pcgrad, one by one": 1, "torchjd pcgrad, all at once": None}
LIBMTL = "LibMTL pcgrad"


def balancing_contenders() -> list[str]:
    """Ours, and those of the others which are installed."""
    return [
        *METHODS,
        *(TORCHJD if find_spec("torchjd") else []),
        *([LIBMTL] if find_spec("LibMTL") else []),
    ]


def period(name: str) -> int:
    """The steps from one solve to the next."""
    return int(METHODS.get(name, EQUAL).get("every", 1))


def balanced(scene: Scene, connection: Connection, name: str) -> Steps:
    """Steps of one of `balancing_contenders()`."""
    if name in TORCHJD:
        return Peer(scene, connection).torchjd(TORCHJD[name])
    if name == LIBMTL:
        # It takes views of gradients, which it can in this memory format alone.
        return Peer(replace(scene, channels_last=False), connection).libmtl()
    return ours(scene, connection, METHODS[name])


def ours(
    scene: Scene,
    connection: Connection,
    balance: Mapping[str, Any] = EQUAL,
    batches: Iterator[Batch] | None = None,
) -> Steps:
    """Steps of our trainer: on one batch in memory, or on `batches`."""
    trainer = build_trainer(scene, connection, balance)
    source = repeat(random_batch(scene, connection.world.device)) if batches is None else batches

    def steps(number: int, advance: Advance) -> None:
        trainer.run(first(source, number), advance)

    return steps


def plain(scene: Scene, connection: Connection) -> Steps:
    """Steps of the loop that one writes by hand, for classification tasks."""
    device = connection.world.device
    built = build_parts(scene)[0].to(device)
    optimizer = build_optimizer(scene.optim, built, list(scene.kinds), [])
    model: Any = built
    if connection.world.size > 1:
        model = DistributedDataParallel(built, device_ids=[device] if device.type == "cuda" else None)
    dtype = AUTOCAST_DTYPES.get(scene.precision)
    batch = random_batch(scene, device)

    def steps(number: int, advance: Advance) -> None:
        for _ in range(number):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                outputs = model(batch.images_BCHW)
                losses = [F.cross_entropy(outputs[name], batch.targets[name]) for name in scene.kinds]
            torch.stack(losses).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            advance(scene.batch)

    return steps


class Peer:
    """Our model and losses with another library's step."""

    def __init__(self, scene: Scene, connection: Connection) -> None:
        model, self._tasks = build_parts(scene)
        self.model = model.to(connection.world.device)
        self.shared = list(model.shared_parameters())
        self._optimizer = build_optimizer(scene.optim, model, list(self._tasks), [])
        self.batch = random_batch(scene, connection.world.device)
        self._dtype = AUTOCAST_DTYPES.get(scene.precision)

    def torchjd(self, chunk: int | None) -> Steps:
        """Tasks differentiated `chunk` at a time; None: all at once."""
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import jac_to_grad, mtl_backward

        def backward() -> None:
            features, losses = self._forward()
            mtl_backward(losses, features=list(features.values()), parallel_chunk_size=chunk)
            jac_to_grad(self.shared, PCGrad())

        return self._steps(backward)

    def libmtl(self) -> Steps:
        """LibMTL's PCGrad with what its trainer would give it."""
        weighting = _libmtl_pcgrad(self.shared, len(self._tasks), self.batch.images_BCHW.device)
        return self._steps(lambda: weighting.backward(torch.stack(self._forward()[1])))

    def _forward(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        images_BCHW = self.batch.images_BCHW
        with torch.autocast(images_BCHW.device.type, self._dtype, enabled=self._dtype is not None):
            features = self.model.features(images_BCHW)
            outputs = self.model.heads_forward(features, (images_BCHW.shape[2], images_BCHW.shape[3]))
        losses = []
        for name, task in self._tasks.items():
            target, labelled_B = self.batch.targets[name], self.batch.labelled[name]
            losses.append(task.loss_sum(outputs[name], target, labelled_B) / task.count(target, labelled_B))
        return features, losses

    def _steps(self, backward: Callable[[], None]) -> Steps:
        def steps(number: int, advance: Advance) -> None:
            for _ in range(number):
                backward()
                self._optimizer.step()
                self._optimizer.zero_grad()
                advance(len(self.batch.valid_B))

        return steps


def _libmtl_pcgrad(shared: list[torch.nn.Parameter], num_tasks: int, device: torch.device) -> Any:
    # LibMTL 1.1.5 imports a module that torchvision has since removed.
    substitute = types.ModuleType("torchvision.models.utils")
    substitute.load_state_dict_from_url = torch.hub.load_state_dict_from_url  # type: ignore[attr-defined]
    sys.modules.setdefault("torchvision.models.utils", substitute)
    pcgrad: Any = import_module("LibMTL.weighting.PCGrad")

    weighting = pcgrad.PCGrad()
    weighting.rep_grad, weighting.task_num, weighting.device = False, num_tasks, device
    weighting.get_share_params = lambda: shared

    def zero_grad() -> None:
        for parameter in shared:
            # Its trainer's zero_grad(set_to_none=False): `_reset_grad` writes into what is there.
            if parameter.grad is not None:
                parameter.grad.zero_()

    weighting.zero_grad_share_params = zero_grad
    return weighting
