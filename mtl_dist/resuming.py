"""Whether a run may go on with other settings or other data, and what is said of it.

docs/reliability.md has the table `RULES` in words; a test holds the two together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
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

_KINDS = ("kind", "method")
"""What says of a part which other settings it has."""
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

    @property
    def resizes(self) -> bool:
        """Whether the images may have another size by it, and with them the weights of some models."""
        return self.key.startswith(("data.image_size", "data.transforms"))

    def briefly(self) -> str:
        return f"{self.key}: {_shown(self.before)} in the run, {_shown(self.after)} now"


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
    """The settings in which `given` differs from the run's recipe `kept`, by name.

    A part that only one of them has is one difference, and so is a part of a kind that is refused.
    """
    before, after = kept.model_dump(mode="json"), given.model_dump(mode="json")
    return sorted(_differences(before, after), key=lambda change: change.key)


def refuse_other_run(kept: Recipe, given: Recipe, directory: Path, data_moved: bool = False) -> list[Change]:
    """Refuse to go on in `directory` with a recipe whose weights or sample order would not fit the run there.

    With `data_moved` the datasets may lie elsewhere. Returns the changes that are accepted.

    Raises:
        UserError: one line per difference, and what to do.
    """
    found = changes(kept, given)
    refused = [
        change
        for change in found
        if change.verdict == "refused" and not (data_moved and _PLACES.fullmatch(change.key))
    ]
    if refused:
        problems = [
            f"{change.key}: expected {_brief(change.before)} as in {directory / 'recipe.yaml'}, found "
            f"{_brief(change.after)}."
            for change in refused
        ]
        end = " " if len(problems) == 1 else "\n"
        raise UserError("\n".join(problems) + end + _advice(refused))
    return found


def _advice(refused: Sequence[Change]) -> str:
    if any(_PLACES.fullmatch(change.key) for change in refused):
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


def _differences(
    before: Mapping[str, object], after: Mapping[str, object], prefix: str = ""
) -> Iterator[Change]:
    keys = {*before, *after}
    for kind in _KINDS:
        old, new = before.get(kind), after.get(kind)
        other = isinstance(old, str) and isinstance(new, str) and old != new
        if other and verdict_on(f"{prefix}{kind}") == "refused":
            keys = {kind}
    for key in keys:
        old, new = before.get(key, _NOTHING), after.get(key, _NOTHING)
        old_parts, new_parts = _parts(old), _parts(new)
        name = f"{prefix}{key}"
        if old_parts is not None and new_parts is not None:
            yield from _differences(old_parts, new_parts, f"{name}.")
        elif old != new:
            yield Change(name, old, new, verdict_on(name))


def _parts(value: object) -> Mapping[str, object] | None:
    """What a setting consists of, of a list by number; None of one that has no parts."""
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return {str(number): item for number, item in enumerate(value)}
    return value if isinstance(value, Mapping) else None


def _brief(value: object) -> str:
    """A part by its kind."""
    kind = next((value[key] for key in _KINDS if key in value), None) if isinstance(value, Mapping) else None
    return _shown(value) if kind is None else str(kind)


def _shown(value: object) -> str:
    if value is _NOTHING:
        return "none"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_shown(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return show(value)
