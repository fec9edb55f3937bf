"""Dashboards of others, by Accelerate's trackers: Weights & Biases, MLflow, Trackio.

A run is one run there too, however often it is resumed: it is found again by the id in the run folder. None
of them deletes a row, so what a resumed run writes again, with the same metrics, is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mtl_dist.config.settings import Settings
from mtl_dist.tracking.sink import Row, RunFacts, Sink

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

RUN_TAG = "mtl_dist.run_id"
"""The tag by which a run is found again in MLflow, whose ids are the server's."""


class WandbSettings(Settings):
    """Weights & Biases (https://wandb.ai)."""

    kind: Literal["wandb"] = "wandb"
    project: str | None = None
    """null: the recipe's name."""
    entity: str | None = None
    """The user or team; null: as wandb is logged in."""
    mode: Literal["online", "offline"] = "online"
    """offline: kept in the run folder until `wandb sync`."""


class MlflowSettings(Settings):
    """MLflow (https://mlflow.org)."""

    kind: Literal["mlflow"] = "mlflow"
    experiment: str | None = None
    """null: the recipe's name."""
    uri: str | None = None
    """A server, database or folder; null: as MLFLOW_TRACKING_URI or MLflow itself has it."""


class TrackioSettings(Settings):
    """Trackio (https://github.com/gradio-app/trackio)."""

    kind: Literal["trackio"] = "trackio"
    project: str | None = None
    """null: the recipe's name."""
    space_id: str | None = None
    """A Hugging Face Space that shows the run; null: this machine alone."""


class ExternalSink(Sink):
    """A started tracker of Accelerate's, and how its service takes a picture (None: it does not)."""

    def __init__(
        self,
        tracker: GeneralTracker,
        run: RunFacts,
        send_picture: Callable[[str, Path, int], None] | None = None,
    ) -> None:
        # Without this it would ask Accelerate's own state which rank this is; a sink is on rank 0 alone.
        tracker.main_process_only = False
        tracker.start()
        if not run.resumed_step:
            tracker.store_init_configuration(flat(run.recipe))
        self._tracker = tracker
        self._rewritten = run.rewritten
        self._send_picture = send_picture

    def row(self, row: Row) -> None:
        if (row.kind, row.step) not in self._rewritten:
            self.results({"epoch": row.epoch, **row.metrics}, row.step)

    def picture(self, name: str, path: Path, step: int) -> None:
        if self._send_picture is not None:
            self._send_picture(name, path, step)

    def results(self, metrics: Mapping[str, float], step: int) -> None:
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._tracker.log(finite, step=step)

    def close(self) -> None:
        self._tracker.finish()


def open_wandb(settings: WandbSettings, run: RunFacts) -> Sink:
    from accelerate.tracking import WandBTracker

    tracker = WandBTracker(
        settings.project or run.name,
        entity=settings.entity,
        mode=settings.mode,
        id=run.run_id,
        name=run.directory.name,
        dir=str(run.directory),
        resume="allow",
    )

    def send_picture(name: str, path: Path, step: int) -> None:
        from PIL import Image

        tracker.log_images({name: [Image.open(path)]}, step=step)

    return ExternalSink(tracker, run, send_picture)


def open_mlflow(settings: MlflowSettings, run: RunFacts) -> Sink:
    import mlflow
    from accelerate.tracking import MLflowTracker

    if settings.uri is not None:
        mlflow.set_tracking_uri(settings.uri)
    known = mlflow.search_runs(
        search_all_experiments=True, filter_string=f"tags.`{RUN_TAG}` = '{run.run_id}'", output_format="list"
    )
    tracker = MLflowTracker(
        settings.experiment or run.name,
        run_id=known[0].info.run_id if known else None,
        run_name=run.directory.name,
        tags={RUN_TAG: run.run_id},
    )

    def send_picture(name: str, path: Path, step: int) -> None:
        del name, step
        tracker.log_artifact(str(path))

    return ExternalSink(tracker, run, send_picture)


def open_trackio(settings: TrackioSettings, run: RunFacts) -> Sink:
    from accelerate.tracking import TrackioTracker

    tracker = TrackioTracker(
        settings.project or run.name,
        name=f"{run.directory.name}-{run.run_id[:8]}",
        space_id=settings.space_id,
        resume="allow",
    )
    return ExternalSink(tracker, run)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings by dotted name; lists as text, as services take them."""
    result: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool) else str(value)
    return result
