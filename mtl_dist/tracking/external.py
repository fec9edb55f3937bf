"""External dashboards: Weights & Biases, MLflow, Trackio. Their packages are imported when one is opened.

A run is one run there too, however often it is resumed: it is found again by the id in the run folder. None
of them deletes a row, so what a resumed run writes again, with the same metrics, is passed over.

An epoch's end has several rows of one step (its own, that of the step, the gradients compared): the epoch's
number goes with the first of them, so that it has one value per step there.
"""

from __future__ import annotations

import math
import os
import time
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mtl_dist.config.settings import Settings
from mtl_dist.tracking.sink import Row, RunFacts, Sink

RUN_TAG = "mtl_dist.run_id"
"""The tag by which a run is found again in MLflow, whose ids are the server's."""
WANDB_LOGIN_S = 30
"""How long wandb waits for somebody to log in, before the run goes on without it."""
MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""Where the environment says nothing else: MLflow's own 7 times and 120 s are minutes at a dead server."""
MLFLOW_LONGEST = 6000
"""The characters of a parameter that MLflow takes."""
MLFLOW_BATCH = 1000
"""The metrics that MLflow takes in one request."""


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
    """Rows for a service: what it has not got yet, without what is undefined."""

    def __init__(self, run: RunFacts) -> None:
        self._rewritten = run.rewritten
        self._numbered = max((step for _, step in run.rewritten), default=run.resumed_step)
        """The step up to which it has the epoch's number."""

    def row(self, row: Row) -> None:
        if (row.kind, row.step) in self._rewritten:
            return
        metrics = finite(row.metrics)
        if row.step > self._numbered:
            self._numbered = row.step
            metrics["epoch"] = row.epoch
        self.log(metrics, row.step)

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hand over the metrics of a step; a service adds them to those that it has of this step."""


class WandbSink(ExternalSink):
    def __init__(self, settings: WandbSettings, run: RunFacts) -> None:
        import wandb

        super().__init__(run)
        self._image = wandb.Image
        self._run = wandb.init(
            project=settings.project or run.name,
            entity=settings.entity,
            mode=settings.mode,
            id=run.run_id,
            name=run.directory.name,
            dir=str(run.directory),
            config=flat(run.recipe),
            resume="allow",
            settings=wandb.Settings(login_timeout=WANDB_LOGIN_S),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._image(str(path))}, step=step)

    def results(self, metrics: Mapping[str, float], step: int) -> None:
        del step
        self._run.summary.update(finite(metrics))

    def close(self) -> None:
        self._run.finish()


class MlflowSink(ExternalSink):
    def __init__(self, settings: MlflowSettings, run: RunFacts) -> None:
        for variable, patience in MLFLOW_PATIENCE.items():
            os.environ.setdefault(variable, patience)
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        super().__init__(run)
        self._metric = Metric
        self._client = MlflowClient(settings.uri)
        name = settings.experiment or run.name
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        known = self._client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{run.run_id}'")
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {RUN_TAG: run.run_id}
        self._id = self._client.create_run(experiment_id, tags=tags, run_name=run.directory.name).info.run_id
        for key, value in flat(run.recipe).items():
            self._client.log_param(self._id, key, str(value)[:MLFLOW_LONGEST])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        entries = [self._metric(name, value, now, step) for name, value in metrics.items()]
        for first in range(0, len(entries), MLFLOW_BATCH):
            self._client.log_batch(self._id, metrics=entries[first : first + MLFLOW_BATCH])

    def picture(self, name: str, path: Path, step: int) -> None:
        del name, step
        self._client.log_artifact(self._id, str(path))

    def results(self, metrics: Mapping[str, float], step: int) -> None:
        self.log(finite(metrics), step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class TrackioSink(ExternalSink):
    def __init__(self, settings: TrackioSettings, run: RunFacts) -> None:
        import trackio

        super().__init__(run)
        self._image = trackio.Image
        self._run = trackio.init(
            project=settings.project or run.name,
            name=f"{run.directory.name}-{run.run_id[:8]}",
            space_id=settings.space_id,
            config=flat(run.recipe),
            resume="allow",
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._image(str(path))}, step=step)

    def results(self, metrics: Mapping[str, float], step: int) -> None:
        self.log(finite(metrics), step)

    def close(self) -> None:
        self._run.finish()


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those that are defined."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings by dotted name; lists as text, as services take them."""
    result: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool) else str(value)
    return result
