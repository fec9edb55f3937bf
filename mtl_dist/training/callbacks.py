"""Callbacks: code of the user's, called at four moments of a run.

    callbacks: [{kind: my_project.calls.Mine, room: lab}]

They are told where the run stands and change nothing of it: they get no part of the training, what is random
is seeded again for every step, and what is not None from them is refused. All ranks wait while rank 0 calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from mtl_dist.config.user_defined import UserDefined, UserDefinedSettings, line_of
from mtl_dist.durable import write_text
from mtl_dist.errors import UserError
from mtl_dist.heartbeat import beat
from mtl_dist.json_files import DamagedFile, read_json

if TYPE_CHECKING:
    from mtl_dist.engine.world import World

Moment: TypeAlias = Literal["start", "evaluation_end", "epoch_end", "end"]

CALLED = "callbacks.json"
"""The file of the run folder that says up to which step each moment was called."""


@dataclass(frozen=True)
class Standing:
    """Where a run stands at a moment.

    directory    the run folder
    step         completed optimizer steps, of `total_steps`; at a start those that an earlier one made
    epoch        as the data defines it, with its fraction
    metrics      by name, read-only: at the end of an evaluation or an epoch those of the epoch's row
                 (`train/...`, and `val/...` where it was evaluated), at the end `best/<split>/...`
    """

    directory: Path
    step: int
    total_steps: int
    epoch: float
    metrics: Mapping[str, float]


class Callback:
    """Called on rank 0, while the others wait. An exception ends the run with one line.

    `start` is called whenever the run starts or goes on. The other three are called at most once for a step
    of the run, however often it is interrupted: never again for steps that a resume repeats.
    """

    def start(self, standing: Standing) -> None:
        """Before the first step."""

    def evaluation_end(self, standing: Standing) -> None:
        """After an evaluation on `val`, whose row is written and whose checkpoint is on its way."""

    def epoch_end(self, standing: Standing) -> None:
        """The same after an epoch, evaluated or not; where it was, `evaluation_end` comes before it."""

    def end(self, standing: Standing) -> None:
        """After the best weights were evaluated and the pictures drawn; not where a run was stopped."""


class CallbackSettings(UserDefinedSettings):
    """A callback of the user's."""

    part_base = "mtl_dist.training.callbacks.Callback"


CallbacksSettings: TypeAlias = tuple[
    Annotated[CallbackSettings, UserDefined((CallbackSettings,), only=True)], ...
]


class Callbacks:
    """The callbacks of a run, in the recipe's order; every rank calls it alike, and `say` is rank 0's.

    Raises:
        UserError: the constructor of one raised.
    """

    def __init__(
        self,
        settings: Sequence[CallbackSettings],
        world: World,
        directory: Path,
        say: Callable[[str], None],
    ) -> None:
        self._world = world
        self._say = say
        self._directory = directory
        self._any = bool(settings)
        self._callbacks: dict[str, Callback] = {}
        self._called: dict[str, int] = {}
        if self._any:
            world.on_main(lambda: self._make(settings))

    def __call__(
        self, moment: Moment, step: int, total_steps: int, epoch: float, metrics: Mapping[str, float]
    ) -> None:
        """Collective: a moment of the run.

        Raises:
            UserError: a callback raised, or returned something.
        """
        if not self._any:
            return
        beat("callbacks", step, slow=True)
        standing = Standing(self._directory, step, total_steps, epoch, MappingProxyType(dict(metrics)))
        self._world.on_main(lambda: self._call(moment, standing))

    def _make(self, settings: Sequence[CallbackSettings]) -> None:
        for number, each in enumerate(settings):
            name = f"callbacks.{number} ({each.path})"
            with _named(name, "its constructor"):
                self._callbacks[name] = each.make()
        path = self._directory / CALLED
        try:
            self._called = read_json(dict[str, int], path) or {}
        except DamagedFile as error:
            self._say(
                f"warning  {path} was damaged ({error}): callbacks may be called again for steps of before."
            )

    def _call(self, moment: Moment, standing: Standing) -> None:
        if moment != "start":
            if standing.step <= self._called.get(moment, -1):
                return
            # Written before the call: one that is broken off in the middle is not made twice either.
            self._called[moment] = standing.step
            write_text(self._directory / CALLED, json.dumps(self._called))
        for name, callback in self._callbacks.items():
            with _named(name, f"{moment} at step {standing.step}"):
                found: object = getattr(callback, moment)(standing)
                if found is not None:
                    raise ValueError(f"expected nothing returned, found {found!r}")


@contextmanager
def _named(name: str, where: str) -> Iterator[None]:
    """What is raised within becomes one line that names the callback."""
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} failed in {where}: {type(error).__name__}{': ' if reason else ''}{reason}"
            f"{line_of(error)}. Mend it, or remove it; the run goes on from its last checkpoint."
        ) from error
