"""Kills at random moments, full disks and damaged checkpoints: in the end the run that never was disturbed.

`KILLS=1000 python -m pytest tests/faults/test_kills.py` kills as often as that.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.killed_runs import Kill, Killing, flip_in_newest, samples_of_steps
from tests.tiny_datasets import write_dataset
from tests.tiny_runs import rows, tensors_at, write_recipe

KILLS = int(os.environ.get("KILLS", "200"))
NUM_TRAIN, NUM_STEPS = 30, 12  # 3 epochs, 8 samples at a time
OVERRIDES = [
    "train.checkpoint_every=2",
    "train.keep_last=3",
    "train.evaluate_at_end=true",
    "optim.schedule={kind: constant}",
    "optim.ema=0.9",
    "tracking=[]",
]


@dataclass(frozen=True)
class Way:
    """Ranks and engines, in turn for each attempt."""

    ranks: tuple[int, ...]
    engines: tuple[str, ...] = ("{}",)

    @property
    def is_mixed(self) -> bool:
        return len(self.ranks) > 1 or len(self.engines) > 1


ZERO_2 = "{kind: deepspeed, zero_stage: 2}"
WAYS = {
    "one process": Way((1,)),
    "two ranks": Way((2,)),
    "two ranks, ZeRO 2": Way((2,), (ZERO_2,)),
    "ranks 1, 2, 2, 1": Way((1, 2, 2, 1)),
    "ranks 1, 2, 2, 1, DDP and ZeRO": Way((1, 2, 2, 1), ("{}", ZERO_2, "{}", "{}")),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_dataset(directory / "tiny", {"train": NUM_TRAIN, "val": 9, "test": 7})
    return write_recipe(directory, directory / "tiny")


@pytest.fixture(scope="module")
def killing() -> Killing:
    return Killing()


def disturbed(
    killing: Killing, recipe: Path, run: Path, way: Way, beats: int, most: int, draw: np.random.Generator
) -> int:
    """Start the run again and again until it is done; how many kills it took."""
    kills = 0
    for number in range(4 * most + 8):
        ranks, engine = way.ranks[number % len(way.ranks)], way.engines[number % len(way.engines)]
        full = kills < most and number > 0 and draw.random() < 0.1
        kill = None
        if kills < most and not full:
            # Late enough for a checkpoint now and then, or nothing would ever be resumed.
            beat = int(draw.integers(1, beats))
            kill = Kill(int(draw.integers(ranks)), beat, float(draw.uniform(0, 0.03)))
        if number and draw.random() < 0.15 and flip_in_newest(run / "checkpoints", draw):
            killing.count["damaged checkpoints"] += 1
        attempt = killing.attempt(
            recipe,
            run,
            [*OVERRIDES, f"engine={engine}"],
            ranks=ranks,
            kill=kill,
            full=0 if full else None,
            dropout=not way.is_mixed,
            grace_s=float(draw.choice([0.0, 0.1])),
        )
        kills += -9 in attempt.codes
        if attempt.done:
            return kills
        assert kill is not None or full, Path(f"{run}.0.log").read_text()[-2000:]
    raise AssertionError("it is never done")


def check_samples(run: Path) -> None:
    """Every epoch used each sample once; the last step of the run is filled up with nothing."""
    used = samples_of_steps(run)
    assert sorted(used) == list(range(NUM_STEPS))
    counts = Counter(key for keys in used.values() for key in keys)
    assert len(counts) == NUM_TRAIN and set(counts.values()) == {3}


def check(run: Path, reference: Path, *, exactly: bool) -> None:
    found, expected = tensors_at(run, NUM_STEPS), tensors_at(reference, NUM_STEPS)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if exactly:
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)
        else:
            scale = float(tensor.abs().max()) if tensor.numel() else 0.0
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5 * scale + 2e-6, msg=name)
    for kind in ("step", "epoch"):
        for ours, theirs in zip(rows(run, kind), rows(reference, kind), strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                if exactly:
                    assert ours[name] == value, name
                else:
                    assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), name
    ours, theirs = (json.loads((one / "evaluation" / "metrics.json").read_text()) for one in (run, reference))
    for split, tasks in theirs.items():
        for task, values in tasks.items():
            assert ours[split][task]["num_samples"] == values["num_samples"]
    check_samples(run)


def run_way(killing: Killing, recipe: Path, folder: Path, name: str, kills: int, each: int) -> int:
    """Runs of one way until there were so many kills, at most `each` in one run; how many there were."""
    way = WAYS[name]
    draw = np.random.default_rng([14, *name.encode()])
    reference = folder / "undisturbed"
    whole = killing.attempt(
        recipe,
        reference,
        [*OVERRIDES, f"engine={way.engines[0]}"],
        ranks=way.ranks[0],
        dropout=not way.is_mixed,
    )
    assert whole.done, (folder / "undisturbed.0.log").read_text()[-2000:]
    check_samples(reference)
    made = 0
    for number in range(kills):
        if made >= kills:
            break
        run = folder / f"run_{number}"
        made += disturbed(killing, recipe, run, way, whole.beats, min(each, kills - made), draw)
        check(run, reference, exactly=not way.is_mixed)
    return made


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_is_the_undisturbed_one(
    killing: Killing, recipe: Path, tmp_path: Path
) -> None:
    assert run_way(killing, recipe, tmp_path, "one process", 3, 3) == 3


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", WAYS)
def test_runs_that_are_killed_hundreds_of_times_are_the_undisturbed_ones(
    killing: Killing, recipe: Path, tmp_path: Path, name: str
) -> None:
    made = run_way(killing, recipe, tmp_path, name, KILLS // len(WAYS), 8)
    print(f"{name}: {made} kills; so far {dict(killing.count)}")
    assert made >= KILLS // len(WAYS)
