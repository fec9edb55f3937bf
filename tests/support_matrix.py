"""docs/support.md: what was tried and held. Written by

    python -m tests.support_matrix

which runs every method of balancing under every engine on this machine (two gloo ranks) and compares each
with one process and whole windows.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import get_args

from mtl_dist.engine.precision import Precision
from mtl_dist.models.settings import Checkpointing
from tests.ranks import shared_pool
from tests.tiny_balancing import (
    BALANCES,
    Balance,
    Case,
    EngineName,
    Labels,
    Result,
    difference,
    reference,
    train,
    train_all,
)

DOCUMENT = Path(__file__).parents[1] / "docs" / "support.md"

ENGINES: tuple[EngineName, ...] = get_args(EngineName)
LABELS: tuple[Labels, ...] = get_args(Labels)
ACCUMULATIONS = (1, 2)
CHECKPOINTINGS: tuple[Checkpointing, ...] = ("stage", "block")
LOW_PRECISIONS: tuple[Precision, ...] = ("bf16", "fp16")

RECOMPUTING_ENGINES: tuple[EngineName, ...] = ("single", "ddp", "zero3")
"""Where low precisions meet gradient checkpointing; ZeRO 1 and 2 have the weights of DDP, in minutes."""

LARGEST_DIFFERENCE = 1e-5
"""Between float32 sums of another order, see `difference`; in one process 3e-6 was the largest seen."""

ROUNDING = {"bf16": 0.2, "fp16": 0.05}
"""Between a low precision and float32: the rounding of gradients (2^-9, 2^-12), which the solvers of some
methods enlarge where gradients are nearly parallel; 0.12 and 0.02 were the largest seen."""

CASES_AT_A_TIME = 31

Outcomes = dict[Case, str]
"""How each training ended: \"\" for well, a refusal, or what was wrong."""


def size_of(engine: EngineName) -> int:
    return 1 if engine == "single" else 2


def exact_cases() -> list[Case]:
    return [Case(*ways) for ways in product(BALANCES, LABELS, ACCUMULATIONS)]


def checkpointing_cases() -> list[Case]:
    """Both ways to recompute, each with another number of micro-batches."""
    return [
        Case(balance, "partial", accumulation, checkpointing=checkpointing)
        for balance in BALANCES
        for accumulation, checkpointing in zip(ACCUMULATIONS, CHECKPOINTINGS, strict=True)
    ]


def low_precision_cases(engine: EngineName) -> list[Case]:
    """Each precision without gradient checkpointing, and with one way to recompute."""
    return [
        Case(balance, "full", 2, precision, num_steps=1, checkpointing=checkpointing)
        for precision, recomputing in zip(LOW_PRECISIONS, CHECKPOINTINGS, strict=True)
        for checkpointing in (("off", recomputing) if engine in RECOMPUTING_ENGINES else ("off",))
        for balance in BALANCES
    ]


def by_rank(engine: EngineName, cases: list[Case]) -> list[list[Result]]:
    """What each rank found, asked for some of the cases at a time: an answer may only take so long."""
    pool = shared_pool(size_of(engine))
    found: list[list[Result]] = [[] for _ in range(size_of(engine))]
    for start in range(0, len(cases), CASES_AT_A_TIME):
        answers = pool.run(train_all, engine, cases[start : start + CASES_AT_A_TIME])
        for own, answer in zip(found, answers, strict=True):
            own += answer
    return found


@cache
def exact_outcomes(engine: EngineName) -> Outcomes:
    """Every method in float32: the numbers of one process with whole windows, or a refusal."""
    cases = exact_cases()
    found = by_rank(engine, cases)
    outcomes = {}
    for case, first, *others in zip(cases, *found, strict=True):
        outcomes[case] = first.refusal or _exact_outcome(first, others, reference(case))
    return outcomes


def _exact_outcome(first: Result, others: list[Result], expected: Result) -> str:
    apart = difference(first, expected)
    if not apart <= LARGEST_DIFFERENCE:
        return f"wrong by {apart:.1e}"
    if any(not a.equal(b) for other in others for a, b in zip(first.weights, other.weights, strict=True)):
        return "wrong: not the same weights on every rank"
    return ""


@cache
def checkpointing_outcomes(engine: EngineName) -> Outcomes:
    """Every method with gradient checkpointing: the numbers of one process which stores all activations."""
    cases = checkpointing_cases()
    found = by_rank(engine, cases)
    outcomes = {}
    for case, first, *others in zip(cases, *found, strict=True):
        plain = case.with_(checkpointing="off")
        outcomes[case] = first.refusal or _exact_outcome(first, others, reference(plain))
    return outcomes


@cache
def low_precision_outcomes(engine: EngineName) -> Outcomes:
    """Every method in bf16 and fp16: the numbers of one process with the same micro-batches, which round
    alike, and all activations stored; for one process itself, those of float32 as far as the rounding lets
    them."""
    cases = low_precision_cases(engine)
    found = by_rank(engine, cases)[0]
    outcomes = {}
    for case, first in zip(cases, found, strict=True):
        outcomes[case] = first.refusal or _low_outcome(first, case, size_of(engine))
    return outcomes


def _low_outcome(found: Result, case: Case, num_ranks: int) -> str:
    if found.skipped[0]:
        return "wrong: the step was skipped"
    plain = case.with_(checkpointing="off")
    if num_ranks > 1:
        expected = same_micro_batches(plain.with_(accumulation=num_ranks * case.accumulation))
        largest = LARGEST_DIFFERENCE
    else:
        expected = reference(plain.with_(precision="fp32"))
        largest = ROUNDING[case.precision]
    if found.num_unconverged != expected.num_unconverged:
        return "wrong: no weights were found"
    apart = difference(found, expected)
    return "" if apart <= largest else f"wrong by {apart:.1e}"


@cache
def same_micro_batches(case: Case) -> Result:
    return train("single", case)


def render() -> str:
    """The document, from what happened."""
    notes: dict[str, int] = {}
    lines = [
        "# What works with what",
        "",
        "Written by `python -m tests.support_matrix`, which tries all of it on two gloo ranks; a test holds",
        "the file to that. *yes*: for full, partial and disjoint labels, and with 1 and 2 micro-batches per",
        f"step, the tasks' weights and the model's update are those of one process with the whole batch, to"
        f" {LARGEST_DIFFERENCE:g}",
        "of the largest, also with gradient checkpointing by stage or by block; in bf16 and fp16 those of",
        "one process with the same micro-batches and without checkpointing (bf16 by stage, fp16 by block:",
        "in one process, under DDP and ZeRO 3). The last three columns are of all engines which are not",
        "refused. A number is a refusal at the start of the run, below the table.",
        "",
        "| method | level | one process | DDP | ZeRO 1 | ZeRO 2 | ZeRO 3 | disjoint labels | bf16 | fp16 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for balance in BALANCES:
        cells = [balance.method, balance.level or ""]
        cells += [
            _cell(
                [
                    _exact(balance, engine, "full"),
                    _exact(balance, engine, "partial"),
                    _checkpointed(balance, engine),
                ],
                notes,
            )
            for engine in ENGINES
        ]
        where = [engine for engine in ENGINES if not any(_exact(balance, engine, "full"))]
        cells.append(_cell([_exact(balance, engine, "disjoint") for engine in where], notes))
        cells += [
            _cell([_low(balance, engine, precision) for engine in where], notes)
            for precision in LOW_PRECISIONS
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {line}" for line, number in notes.items()), ""]
    return "\n".join(lines)


def _exact(balance: Balance, engine: EngineName, labels: Labels) -> list[str]:
    return [exact_outcomes(engine)[Case(balance, labels, a)] for a in ACCUMULATIONS]


def _checkpointed(balance: Balance, engine: EngineName) -> list[str]:
    return [said for case, said in checkpointing_outcomes(engine).items() if case.balance == balance]


def _low(balance: Balance, engine: EngineName, precision: Precision) -> list[str]:
    return [
        outcome
        for case, outcome in low_precision_outcomes(engine).items()
        if case.balance == balance and case.precision == precision
    ]


def _cell(outcomes: list[list[str]], notes: dict[str, int]) -> str:
    said = {outcome for group in outcomes for outcome in group}
    if said == {""}:
        return "yes"
    # The lines name tasks and methods; what is general about them comes before the first of these.
    return ", ".join(str(notes.setdefault(line, len(notes) + 1)) for line in sorted(said - {""}))


if __name__ == "__main__":
    DOCUMENT.write_text(render())
    print(f"wrote {DOCUMENT}")
