"""The benchmark of balancing: every contender makes its steps, and every solver its solves."""

from __future__ import annotations

import io
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console

from benchmarks.balance import (
    LIBMTL,
    METHODS,
    TORCHJD,
    Material,
    Scene,
    Trainee,
    _table,
    _times,
    gramians,
    solve_times,
)
from mtl_dist.balance.cagrad import CAGradSettings
from mtl_dist.balance.upgrad import UPGradSettings

SCENE = Scene("simple_cnn", num_tasks=3, num_masks=0, image_size=32, batch=2, device="cpu")


def test_every_contender_takes_its_turns_and_has_a_line() -> None:
    names = [*METHODS, *(TORCHJD if find_spec("torchjd") else [])]
    times = _times(SCENE, names, repeats=2)
    assert all(len(own) == 2 and min(own) > 0 for own in times.values())
    text = io.StringIO()
    Console(file=text, width=120).print(_table(SCENE, dict.fromkeys(names, 2**20), times))
    for name in names:
        assert name in text.getvalue()


def test_a_step_moves_the_weights_that_all_methods_share() -> None:
    material = Material(SCENE)
    for name in ("equal", "pcgrad, parameters", "graddrop"):
        before = [p.detach().clone() for p in material.model.parameters()]
        Trainee(material, METHODS[name]).step()
        after = list(material.model.parameters())
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), name


@pytest.mark.skipif(find_spec("torchjd") is None, reason="torchjd is not installed")
def test_torchjds_step_is_ours_with_the_same_method() -> None:
    # Two tasks are projected in one order only.
    scene = replace(SCENE, num_tasks=2)
    ours, theirs = Material(scene), Material(scene)
    for module in (*ours.model.modules(), *theirs.model.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    start = [p.detach().clone() for p in ours.model.shared_parameters()]
    Trainee(ours, METHODS["pcgrad, parameters"]).step()
    Trainee(theirs, METHODS["equal"]).step_of_torchjd(1)
    pairs = zip(start, ours.model.shared_parameters(), theirs.model.shared_parameters(), strict=True)
    for before, mine, other in pairs:
        torch.testing.assert_close(mine - before, other - before, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("num_tasks", [2, 10])
def test_every_kind_of_gramian_is_solved(num_tasks: int) -> None:
    assert all(torch.linalg.eigvalsh(gramian)[-1] > 0 for gramian in gramians(num_tasks).values())
    for method in (CAGradSettings, UPGradSettings):
        times = solve_times(method, num_tasks, repeats=1)
        assert times.keys() == gramians(num_tasks).keys()


@pytest.mark.skipif(find_spec("LibMTL") is None, reason="LibMTL is not installed")
def test_libmtls_step_is_taken_where_it_is_installed() -> None:
    assert min(_times(SCENE, ["equal", LIBMTL], repeats=1)[LIBMTL]) > 0
