"""Which sinks there are: one line per kind, and user-defined ones by import path.

    tracking: [{kind: tensorboard}, {kind: wandb, mode: offline}, {kind: my_project.sinks.Chat, room: lab}]

The record in files is kept in any case.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field

from mtl_dist.config.settings import Settings
from mtl_dist.config.user_defined import UserDefined, UserDefinedSettings
from mtl_dist.durable import write_text
from mtl_dist.errors import UserError
from mtl_dist.json_files import DamagedFile, read_json
from mtl_dist.tracking.external import (
    MlflowSettings,
    MlflowSink,
    TrackioSettings,
    TrackioSink,
    WandbSettings,
    WandbSink,
)
from mtl_dist.tracking.files import FilesSink
from mtl_dist.tracking.sink import RunFacts, Sink
from mtl_dist.tracking.tensorboard import TensorBoardSettings, TensorBoardSink
from mtl_dist.tracking.tracker import Tracker, switched_off

IDENTITY = "tracking.json"
"""The file of the run folder that holds the run's id for services, which resumes and requeues keep."""


class UserSinkSettings(UserDefinedSettings):
    """A user-defined sink. Its constructor is given `run` (`RunFacts`) where it names it."""

    part_base = "mtl_dist.tracking.sink.Sink"
    provides = ("run",)


SinkSettings: TypeAlias = Annotated[
    TensorBoardSettings | WandbSettings | MlflowSettings | TrackioSettings,
    Field(discriminator="kind"),
    UserDefined((UserSinkSettings,)),
]
TrackingSettings: TypeAlias = tuple[SinkSettings, ...]

DEFAULT: TrackingSettings = (TensorBoardSettings(),)

OPENERS: dict[type[Settings], Callable[[Any, RunFacts], Sink]] = {
    TensorBoardSettings: TensorBoardSink,
    WandbSettings: WandbSink,
    MlflowSettings: MlflowSink,
    TrackioSettings: TrackioSink,
}


def check_tracking(tracking: TrackingSettings) -> None:
    """Refuse a sink whose package is not installed, before anything starts.

    Raises:
        UserError: one line per package.
    """
    problems = [
        f"tracking.{number}: expected the package {settings.kind} for {{kind: {settings.kind}}}, found none. "
        f"Install it: pip install {settings.kind}"
        for number, settings in enumerate(tracking)
        if isinstance(settings, WandbSettings | MlflowSettings | TrackioSettings)
        and find_spec(settings.kind) is None
    ]
    if problems:
        raise UserError("\n".join(problems))


def open_tracker(
    directory: Path,
    *,
    resumed_step: int = 0,
    record: str | None = None,
    tracking: TrackingSettings = DEFAULT,
    name: str = "run",
    recipe: Mapping[str, Any] | None = None,
    ended: bool = False,
) -> Tracker:
    """The tracker of rank 0 for the run in `directory`, from `resumed_step` on, where the rows were `record`.

    `ended` says that an earlier start came to its end at that step: results and pictures are not given again.
    A sink that cannot be opened is reported, and the run goes on without it; the files must be.
    """
    files = FilesSink(directory, resumed_step, record)
    run_id, lines = _identity(directory)
    run = RunFacts(
        directory=directory,
        name=name,
        run_id=run_id,
        recipe=recipe or {},
        resumed_step=resumed_step,
        rewritten=files.rewritten,
    )
    sinks: dict[str, Sink] = {"files": files}
    failures = [*files.notes, *lines]
    for settings in tracking:
        kind = getattr(settings, "kind", type(settings).__name__)
        label = kind if kind not in sinks else f"{kind} ({len(sinks)})"
        try:
            sinks[label] = _opened(settings, run)
        except Exception as error:  # whatever a library, a disk or a network raises
            failures.append(switched_off(label, error))
    tracker = Tracker(directory, sinks, lines=files.lines, ended=ended)
    for line in failures:
        tracker.say(line)
    return tracker


def _opened(settings: Settings, run: RunFacts) -> Sink:
    if isinstance(settings, UserDefinedSettings):
        sink: Sink = settings.make(run=run)
        return sink
    return OPENERS[type(settings)](settings, run)


def _identity(directory: Path) -> tuple[str, list[str]]:
    """The run's id, and a line if a new one had to be made."""
    path = directory / IDENTITY
    lines = []
    try:
        kept = read_json(dict[str, str], path)
        if kept is not None and "run_id" in kept:
            return kept["run_id"], []
        found = "no run_id"
    except DamagedFile as error:
        found = str(error)
    if path.exists():
        lines = [f"warning  {path} was damaged ({found}): in dashboards the run goes on as a new one."]
    run_id = uuid.uuid4().hex
    write_text(path, json.dumps({"run_id": run_id}))
    return run_id, lines
