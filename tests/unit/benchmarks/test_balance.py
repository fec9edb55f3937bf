"""The benchmark of balancing: every contender makes its steps, and every solver its solves."""

from __future__ import annotations

import io
from dataclasses import replace
from importlib.util import find_spec
from itertools import repeat

import pytest
import torch
from rich.console import Console

from benchmarks.balance import gramians, limit, measure_balance, solve_times
from benchmarks.contenders import LIBMTL, METHODS, Peer, balanced, balancing_contenders
from benchmarks.measuring import first
from benchmarks.memory import Case, peaks
from benchmarks.training import Scene, build_parts, build_trainer, random_batch
from mtl_dist.balance.cagrad import CAGrad
from mtl_dist.balance.upgrad import UPGrad
from mtl_dist.engine.connect import Connection, connect
from mtl_dist.engine.settings import EngineSettings

SCENE = Scene("simple_cnn", batch=2, image_size=32, optimizer="sgd")


@pytest.fixture(scope="module")
def connection() -> Connection:
    return connect(EngineSettings(), "fp32")


def nothing(samples: int) -> None:
    """Takes in that a step was made."""


def test_every_contender_takes_its_turns_and_has_a_line(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.balance.memory_is_measured", lambda: False)
    names = [name for name in balancing_contenders() if name != LIBMTL]
    findings = measure_balance(SCENE, connection, names, repeats=2)
    assert [row["method"] for row in findings.rows] == names
    assert all(row["least"] > 0 for row in findings.rows)  # type: ignore[operator]
    text = io.StringIO()
    findings.show(Console(file=text, width=120))
    for name in names:
        assert name in text.getvalue()


def test_what_is_promised_grows_with_the_tasks_at_the_parameters_alone() -> None:
    ten = replace(SCENE, num_tasks=10)
    assert (limit("pcgrad, parameters", SCENE), limit("pcgrad, parameters", ten)) == (3.25, 8.5)
    assert limit("famo", SCENE) == limit("famo", ten) == 1.03
    assert limit("cagrad, features", replace(SCENE, num_masks=1)) is None


@pytest.mark.parametrize("name", ["equal", "pcgrad, parameters", "graddrop"])
def test_a_step_moves_the_weights_that_all_methods_share(connection: Connection, name: str) -> None:
    trainer = build_trainer(SCENE, connection, METHODS[name])
    before = [p.detach().clone() for p in trainer.root.model.parameters()]
    trainer.run(first(repeat(random_batch(SCENE, connection.world.device)), 1))
    after = list(trainer.root.model.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.exhaustive
def test_the_peak_of_a_training_holds_its_weights_gradients_and_momentum() -> None:
    size = 4 * sum(p.numel() for p in build_parts(SCENE)[0].parameters())
    equal, pcgrad = (peaks(Case(SCENE, contender=name)) for name in ("equal", "pcgrad, parameters"))
    assert min(equal.training[0], pcgrad.training[0]) > 3 * size
    assert (equal.state >= 2 * size, pcgrad.state) == (True, 0)


@pytest.mark.skipif(find_spec("torchjd") is None, reason="torchjd is not installed")
def test_torchjds_step_is_ours_with_the_same_method(connection: Connection) -> None:
    # Two tasks are projected in one order only.
    scene = replace(SCENE, num_tasks=2)
    trainer = build_trainer(scene, connection, METHODS["pcgrad, parameters"])
    ours, theirs = trainer.root.model, Peer(scene, connection)
    for module in (*ours.modules(), *theirs.model.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    start = [p.detach().clone() for p in ours.shared_parameters()]
    torch.manual_seed(1)
    batch = random_batch(scene, connection.world.device)
    theirs.batch = batch
    trainer.run(first(repeat(batch), 1))
    theirs.torchjd(1)(1, nothing)
    for before, mine, other in zip(start, ours.shared_parameters(), theirs.shared, strict=True):
        torch.testing.assert_close(mine - before, other - before, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("num_tasks", [2, 10])
def test_every_kind_of_gramian_is_solved(num_tasks: int) -> None:
    assert all(torch.linalg.eigvalsh(gramian)[-1] > 0 for gramian in gramians(num_tasks).values())
    for method in (CAGrad, UPGrad):
        times = solve_times(method, num_tasks, repeats=1)
        assert times.keys() == gramians(num_tasks).keys()


@pytest.mark.skipif(find_spec("LibMTL") is None, reason="LibMTL is not installed")
def test_libmtls_step_is_taken_where_it_is_installed(connection: Connection) -> None:
    made: list[int] = []
    balanced(SCENE, connection, LIBMTL)(2, made.append)
    assert made == [2, 2]
