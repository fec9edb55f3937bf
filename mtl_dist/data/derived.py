"""Tasks that a recipe derives from a task of the dataset, class by class; nothing is prepared again.

    data:
      derive:
        parity: {from: digit, map: {0: even, 1: odd, 2: even, ...}, classes: [even, odd]}

Each class of `from` is mapped to a class of the new task, or to null: such samples have no label for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import numpy as np
from pydantic import Field, create_model

from mtl_dist.config.errors import suggest
from mtl_dist.config.settings import Settings
from mtl_dist.data.manifest import LabelCounts, Manifest
from mtl_dist.data.remote import Location
from mtl_dist.data.shards import check_task_names
from mtl_dist.errors import UserError
from mtl_dist.kinds.classification import Classification
from mtl_dist.kinds.registry import kind_of
from mtl_dist.specs import NO_CLASS, TaskInfo

ClassIndex: TypeAlias = Annotated[int, Field(ge=0)]

# A class body cannot have a field called `from`, a word of the language.
_WithFrom = create_model("_WithFrom", __base__=Settings, **{"from": (str, ...)})  # type: ignore[call-overload]


class DeriveSettings(_WithFrom):
    """A classification task made of another one.

    from      a classification task of the dataset; the recipe need not train it
    map       for each of its classes, by name or index, a class of the new task: its index, its name out of
              `classes`, or null for no label
    classes   the new class names by index; without them the indices themselves
    """

    map: Annotated[dict[str, ClassIndex | str | None], Field(min_length=1)]
    classes: Annotated[tuple[str, ...], Field(min_length=2)] | None = None

    @property
    def source(self) -> str:
        """The task that `from` names."""
        name: str = getattr(self, "from")
        return name


@dataclass(frozen=True, eq=False)
class Derivation:
    """A derived task in one dataset: the stored task, the new class of each of its classes (or -1), facts."""

    source: str
    table: np.ndarray
    info: TaskInfo

    def counts(self, stored: LabelCounts) -> LabelCounts:
        """The labels of a split, from those of the stored task."""
        counts = _sums(self.table, stored.class_counts, len(self.info.classes))
        return LabelCounts(sum(counts), stored.present + stored.missing - sum(counts), counts)


def derivations(
    settings: Mapping[str, DeriveSettings], manifest: Manifest, path: Location
) -> dict[str, Derivation]:
    """The derived tasks of the dataset at `path`: those whose stored task it has.

    Raises:
        UserError: one line for each that does not fit it: a name that is taken, a stored task without
            classes, a class that is not mapped, or one that is not there.
    """
    found: dict[str, Derivation] = {}
    mistakes: list[str] = []
    for name, wish in settings.items():
        where = f"data.derive.{name}"
        try:
            check_task_names([name])
            if name in manifest.tasks:
                raise UserError(
                    f"{where}: expected a name of its own, found that of a task of {path}. Choose another."
                )
            stored = manifest.tasks.get(wish.source)
            if stored is not None:
                found[name] = _derivation(wish, stored, where)
        except UserError as mistake:
            mistakes.append(str(mistake))
    if mistakes:
        raise UserError("\n".join(mistakes))
    return found


def check_derived(settings: Mapping[str, DeriveSettings], manifests: Sequence[Manifest]) -> None:
    """Refuse to derive from a task that no training dataset has.

    Raises:
        UserError: one line for each.
    """
    known = list(dict.fromkeys(name for manifest in manifests for name in manifest.tasks))
    mistakes = [
        f"data.derive.{name}.from: expected a task of the training data, found {wish.source!r}. "
        f"{suggest(wish.source, known, 'Its tasks')}"
        for name, wish in settings.items()
        if wish.source not in known
    ]
    if mistakes:
        raise UserError("\n".join(mistakes))


def _derivation(wish: DeriveSettings, stored: TaskInfo, where: str) -> Derivation:
    if not kind_of(stored.kind).is_one_class:
        raise UserError(
            f"{where}.from: expected a classification task, found {wish.source}, a {stored.kind}. "
            "Only classes can be mapped."
        )
    by_key = {str(index): index for index in range(len(stored.classes))}
    by_key |= {name: index for index, name in enumerate(stored.classes)}  # where names are numbers, names win
    targets: dict[int, int] = {}
    for key, value in wish.map.items():
        if key not in by_key:
            raise UserError(
                f"{where}.map: expected classes of {wish.source}, found {key!r}. "
                f"{suggest(key, stored.classes, 'Its classes')}"
            )
        if by_key[key] in targets:
            raise UserError(
                f"{where}.map: expected each class of {wish.source} once, found {key!r} as name and as index."
            )
        targets[by_key[key]] = _target(value, wish.classes, f"{where}.map.{key}")
    unmapped = [name for index, name in enumerate(stored.classes) if index not in targets]
    if unmapped:
        raise UserError(
            f"{where}.map: expected a class or null for every class of {wish.source}, found none for "
            f"{', '.join(unmapped)}. Write null where there is to be no label."
        )
    classes = wish.classes or tuple(str(index) for index in range(max(targets.values()) + 1))
    if len(classes) < 2:
        raise UserError(f"{where}.map: expected two or more new classes, found {len(classes)}.")
    table = np.array([targets[index] for index in range(len(stored.classes))], np.int32)
    counts = _sums(table, stored.class_counts, len(classes))
    return Derivation(wish.source, table, TaskInfo(Classification.name, classes, sum(counts), counts))


def _target(value: int | str | None, classes: Sequence[str] | None, where: str) -> int:
    if value is None:
        return NO_CLASS
    if isinstance(value, str):
        if classes is None or value not in classes:
            advice = suggest(value, classes, "New classes") if classes else "Name the new `classes`."
            raise UserError(f"{where}: expected an index, a new class or null, found {value!r}. {advice}")
        return list(classes).index(value)
    if classes is not None and value >= len(classes):
        raise UserError(
            f"{where}: expected an index up to {len(classes) - 1} ({', '.join(classes)}), found {value}."
        )
    return value


def _sums(table: np.ndarray, counts: Sequence[int], num_classes: int) -> tuple[int, ...]:
    sums = [0] * num_classes
    for target, count in zip(table.tolist(), counts, strict=False):
        if target != NO_CLASS:
            sums[target] += count
    return tuple(sums)
