"""Balancing is the same on any number of ranks, under any engine, however a window is cut, or is refused."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from tests.ranks import shared_pool
from tests.support_matrix import (
    DOCUMENT,
    ENGINES,
    LARGEST_DIFFERENCE,
    Outcomes,
    checkpointing_cases,
    checkpointing_outcomes,
    exact_cases,
    exact_outcomes,
    kind_outcomes,
    low_precision_cases,
    low_precision_outcomes,
    outcomes,
    pairs,
    promised,
    render,
    sharing_outcomes,
    size_of,
    some_sharing_cases,
)
from tests.tiny_balancing import Balance, Case, EngineName, Result, difference, train, train_all

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RANKS: tuple[EngineName, ...] = ("ddp", "zero1", "zero2", "zero3")


def run(engine: EngineName, cases: list[Case]) -> list[Result]:
    return shared_pool(size_of(engine)).run(train_all, engine, cases)[0]


def wrong(outcomes: Outcomes) -> Outcomes:
    return {case: said for case, said in outcomes.items() if said.startswith("wrong")}


@pytest.mark.parametrize("engine", ENGINES)
def test_any_two_ways_to_train_give_what_the_support_matrix_says(engine: EngineName) -> None:
    found = outcomes(engine, pairs()[engine])
    others = {case: said for case, said in found.items() if said not in promised(case, engine)}
    assert others == {}


def test_the_chosen_trainings_hold_every_pair_that_is_not_refused() -> None:
    met = {
        frozenset(pair)
        for engine, cases in pairs().items()
        for case in cases
        if promised(case, engine) == {""}
        for pair in combinations((engine, *ways_of(case)), 2)
    }
    for engine in ENGINES:
        for case in (*exact_cases(), *checkpointing_cases(), *low_precision_cases(engine)):
            if promised(case, engine) == {""}:
                missing = [p for p in combinations((engine, *ways_of(case)), 2) if frozenset(p) not in met]
                assert missing == [], (engine, case)


def ways_of(case: Case) -> tuple[object, ...]:
    return case.balance, case.labels, case.accumulation, case.precision, case.checkpointing


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ENGINES)
def test_every_method_gives_the_weights_and_the_update_of_one_process_or_is_refused(
    engine: EngineName,
) -> None:
    assert wrong(exact_outcomes(engine)) == {}


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ENGINES)
def test_every_method_balances_every_kind_of_task(engine: EngineName) -> None:
    assert wrong(kind_outcomes(engine)) == {}


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ENGINES)
def test_every_method_works_in_low_precision(engine: EngineName) -> None:
    assert wrong(low_precision_outcomes(engine)) == {}


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ENGINES)
def test_gradient_checkpointing_changes_nothing_for_any_method(engine: EngineName) -> None:
    assert wrong(checkpointing_outcomes(engine)) == {}


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_every_way_of_sharing_gives_the_update_of_one_process_or_is_refused(engine: EngineName) -> None:
    found = outcomes(engine, some_sharing_cases())
    assert wrong(found) == {}
    stitched = [said for case, said in found.items() if case.sharing == "cross_stitch" and case.balance.level]
    assert any("tasks that meet at the features alone" in said for said in stitched)
    kept = {case.sharing for case, said in found.items() if not said and case.balance.level}
    assert kept >= {"mtan", "mmoe"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ENGINES)
def test_every_way_of_sharing_works_with_all_sorts_of_labels(engine: EngineName) -> None:
    assert wrong(sharing_outcomes(engine)) == {}


@pytest.mark.exhaustive
def test_the_support_matrix_says_what_these_tests_found() -> None:
    assert DOCUMENT.read_text() == render(), "write it again with `python -m tests.support_matrix`"


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_solved_every_so_often_are_kept_in_between(engine: EngineName) -> None:
    level = "features" if engine == "zero3" else "parameters"
    cases = [
        Case(Balance("mgda", level, every=2, scale_heads=scale), accumulation=a)
        for scale in (False, True)
        for a in (1, 2)
    ]
    for case, result in zip(cases, run(engine, cases), strict=True):
        assert torch.equal(result.weights[0], result.weights[1])
        assert not torch.equal(result.weights[1], result.weights[2])
        assert difference(result, train("single", case.with_(accumulation=1))) < LARGEST_DIFFERENCE


@pytest.mark.parametrize(
    ("engine", "balance"),
    [
        *product(("ddp", "zero1", "zero2", "zero3"), (Balance("nash", "features"), Balance("stch"))),
        *product(("ddp", "zero1", "zero2"), (Balance("cagrad", "parameters"),)),
        ("ddp", Balance("graddrop")),
        ("ddp", Balance("db-mtl")),
    ],
    ids=str,
)
def test_an_infinite_value_on_one_rank_is_agreed_on_by_all(engine: EngineName, balance: Balance) -> None:
    case = Case(balance, precision="fp16", num_steps=2, explode_at=(1,))
    results = shared_pool(2).run(train, engine, case)
    for result in results:
        assert result.skipped == [False, True]
        # No solution: the weights of before are used again, on every rank.
        assert torch.equal(result.weights[0], result.weights[1])
        assert all(torch.equal(a, b) for a, b in zip(result.weights, results[0].weights, strict=True))
    assert results[0].num_unconverged == 1
    assert all(tensor.isfinite().all() for name, tensor in results[0].model.items() if "model." in name)


@pytest.mark.parametrize("engine", RANKS)
def test_diagnosis_changes_nothing_and_is_the_same_on_any_number_of_ranks(engine: EngineName) -> None:
    chosen = [Balance("equal"), Balance("stch"), Balance("cagrad", "features")]
    plain = [Case(balance, "partial", a) for balance in chosen for a in (1, 2)]
    watched = [case.with_(diagnose_every=2) for case in plain]
    for case, ours, theirs in zip(plain, run(engine, watched), run(engine, plain), strict=True):
        assert all(torch.equal(ours.model[name], theirs.model[name]) for name in ours.model)
        assert [bool(found) for found in ours.diagnoses] == [True, False, True]
        expected = train("single", case.with_(accumulation=1, diagnose_every=2)).diagnoses
        for found, wanted in zip(ours.diagnoses, expected, strict=True):
            assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("engine", ["single", "ddp", "zero2"])
def test_a_whole_model_of_the_users_is_balanced_as_one_of_the_package(engine: EngineName) -> None:
    cases = [
        Case(Balance(method, level), labels="partial", accumulation=accumulation, num_steps=2)
        for method, level in (("fixed", None), ("cagrad", "parameters"), ("graddrop", None))
        for accumulation in (1, 2)
        if engine != "zero2" or method != "graddrop"
    ]
    parts = run(engine, cases)
    whole = run(engine, [case.with_(network=True) for case in cases])
    for case, ours, theirs in zip(cases, whole, parts, strict=True):
        assert not ours.refusal and not theirs.refusal, (case, ours.refusal, theirs.refusal)
        for name, tensor in theirs.model.items():
            own = ours.model[
                name.replace("model.backbone.", "model.network.backbone.").replace(
                    "model.heads.", "model.network.heads."
                )
            ]
            torch.testing.assert_close(own, tensor, rtol=1e-4, atol=2e-6, msg=f"{case}: {name}")
