"""Callbacks hear of every moment once, and change nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mtl_dist.errors import UserError
from tests.tiny_runs import rows, tensors_at, train_run

pytestmark = pytest.mark.slow

WATCHED = ["train.evaluate_every=2", "callbacks=[tests.watching.Watching]"]
MOMENTS = [
    "start 0",
    "epoch_end 4 train",
    "evaluation_end 8 train val",
    "epoch_end 8 train val",
    "evaluation_end 12 train val",
    "epoch_end 12 train val",
]


def moments(run: Path) -> list[str]:
    return (run / "moments.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def watched(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("watched") / "run"
    train_run(recipe, run, [*WATCHED, "train.evaluate_at_end=true"])
    return run


def test_a_callback_hears_of_every_moment_in_order(watched: Path) -> None:
    assert moments(watched) == [*MOMENTS, "end 12 best"]


def test_a_run_with_callbacks_computes_what_it_computes_without_to_the_bit(
    recipe: Path, watched: Path, tmp_path: Path
) -> None:
    train_run(recipe, tmp_path / "run", WATCHED[:1])
    expected, found = tensors_at(tmp_path / "run", 12), tensors_at(watched, 12)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert rows(watched, "step") == rows(tmp_path / "run", "step")


def test_a_resume_calls_no_moment_twice_but_the_start(recipe: Path, watched: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(watched, run)
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    (run / "callbacks.json").write_text(json.dumps({"epoch_end": 12, "evaluation_end": 8}))
    train_run(recipe, run, WATCHED)
    assert moments(run)[7:] == ["start 8", "evaluation_end 12 train val", "end 12"]
    (run / "callbacks.json").write_text("{")
    train_run(recipe, run, WATCHED)
    assert moments(run)[10:] == ["start 12", "end 12"]
    assert "callbacks may be called again" in (run / "log.txt").read_text()


@pytest.mark.parametrize(
    ("callback", "line"),
    [
        (
            "{kind: tests.watching.Failing, how: raises}",
            r"callbacks\.0 \(tests\.watching\.Failing\) failed in epoch_end at step 4: KeyError: 'room' "
            r"\(watching\.py:\d+\)\.",
        ),
        ("{kind: tests.watching.Failing, how: exits}", r"epoch_end at step 4: SystemExit: 3 \(watching\.py"),
        ("{kind: tests.watching.Failing, how: returns}", r"expected nothing returned, found True"),
        ("{kind: tests.watching.Failing, how: writes}", r"TypeError: 'mappingproxy' object does not support"),
        ("tests.watching.Unmade", r"\(tests\.watching\.Unmade\) failed in its constructor: RuntimeError"),
    ],
)
def test_a_callback_that_fails_ends_the_run_with_one_line(
    recipe: Path, tmp_path: Path, callback: str, line: str
) -> None:
    with pytest.raises(UserError, match=line) as ended:
        train_run(recipe, tmp_path / "run", [f"callbacks=[{callback}]", "train.max_steps=4"])
    assert "\n" not in str(ended.value)
