"""docs/support.md: what was tried and held. Written by

    python -m tests.support_matrix

which runs every method of balancing under every engine on this machine (two gloo ranks) and compares each
with one process and whole windows. The whole product of methods, engines, labels and so on is for
`make test-all`; for `make test`, `pairs` chooses a tenth of it in which any two of them meet, and
`documented` says what the document promises of each.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import product
from pathlib import Path
from typing import get_args

from mtl_dist.engine.settings import Precision
from mtl_dist.models.settings import Checkpointing
from tests.pairwise import pairwise
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
"""Where the whole product has low precisions with gradient checkpointing; ZeRO 1 and 2 have the weights of
DDP, in minutes."""

SHARINGS = ("separate", "cross_stitch", "mtan", "mmoe")
"""The ways of sharing besides that of all other trainings."""

SHARING_BALANCES = (Balance("equal"), Balance("cagrad", "features"), Balance("cagrad", "parameters"))
"""One for each place where gradients are told apart, or none."""

KIND_BALANCES = (
    *(Balance("uncertainty"), Balance("famo"), Balance("cagrad", "features")),
    Balance("mgda", "features", every=2, scale_heads=True),
    *(Balance("cagrad", "parameters"), Balance("nash", "parameters", every=2)),
    *(Balance("graddrop"), Balance("db-mtl")),
)
"""Those by which `make test` balances every kind of task at once, of each way to work: one that learns its
weights, one that looks at losses; at the features and at the parameters one that solves in every step and one
in every second; two that make a gradient of their own."""

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


# ------------------------------------------------------------------ the whole product
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


def sharing_cases() -> list[Case]:
    """Every way of sharing, with all sorts of labels."""
    return [
        Case(balance, labels, 1 if labels == "full" else 2, sharing=sharing)
        for sharing, balance, labels in product(SHARINGS, SHARING_BALANCES, LABELS)
    ]


def some_sharing_cases() -> list[Case]:
    """Every way of sharing with each method, and each sort of labels with some of these."""
    return [
        Case(balance, LABELS[(s + b) % len(LABELS)], 1 + (s + b) % 2, sharing=sharing)
        for (s, sharing), (b, balance) in product(enumerate(SHARINGS), enumerate(SHARING_BALANCES))
    ]


def kind_cases() -> list[Case]:
    """Every method with every kind of task at once, some of the labels missing."""
    balances = dict.fromkeys((*BALANCES, *KIND_BALANCES))
    return [
        Case(balance, "partial", accumulation, tasks="all kinds")
        for balance, accumulation in product(balances, ACCUMULATIONS)
    ]


# ------------------------------------------------------------------ every two of them
@cache
def pairs() -> dict[EngineName, list[Case]]:
    """By engine, trainings in which any two of method, engine, labels, accumulation, precision and
    checkpointing meet, as far as the document says that they may; such trainings with every kind of task at
    once; and every refusal of two."""
    cases: dict[EngineName, list[Case]] = {engine: [] for engine in ENGINES}

    def may_meet(one: object, other: object) -> bool:
        # The mean of few labels has large gradients: the first loss scale is too high, and nothing is learnt.
        if one in ("partial", "disjoint") and other == "fp16":
            return False
        return not isinstance(one, Balance) or documented(one).get(str(other), {""}) == {""}

    for balance, engine, labels, accumulation, precision, checkpointing in pairwise(
        BALANCES,
        ENGINES,
        LABELS,
        ACCUMULATIONS,
        ("fp32", *LOW_PRECISIONS),
        ("off", *CHECKPOINTINGS),
        may_meet=may_meet,
    ):
        num_steps = 3 if precision == "fp32" else 1
        cases[engine].append(Case(balance, labels, accumulation, precision, checkpointing, num_steps))
    for balance, engine, labels, accumulation in pairwise(
        KIND_BALANCES, ENGINES, ("full", "partial"), ACCUMULATIONS, may_meet=may_meet
    ):
        cases[engine].append(Case(balance, labels, accumulation, num_steps=2, tasks="all kinds"))
    for balance, engine in product(BALANCES, ENGINES):
        refused = [
            labels for labels in ("full", "disjoint") if promised(Case(balance, labels), engine) != {""}
        ]
        cases[engine] += [Case(balance, labels) for labels in refused]
    return cases


@cache
def documented(balance: Balance) -> dict[str, set[str]]:
    """What the document says of a method, by engine, "disjoint", precision and "all kinds": {""}, or the
    refusals."""
    text = DOCUMENT.read_text()
    notes = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    columns = (*ENGINES, "disjoint", *LOW_PRECISIONS, "all kinds")
    for line in text.splitlines():
        method, level, *cells = [cell.strip() for cell in line.split("|")[1:-1]] or ("", "")
        if (method, level) == (balance.method, balance.level or ""):
            said = [{""} if cell == "yes" else {notes[n] for n in cell.split(", ")} for cell in cells]
            return dict(zip(columns, said, strict=True))
    raise AssertionError(f"expected {balance} in {DOCUMENT}, found nothing of it")


def promised(case: Case, engine: EngineName) -> set[str]:
    """The outcomes that the document allows."""
    row = documented(case.balance)
    for column in (engine, case.labels, case.precision, case.tasks):
        if row.get(column, {""}) != {""}:
            return row[column]
    return {""}


# ------------------------------------------------------------------ how they end
def outcomes(engine: EngineName, cases: list[Case]) -> Outcomes:
    """Of trainings on the ranks of an engine, some at a time: an answer may only take so long."""
    pool = shared_pool(size_of(engine))
    found: Outcomes = {}
    for start in range(0, len(cases), CASES_AT_A_TIME):
        some = cases[start : start + CASES_AT_A_TIME]
        for case, first, *others in zip(some, *pool.run(train_all, engine, some), strict=True):
            found[case] = first.refusal or _outcome(case, first, others)
    return found


def _outcome(case: Case, first: Result, others: list[Result]) -> str:
    if case.precision != "fp32" and first.skipped[0]:
        return "wrong: the step was skipped"
    if any(not a.equal(b) for other in others for a, b in zip(first.weights, other.weights, strict=True)):
        return "wrong: not the same weights on every rank"
    expected, largest = _expected(case, 1 + len(others))
    if case.precision != "fp32" and first.num_unconverged != expected.num_unconverged:
        return "wrong: no weights were found"
    apart = difference(first, expected)
    return "" if apart <= largest else f"wrong by {apart:.1e}"


def _expected(case: Case, num_ranks: int) -> tuple[Result, float]:
    """What one process finds, and how far from it is too far. It stores all activations, and has whole
    windows; in a low precision the same micro-batches, which round alike; for one process itself, those of
    float32, as far as the rounding lets them."""
    plain = case.with_(checkpointing="off")
    if case.precision == "fp32":
        return reference(plain), LARGEST_DIFFERENCE
    if num_ranks > 1:
        return _same_micro_batches(
            plain.with_(accumulation=num_ranks * case.accumulation)
        ), LARGEST_DIFFERENCE
    return reference(plain.with_(precision="fp32")), ROUNDING[case.precision]


@cache
def _same_micro_batches(case: Case) -> Result:
    return train("single", case)


@cache
def exact_outcomes(engine: EngineName) -> Outcomes:
    """Every method in float32."""
    return outcomes(engine, exact_cases())


@cache
def checkpointing_outcomes(engine: EngineName) -> Outcomes:
    """Every method with gradient checkpointing."""
    return outcomes(engine, checkpointing_cases())


@cache
def sharing_outcomes(engine: EngineName) -> Outcomes:
    """Every way of sharing."""
    return outcomes(engine, sharing_cases())


@cache
def kind_outcomes(engine: EngineName) -> Outcomes:
    """Every kind of task."""
    return outcomes(engine, kind_cases())


@cache
def low_precision_outcomes(engine: EngineName) -> Outcomes:
    """Every method in bf16 and fp16."""
    return outcomes(engine, low_precision_cases(engine))


def render() -> str:
    """The document, from what happened."""
    notes: dict[str, int] = {}
    lines = [
        "# What works with what",
        "",
        "Written by `python -m tests.support_matrix`, which tries all of it on two gloo ranks; a test holds",
        "the file to that in `make test-all`, and in `make test` to trainings in which every two of these",
        "meet. *yes*: for full, partial and disjoint labels, and with 1 and 2 micro-batches per step, the",
        "tasks' weights and the model's update are those of one process with the whole batch, to"
        f" {LARGEST_DIFFERENCE:g}",
        "of the largest, also with gradient checkpointing by stage or by block; in bf16 and fp16 those of",
        "one process with the same micro-batches and without checkpointing (bf16 by stage, fp16 by block:",
        "in one process, under DDP and ZeRO 3). *all kinds*: in float32, with partial labels and without",
        "checkpointing, of every kind of task at once, by each loss in the second table but mse. The last",
        "four columns are of all engines which are not refused. A number is a refusal at the start of the",
        "run, below the table.",
        "",
        "All but *all kinds* is of classes and of numbers; all of it has one backbone for all tasks. Other",
        "ways of sharing ([sharing.md](sharing.md)) are in the last table.",
        "",
        "| method | level | one process | DDP | ZeRO 1 | ZeRO 2 | ZeRO 3 | disjoint labels | bf16 | fp16 "
        "| all kinds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
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
        cells.append(_cell([_of_all_kinds(balance, engine) for engine in where], notes))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {line}" for line, number in notes.items()), ""]
    # Written by hand: what test_dense_parity.py, test_engine_parity.py, test_adapter_runs.py and the cases of
    # sharing hold.
    other_tables = DOCUMENT.read_text().partition("\n## ")[2]
    return "\n".join([*lines, f"## {other_tables}"])


def _exact(balance: Balance, engine: EngineName, labels: Labels) -> list[str]:
    return [exact_outcomes(engine)[Case(balance, labels, a)] for a in ACCUMULATIONS]


def _checkpointed(balance: Balance, engine: EngineName) -> list[str]:
    return [said for case, said in checkpointing_outcomes(engine).items() if case.balance == balance]


def _of_all_kinds(balance: Balance, engine: EngineName) -> list[str]:
    return [
        said
        for case, said in kind_outcomes(engine).items()
        if (case.balance.method, case.balance.level) == (balance.method, balance.level)
    ]


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
