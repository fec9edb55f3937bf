"""Whether a run may go on with other settings or other data, and what is said of it.

docs/reliability.md has the table `RULES` in words; a test holds the two together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtl_dist.config.describe import show
from mtl_dist.data.facts import DataFacts, data_differences, source_differences
from mtl_dist.errors import UserError
from mtl_dist.recipe import Recipe

Verdict = Literal["refused", "accepted", "the best restarts"]

RULES: dict[str, Verdict] = {
    "name": "accepted",
    "start_from": "refused",
    "absent_tasks": "refused",
    "tasks": "refused",
    "joint_losses": "refused",
    "data": "refused",
    "data.val": "accepted",
    "data.test": "accepted",
    "data.image_size": "the best restarts",
    "data.resize": "the best restarts",
    "data.transforms": "the best restarts",
    "data.augment": "accepted",
    "data.blend": "accepted",
    "data.workers": "accepted",
    "data.cache": "accepted",
    "data.on_bad_sample": "accepted",
    "model": "refused",
    "model.checkpointing": "accepted",
    "balance": "refused",
    "balance.diagnose_every": "accepted",
    "optim": "accepted",
    "optim.kind": "refused",
    "optim.ema": "refused",
    "train": "accepted",
    "train.global_batch": "refused",
    "train.seed": "refused",
    "engine": "accepted",
    "monitor": "accepted",
    "monitor.metric": "the best restarts",
    "monitor.mean": "the best restarts",
    "monitor.mode": "the best restarts",
    "tracking": "accepted",
    "callbacks": "accepted",
}
"""What becomes of a setting that differs from the run's: the longest name that it begins with decides.

Refused is what the run's state or its order of samples would not fit. The best evaluation restarts where a
later one could not be compared with it.
"""

_PLACES = re.compile(r"data\.train\.\d+\.(path|index|dataset\.(?!kind$)\w+)")
_NOTHING = object()


@dataclass(frozen=True)
class Change:
    """A setting that is another than in the run's recipe."""

    key: str
    before: object
    after: object
    verdict: Verdict

    def describe(self) -> str:
        best = "; the best evaluation restarts" if self.verdict == "the best restarts" else ""
        return f"{self.key}: {_shown(self.before)} before, {_shown(self.after)} from here on{best}"


@dataclass(frozen=True)
class Continuation:
    """How a run goes on: what is said of it, and whether its best evaluation restarts."""

    lines: tuple[str, ...] = ()
    restarts_best: bool = False


def verdict_on(key: str) -> Verdict:
    """What becomes of the setting `key` where it differs.

    >>> verdict_on("optim.lr"), verdict_on("data.train.0.path")
    ('accepted', 'refused')
    """
    parts = key.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((RULES[name] for name in names if name in RULES), "refused")


def changes(kept: Recipe, given: Recipe) -> list[Change]:
    """The settings in which `given` differs from the run's recipe `kept`, by name."""
    before, after = _flat(kept.model_dump(mode="json")), _flat(given.model_dump(mode="json"))
    return [
        Change(key, before.get(key, _NOTHING), after.get(key, _NOTHING), verdict_on(key))
        for key in sorted({*before, *after})
        if before.get(key, _NOTHING) != after.get(key, _NOTHING)
    ]


def refuse_other_run(kept: Recipe, given: Recipe, directory: Path, data_moved: bool = False) -> list[Change]:
    """Refuse to go on in `directory` with a recipe whose weights or sample order would not fit the run there.

    With `data_moved` the datasets may lie elsewhere. Returns the changes that are accepted.

    Raises:
        UserError: one line per difference.
    """
    found = changes(kept, given)
    problems = [
        f"{change.key}: expected {_shown(change.before)} as in {directory / 'recipe.yaml'}, found "
        f"{_shown(change.after)}. {_advice(change)}"
        for change in found
        if change.verdict == "refused" and not (data_moved and _PLACES.fullmatch(change.key))
    ]
    if problems:
        raise UserError("\n".join(problems))
    return found


def _advice(change: Change) -> str:
    if _PLACES.fullmatch(change.key):
        return (
            "If it is the same data in another place, say --data-moved, which checks that; if not, choose "
            "another --run-dir for another run."
        )
    return "Choose another --run-dir for another run."


def refuse_other_data(before: DataFacts, now: DataFacts, directory: Path) -> Continuation:
    """Refuse to train on with other data than the run had; what is evaluated may have changed.

    Raises:
        UserError: one line per difference, and what to do.
    """
    problems = data_differences(before, now)
    if problems:
        raise UserError(
            "\n".join(problems)
            + f"\n{directory}: expected the data that this run began with, found other data. Bring it back, "
            f"or begin a new run with the weights of this one: --from {directory}, without --run-dir."
        )
    lines, restarts = [], False
    for split in ("val", "test"):
        for line in source_differences(before.sources, now.sources, split):
            restarts = restarts or split == "val"
            lines.append(
                line.removesuffix(".") + ("; the best evaluation restarts" if split == "val" else "")
            )
    return Continuation(tuple(lines), restarts)


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    return dict(_leaves(values, prefix))


def _leaves(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: object) -> str:
    if value is _NOTHING:
        return "nothing"
    return str(value) if isinstance(value, list) else show(value)
