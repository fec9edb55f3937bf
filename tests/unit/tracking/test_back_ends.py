"""Real dashboards on this machine: W&B offline, MLflow in files and in SQLite, Trackio's SQLite.

A test skips where the package is not installed: pip install "mtl-dist[wandb,mlflow,trackio]".
"""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mtl_dist.config.settings import Settings
from mtl_dist.tracking.external import MlflowSettings, TrackioSettings, WandbSettings
from mtl_dist.tracking.registry import open_tracker

Points = Counter[tuple[str, int]]
"""How often each metric has a value at each step."""


def train(run: Path, settings: Settings, steps: range, resumed_step: int, ends: bool = True) -> None:
    """What a training gives out: a row a step, two more at the end of an epoch of four steps."""
    tracker = open_tracker(
        run,
        resumed_step=resumed_step,
        tracking=(settings,),
        name="tiny",
        recipe={"train": {"seed": 3}},
        ended=run.joinpath("ended").exists() and not steps,
    )
    for step in steps:
        tracker.record("step", step, step / 4, {"step/loss": 1 / step, "step/nothing": float("nan")})
        if step % 4 == 0:
            tracker.record("epoch", step, step / 4, {"val/loss": 1 / step})
            tracker.record("balance", step, step / 4, {"cosine/a/b": 0.5})
    if ends:
        tracker.results({"best/test/a/accuracy": 0.5}, 8)
        tracker.pictures([run / "curves.png"], 8)
        run.joinpath("ended").touch()
    tracker.close()


def wandb_records(run: Path) -> Iterator[Any]:
    """What the files of W&B's offline runs hold: LevelDB's log format behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        data, position, parts = path.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if 0x8000 - position % 0x8000 < 7:
                position += 0x8000 - position % 0x8000
                continue
            _, size, kind = struct.unpack_from("<IHB", data, position)
            parts += data[position + 7 : position + 7 + size]
            position += 7 + size
            if kind in (1, 4):  # whole, or the last part
                record = Record()
                record.ParseFromString(parts)
                yield record
                parts = b""


def of_wandb(run: Path) -> tuple[Points, set[str], dict[str, Any]]:
    points: Points = Counter()
    ids, config, pictures = set(), {}, 0
    for record in wandb_records(run):
        if record.WhichOneof("record_type") == "run":
            ids.add(record.run.run_id)
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        names = {item.nested_key[0] if item.nested_key else item.key for item in record.history.item}
        pictures += "curves" in names
        step = record.history.step.num
        points.update((name, step) for name in names - {"curves"} if not name.startswith("_"))
        for item in record.summary.update:
            if item.key.startswith("best/"):
                points[(item.key, 8)] += 1
    assert pictures == 1
    return points, ids, {"train.seed": config["train.seed"]}


def of_mlflow(settings: MlflowSettings) -> tuple[Points, set[str], dict[str, Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(settings.uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    names = runs[0].data.metrics
    points: Points = Counter(
        (name, metric.step)
        for name in names
        for metric in client.get_metric_history(runs[0].info.run_id, name)
    )
    assert [each.path for each in client.list_artifacts(runs[0].info.run_id)] == ["curves.png"]
    assert runs[0].info.status == "FINISHED"
    return points, {run.info.run_id for run in runs}, {k: int(v) for k, v in runs[0].data.params.items()}


def of_trackio() -> tuple[Points, set[str], dict[str, Any]]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    runs = list(trackio.Api().runs("tiny"))
    logs = SQLiteStorage.get_logs("tiny", runs[0].name)
    points: Points = Counter(
        (name, row["step"])
        for row in logs
        for name, value in row.items()
        if name not in ("step", "timestamp") and isinstance(value, int | float)
    )
    assert sum("curves" in row for row in logs) == 1
    config = runs[0].config or {}
    return points, {run.id for run in runs}, {"train.seed": config["train.seed"]}


@pytest.fixture(params=["wandb", "mlflow", "trackio", pytest.param("sqlite", marks=pytest.mark.exhaustive)])
def settings(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    package = {"sqlite": "mlflow"}.get(request.param, request.param)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    # MLflow asks before it writes to plain files, which is what a test without a database wants.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)  # with a database MLflow puts artifacts beside the process
    pytest.importorskip(package, reason=f"the extra {package} is not installed")
    uris = {"mlflow": f"file:{tmp_path}/store", "sqlite": f"sqlite:///{tmp_path}/store.db"}
    return {
        "wandb": WandbSettings(mode="offline"),
        "mlflow": MlflowSettings(uri=uris.get(request.param)),
        "trackio": TrackioSettings(),
    }[package]


def test_a_run_that_was_killed_resumed_and_ended_twice_is_one_run_with_every_value_once(
    settings: Settings, tmp_path: Path
) -> None:
    run = tmp_path / "tiny-run"
    run.mkdir()
    Image.new("RGB", (8, 8), "red").save(run / "curves.png")
    train(run, settings, range(1, 7), 0, ends=False)
    train(run, settings, range(4, 9), 3)  # its checkpoint was that of step 3
    train(run, settings, range(0), 8)  # started again, with nothing left to train
    assert "switched off" not in (run / "log.txt").read_text()
    if isinstance(settings, WandbSettings):
        points, ids, config = of_wandb(run)
    elif isinstance(settings, MlflowSettings):
        points, ids, config = of_mlflow(settings)
    else:
        points, ids, config = of_trackio()
    wanted = {(name, step) for name in ("step/loss", "epoch") for step in range(1, 9)}
    wanted |= {(name, step) for name in ("val/loss", "cosine/a/b") for step in (4, 8)}
    wanted |= {("best/test/a/accuracy", 8)}
    assert len(ids) == 1
    assert points == Counter(wanted)
    assert config == {"train.seed": 3}


def test_a_server_that_is_not_there_is_not_waited_for_for_minutes_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # one's own word holds
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    run = tmp_path / "run"
    run.mkdir()
    Image.new("RGB", (2, 2)).save(run / "curves.png")
    train(run, MlflowSettings(uri="http://127.0.0.1:9"), range(1, 5), 0)
    assert "mlflow" in capsys.readouterr().out
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "20"
