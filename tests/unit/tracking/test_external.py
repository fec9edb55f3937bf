"""External dashboards: one run there however often it resumes, and no row twice."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mtl_dist.config.loading import load_settings
from mtl_dist.config.settings import Settings
from mtl_dist.errors import UserError
from mtl_dist.tracking.external import TrackioSettings, WandbSettings, WandbSink, flat
from mtl_dist.tracking.registry import OPENERS, TrackingSettings, check_tracking, open_tracker
from mtl_dist.tracking.sink import Row, RunFacts, Sink


class FakeRun:
    """As wandb's and Trackio's runs: keeps what it is given."""

    def __init__(self, **given: Any) -> None:
        self.init = given
        self.summary: dict[str, float] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(params=["wandb", "trackio"])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of that name whose runs only keep what they are given."""
    module = ModuleType(request.param)
    vars(module).update(init=FakeRun, Image=lambda path: f"image {path}", Settings=dict)
    monkeypatch.setitem(sys.modules, request.param, module)
    return str(request.param)


def opened(service: str, run: RunFacts) -> tuple[Sink, FakeRun]:
    settings = {"wandb": WandbSettings(mode="offline"), "trackio": TrackioSettings(project="mine")}[service]
    sink = OPENERS[type(settings)](settings, run)
    fake = vars(sink)["_run"]
    assert isinstance(fake, FakeRun)
    return sink, fake


def row(kind: str, step: int, **metrics: float) -> Row:
    return Row(kind, step, step / 4, 0.0, metrics)


def test_a_run_sends_its_recipe_and_every_row_without_what_is_undefined(service: str) -> None:
    facts = RunFacts(Path("runs/x/1"), name="x", run_id="0123456789", recipe={"train": {"seed": 3}})
    sink, fake = opened(service, facts)
    sink.row(row("step", 1, loss=0.5, auroc=math.nan))
    sink.picture("curves", Path("curves.png"), 4)
    sink.results({"best/test/a/accuracy": 0.9}, 4)
    sink.close()
    assert fake.init["config"] == {"train.seed": 3}
    assert fake.init["project"] == {"wandb": "x", "trackio": "mine"}[service]
    assert fake.logged[:2] == [(1, {"epoch": 0.25, "loss": 0.5}), (4, {"curves": "image curves.png"})]
    assert {"best/test/a/accuracy": 0.9} in (fake.summary, fake.logged[-1][1])
    assert fake.finished


def test_a_resumed_run_is_the_same_there_and_passes_over_what_it_writes_again(service: str) -> None:
    facts = RunFacts(Path("run"), run_id="0123456789", rewritten=frozenset({("step", 5), ("step", 6)}))
    _, before = opened(service, RunFacts(Path("run"), run_id="0123456789"))
    sink, fake = opened(service, facts)
    for each in (row("step", 5), row("step", 6), row("epoch", 6), row("step", 7)):
        sink.row(each)
    assert [step for step, _ in fake.logged] == [6, 7]
    assert fake.init == before.init
    assert fake.init["resume"] == "allow"


def test_the_id_of_a_run_is_kept_by_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RunFacts] = []

    class Seen(WandbSink):
        def __init__(self, settings: WandbSettings, run: RunFacts) -> None:
            seen.append(run)

        def close(self) -> None:
            return

    monkeypatch.setitem(OPENERS, WandbSettings, Seen)
    for resumed_step in (0, 3):
        open_tracker(tmp_path, resumed_step=resumed_step, tracking=(WandbSettings(),)).close()
    assert seen[0].run_id == seen[1].run_id != ""
    assert [run.resumed_step for run in seen] == [0, 3]


def test_a_dashboard_that_cannot_be_opened_is_reported_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(settings: Settings, run: RunFacts) -> Sink:
        raise ConnectionError("no network")

    monkeypatch.setitem(OPENERS, WandbSettings, refused)
    tracker = open_tracker(tmp_path, tracking=(WandbSettings(),))
    tracker.record("step", 1, 0.5, {"step/loss": 1.0})
    tracker.close()
    log = (tmp_path / "log.txt").read_text()
    assert (
        "tracking by wandb failed and is switched off, training goes on: ConnectionError: no network" in log
    )
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step/loss"] == 1.0


class OnlyTracking(Settings):
    tracking: TrackingSettings = ()


def test_a_missing_package_and_a_misspelt_kind_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtl_dist.tracking import registry

    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^tracking.0: expected the package wandb .*pip install wandb$"):
        check_tracking((WandbSettings(),))
    (tmp_path / "x.yaml").write_text("tracking: [{kind: tensorbord}]")
    with pytest.raises(UserError, match=r"tracking.0.kind: .*tensorboard"):
        load_settings(OnlyTracking, tmp_path / "x.yaml")


def test_nested_settings_go_by_their_dotted_names() -> None:
    values = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": True}
    assert flat(values) == {"a.b": 1, "a.c": "[1, 2]", "d": "None", "e": True}
