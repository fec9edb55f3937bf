"""Tasks that a recipe derives from a task of the dataset, or from its images; nothing is prepared again.

    data:
      derive:
        parity: {from: digit, map: {0: even, 1: odd, 2: even, ...}, classes: [even, odd]}
        decade: {from: age, bins: [30, 40, 50, 60]}
        risk:   {from: age, by: my_project.labels.risk, classes: [low, high]}
        light:  {from: image, by: my_project.labels.light, classes: [dark, bright]}

Each class of `from` is mapped to a class of the new task, or to null: such samples have no label for it. A
number falls into the bin whose lower edge it has reached. A function of the user's says the class of each
label, or of each stored image (derived_images.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, TypeAlias

import numpy as np
from pydantic import Field, create_model, model_validator

from mtl_dist.config.errors import suggest
from mtl_dist.config.settings import Settings
from mtl_dist.config.user_defined import PartError, imported
from mtl_dist.data.manifest import LabelCounts, Manifest
from mtl_dist.data.remote import Location
from mtl_dist.data.shards import check_task_names
from mtl_dist.errors import UserError
from mtl_dist.kinds.classification import Classification
from mtl_dist.kinds.registry import kind_of
from mtl_dist.kinds.regression import NumberKind
from mtl_dist.specs import NO_CLASS, TaskInfo

ClassIndex: TypeAlias = Annotated[int, Field(ge=0)]

IMAGE = "image"
"""What `from` names where the images themselves are meant; no task can be called so."""

# A class body cannot have a field called `from`, a word of the language.
_WithFrom = create_model("_WithFrom", __base__=Settings, **{"from": (str, ...)})  # type: ignore[call-overload]


class DeriveSettings(_WithFrom):
    """A classification task made of another one, or of the images.

    from      a task of classes or of numbers of the dataset, which the recipe need not train; or `image`
    map       for each of its classes, by name or index, a class of the new task: its index, its name out of
              `classes`, or null for no label
    bins      in place of `map`, of a task of numbers: the edges between the new classes, ascending
    by        in place of `map`: the import path of a function of a class name, a number or an image as it is
              stored, (H, W, C), which returns a class of the new task as `map` has them
    classes   the new class names by index; without them the indices, or the bins in words
    """

    map: Annotated[dict[str, ClassIndex | str | None], Field(min_length=1)] | None = None
    bins: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    by: str | None = None
    classes: Annotated[tuple[str, ...], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> DeriveSettings:
        stated = [name for name in ("map", "bins", "by") if getattr(self, name) is not None]
        if len(stated) != 1:
            raise ValueError(
                f"expected one of map, bins and by, found {' and '.join(stated) or 'none'}. State one."
            )
        if self.source == IMAGE and (self.by is None or self.classes is None):
            found = stated[0] if self.by is None else "no classes"
            raise ValueError(f"expected `by` and `classes` for classes of images, found {found}. State both.")
        if self.bins is not None:
            if any(low >= high for low, high in pairwise(self.bins)):
                raise ValueError(f"bins: expected ascending edges, found {list(self.bins)}.")
            if self.classes is not None and len(self.classes) != len(self.bins) + 1:
                raise ValueError(
                    f"classes: expected {len(self.bins) + 1} for {len(self.bins)} edges, found "
                    f"{len(self.classes)}."
                )
        return self

    @property
    def source(self) -> str:
        """The task that `from` names."""
        name: str = getattr(self, "from")
        return name


@dataclass(frozen=True, eq=False)
class Derivation:
    """A derived task in one dataset: the stored task of which it is made, and the facts of the new one."""

    source: str
    info: TaskInfo

    def counted(self, classes: np.ndarray) -> LabelCounts:
        """The labels of a split of which each sample has one of the `classes`, or -1."""
        counts = np.bincount(classes[classes != NO_CLASS], minlength=len(self.info.classes)).tolist()
        return LabelCounts(sum(counts), len(classes) - sum(counts), tuple(counts))


@dataclass(frozen=True, eq=False)
class OfLabels(Derivation, ABC):
    """A task made of the labels of another one."""

    @property
    @abstractmethod
    def keeps_all(self) -> bool:
        """Whether every label of the stored task has a class here."""

    @abstractmethod
    def of_column(self, stored: np.ndarray) -> np.ndarray:
        """The classes of a stored column, int32; -1 where there is no label."""

    @abstractmethod
    def of_label(self, stored: Any) -> int:
        """The class of one stored label, or -1."""

    def counts(self, stored: LabelCounts, column: Callable[[], np.ndarray]) -> LabelCounts:
        """The labels of a split, from those of the stored task or from its `column`."""
        return self.counted(self.of_column(column()))


@dataclass(frozen=True, eq=False)
class OfClasses(OfLabels):
    """By a table: the new class of each stored one, or -1."""

    table: np.ndarray

    @property
    def keeps_all(self) -> bool:
        return bool((self.table != NO_CLASS).all())

    def of_column(self, stored: np.ndarray) -> np.ndarray:
        return np.where(stored == NO_CLASS, NO_CLASS, self.table[stored])

    def of_label(self, stored: Any) -> int:
        known = isinstance(stored, int) and 0 <= stored < len(self.table)
        return int(self.table[stored]) if known else NO_CLASS

    def counts(self, stored: LabelCounts, column: Callable[[], np.ndarray]) -> LabelCounts:
        counts = _sums(self.table, stored.class_counts, len(self.info.classes))
        return LabelCounts(sum(counts), stored.present + stored.missing - sum(counts), counts)


@dataclass(frozen=True, eq=False)
class OfNumbers(OfLabels):
    """By a function of a number; `keeps_all` where it has a class for each."""

    target: Callable[[float], int]
    keeps_all: bool = False
    _known: dict[float, int] = field(default_factory=dict)

    def of_column(self, stored: np.ndarray) -> np.ndarray:
        classes = np.full(len(stored), NO_CLASS, np.int32)
        there = ~np.isnan(stored)
        values, places = np.unique(stored[there], return_inverse=True)
        classes[there] = np.array([self.of_label(value) for value in values.tolist()], np.int32)[places]
        return classes

    def of_label(self, stored: Any) -> int:
        value = float(stored)
        if value not in self._known:
            self._known[value] = self.target(value)
        return self._known[value]


@dataclass(frozen=True, eq=False)
class OfImages(Derivation):
    """By a function of the stored image; `known` are the classes of the splits that were looked through."""

    function: UserFunction
    known: dict[str, np.ndarray] = field(default_factory=dict)

    def of_image(self, image_HWC: np.ndarray, where: str) -> int:
        """The class of an image, or -1; `where` names it in messages."""
        return self.function(image_HWC, where)


@dataclass(frozen=True)
class _Bins:
    """The bin of a number: its lower edge belongs to it."""

    edges: tuple[float, ...]

    def __call__(self, value: float) -> int:
        return int(np.searchsorted(self.edges, value, side="right"))

    @property
    def classes(self) -> tuple[str, ...]:
        between = [f"{low:g} to {high:g}" for low, high in pairwise(self.edges)]
        return (f"below {self.edges[0]:g}", *between, f"from {self.edges[-1]:g}")


@dataclass(frozen=True)
class UserFunction:
    """A function of the user's, by its import path; its answers are checked."""

    path: str
    classes: tuple[str, ...] | None
    where: str

    def __call__(self, label: Any, named: str = "") -> int:
        answer = self.answer(label, named)
        return _target(answer, self.classes, f"{self.where}.by: {self.path}({named or repr(label)})")

    def answer(self, label: Any, named: str = "") -> int | str | None:
        """What the function says of a label; `named` stands for it in messages."""
        named = named or repr(label)
        try:
            answer = imported(self.path)(label)
        except PartError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise UserError(
                f"{self.where}.by: {self.path}({named}) fails: {type(error).__name__}: {error}."
            ) from error
        if isinstance(answer, np.generic):
            answer = answer.item()
        if isinstance(answer, bool) or not isinstance(answer, int | str | None):
            raise UserError(
                f"{self.where}.by: expected a class, its index or None of {self.path}({named}), found "
                f"{answer!r}."
            )
        return answer


def derivations(
    settings: Mapping[str, DeriveSettings], manifest: Manifest, path: Location
) -> dict[str, Derivation]:
    """The derived tasks of the dataset at `path`: those whose stored task it has, and those of images.

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
            if wish.source == IMAGE:
                found[name] = _of_images(wish, where)
            elif stored is not None:
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
        if wish.source not in (*known, IMAGE)
    ]
    if mistakes:
        raise UserError("\n".join(mistakes))


def _derivation(wish: DeriveSettings, stored: TaskInfo, where: str) -> Derivation:
    kind = kind_of(stored.kind)
    of_numbers, of_classes = isinstance(kind, NumberKind), kind.is_one_class
    if wish.bins is not None and not of_numbers:
        raise UserError(f"{where}.from: expected a task of numbers, found {wish.source}, a {stored.kind}.")
    if not (of_classes or (of_numbers and wish.map is None)):
        raise UserError(
            f"{where}.from: expected a task of classes{'' if wish.by is None else ' or numbers'}, found "
            f"{wish.source}, a {stored.kind}."
        )
    if wish.by is not None:
        _check_function(wish.by, where)
    if of_classes:
        table, classes = _table(wish, stored, where)
        counts = _sums(table, stored.class_counts, len(classes))
        return OfClasses(wish.source, TaskInfo(Classification.name, classes, sum(counts), counts), table)
    if wish.bins is not None:
        bins = _Bins(wish.bins)
        return OfNumbers(wish.source, _unsummed(wish.classes or bins.classes, stored), bins, keeps_all=True)
    if wish.by is None or wish.classes is None:
        raise UserError(f"{where}.classes: expected the classes that {wish.by} makes of numbers, found none.")
    function = UserFunction(wish.by, wish.classes, where)
    return OfNumbers(wish.source, _unsummed(wish.classes, stored), function)


def _of_images(wish: DeriveSettings, where: str) -> OfImages:
    assert wish.by is not None and wish.classes is not None, "the settings say so"
    _check_function(wish.by, where)
    info = TaskInfo(Classification.name, wish.classes, 0, (0,) * len(wish.classes))
    return OfImages(IMAGE, info, UserFunction(wish.by, wish.classes, where))


def _unsummed(classes: tuple[str, ...], stored: TaskInfo) -> TaskInfo:
    """A task whose labels are counted in the columns of a split."""
    return TaskInfo(Classification.name, classes, stored.num_labelled, (0,) * len(classes))


def _check_function(path: str, where: str) -> None:
    try:
        found = imported(path, callable, "function")
    except PartError as error:
        raise UserError(f"{where}.by: {error}") from None
    if not callable(found):
        raise UserError(f"{where}.by: expected a function, found {path}, a {type(found).__name__}.")


def _table(wish: DeriveSettings, stored: TaskInfo, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """The new class of each stored one, and the new classes' names."""
    given: Mapping[str, int | str | None]
    if wish.by is not None:
        where = f"{where}.by"
        function = UserFunction(wish.by, wish.classes, where.removesuffix(".by"))
        given = {name: function.answer(name) for name in stored.classes}
        names = tuple(dict.fromkeys(value for value in given.values() if isinstance(value, str)))
        classes = wish.classes or (names or None)
    else:
        where, given, classes = f"{where}.map", wish.map or {}, wish.classes
    by_key = {str(index): index for index in range(len(stored.classes))}
    by_key |= {name: index for index, name in enumerate(stored.classes)}  # where names are numbers, names win
    targets: dict[int, int] = {}
    for key, value in given.items():
        if key not in by_key:
            raise UserError(
                f"{where}: expected classes of {wish.source}, found {key!r}. "
                f"{suggest(key, stored.classes, 'Its classes')}"
            )
        if by_key[key] in targets:
            raise UserError(
                f"{where}: expected each class of {wish.source} once, found {key!r} as name and as index."
            )
        targets[by_key[key]] = _target(value, classes, f"{where}.{key}")
    unmapped = [name for index, name in enumerate(stored.classes) if index not in targets]
    if unmapped:
        raise UserError(
            f"{where}: expected a class or null for every class of {wish.source}, found none for "
            f"{', '.join(unmapped)}. Write null where there is to be no label."
        )
    classes = classes or tuple(str(index) for index in range(max(targets.values()) + 1))
    if len(classes) < 2:
        raise UserError(f"{where}: expected two or more new classes, found {len(classes)}.")
    return np.array([targets[index] for index in range(len(stored.classes))], np.int32), classes


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
