"""The contract of a kind: what a task's LABEL is, wherever it is parsed, stored, counted, moved or shown.

Whoever handles labels asks a kind, by a method or by a capability ("is it a map?"), and never for its name.
What is learnt from the labels is the business of `tasks`. A kind has no state; nothing here loads torch.

    cell or file -> label -> (key.json + column) or key.<task>.png|npy -> target of a batch

A label that its task cannot have is a `LabelError`, which says what was expected and found; the caller adds
where it was found.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np

from mtl_dist.config.nearest import nearest
from mtl_dist.errors import UserError
from mtl_dist.kinds.view import View
from mtl_dist.kinds.vocabulary import Cell, Declared, Vocabulary, names_of
from mtl_dist.specs import TaskInfo

if TYPE_CHECKING:
    from PIL import Image


Label: TypeAlias = Any
"""A label as JSON holds it: a class index, a value, the positive classes of a multilabel task."""

Colour: TypeAlias = tuple[int, int, int]
Blending: TypeAlias = Literal["interpolate", "partner"]


class UnreadableMap(Exception):
    """The file of a map holds no such map; the message says why, without the file's name."""


def check_fact_names(info: TaskInfo, known: Sequence[str], counted: Sequence[str] = ()) -> None:
    """Refuse facts that are neither what a kind is told of its labels nor what it counted in them.

    Raises:
        UserError: with the name that was probably meant.
    """
    for key in info.facts:
        if key not in (*known, *counted):
            near = nearest(key, known)
            hint = f"Did you mean {near}?" if near else "Remove it."
            raise UserError(
                f"facts of a {info.kind} task: expected {', '.join(known)}, found {key!r}. {hint}"
            )


class Kind(ABC):
    """What a label of a task is; `ScalarKind` or `MapKind`."""

    help: ClassVar[str]
    """One line for the command line: what a label is."""
    metavar: ClassVar[str] = "TASK=COLUMN"
    """How the command line says which column, or which files, hold a task's labels."""
    is_map: ClassVar[bool]
    """Whether a label has a value for each pixel, and is stored as a file of its own."""
    has_classes: ClassVar[bool] = False
    """Whether labels speak of named classes."""
    class_words: ClassVar[tuple[str, str]] = ("class", "classes")
    """What one of these is called, and several are."""
    may_be_none: ClassVar[bool] = False
    """Whether a label may be that no class applies, which an empty cell, a missing label, does not say."""
    is_one_class: ClassVar[bool] = False
    """Whether a label is exactly one class, by its index: samples can be balanced and stratified by it."""
    is_number: ClassVar[bool] = False
    """Whether a label is one real number in a unit, such as an edge of a box."""
    has_values: ClassVar[bool] = False
    """Whether the mean, deviation and range of a task's info describe its labels."""
    against_mixup: ClassVar[str] = ""
    """Why two labels cannot be interpolated as their images are; empty where they can."""
    against_cutmix: ClassVar[str] = ""
    """Why a label cannot follow a rectangle of another image that is pasted in; empty where it can."""
    moves: ClassVar[bool] = False
    """Whether the values of a label change with the view of its image, so that `moved` is asked."""
    has_place: ClassVar[bool] = False
    """Whether a label that is no map speaks of places in its image: `beside` is asked before it is stored."""
    is_drawn: ClassVar[bool] = False
    """Whether a label that is no map can be drawn over its image, by `draw`."""
    shared_facts: ClassVar[tuple[str, ...]] = ()
    """Keys of `TaskInfo.facts` on which all datasets of a task must agree."""
    task_settings: ClassVar[str] = ""
    """Of a user-defined kind: the import path of the settings by which it is learnt."""

    @property
    def name(self) -> str:
        """What the manifest and recipes call it: a word, or the import path of a user-defined one."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    def declare(self, task: str, declared: Declared) -> TaskInfo:
        """The task called `task` before its labels are read.

        Raises:
            LabelError: what is declared does not fit the kind.
        """
        names = names_of(declared.classes) if self.has_classes and declared.classes is not None else ()
        return TaskInfo(self.name, names, unit=declared.unit, facts=dict(declared.facts))

    def numbers(self, info: TaskInfo) -> dict[str, TaskInfo]:
        """What mean, deviation, range and unit say of each number of a label, by name; "" of the only one."""
        return {"": info} if self.has_values else {}

    def check_facts(self, info: TaskInfo) -> None:
        """Refuse `TaskInfo.facts` that mean nothing to the kind.

        Raises:
            UserError: with what it expects.
        """
        return

    def restated(self, info: TaskInfo, stated: Mapping[str, Any]) -> TaskInfo:
        """The task with facts that a recipe states of labels that are counted already.

        Raises:
            UserError: the kind has none, or they would make other labels of these.
        """
        if not self.shared_facts and not self.task_settings:
            raise UserError(
                f"expected no facts of a {self.name} task, found {', '.join(stated)}. Remove them."
            )
        return replace(info, facts={**info.facts, **stated})

    def legend(self, task: str, info: TaskInfo) -> list[str]:
        """The words of what is painted or drawn in a colour of its own each."""
        return []

    def merge(self, task_infos: Sequence[TaskInfo]) -> TaskInfo:
        """The facts of several datasets, which agree on the task and have labels: numbers pooled."""
        if len(task_infos) == 1:
            return task_infos[0]
        total = sum(info.num_labelled for info in task_infos)
        mean = sum(info.num_labelled * info.mean for info in task_infos) / total
        variance = sum(i.num_labelled * (i.std**2 + (i.mean - mean) ** 2) for i in task_infos) / total
        return replace(
            task_infos[0],
            mean=mean,
            std=math.sqrt(variance),
            minimum=min(info.minimum for info in task_infos),
            maximum=max(info.maximum for info in task_infos),
        )


class ScalarKind(Kind):
    """Labels beside the image: in `<key>.json`, and as a column of `<split>.labels.npy`."""

    is_map: ClassVar[bool] = False
    blending: ClassVar[Blending] = "interpolate"
    """What Mixup and CutMix do: interpolate the targets, or give the loss the partner's target as well."""

    # ---- from cells
    def cell_columns(self, text: str, columns: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The columns, of those there are, whose cells hold a label where a user says `text`, and the class
        names that these tell. The cell of several columns is a list of theirs."""
        return (text,), ()

    def terms(self, cell: Cell, declared: Declared) -> list[str]:
        """What a cell calls classes: by these they are found where none are declared.

        Raises:
            LabelError: the cell cannot be read.
        """
        return []

    @abstractmethod
    def parse(self, cell: Cell, words: Vocabulary) -> Label | None:
        """The label in a cell, None where it is empty.

        Raises:
            LabelError: the cell holds no label of the task.
        """

    def beside(self, label: Label, given: View, info: TaskInfo, found: Counter[str]) -> Label | None:
        """The label as it is stored beside its image; None where nothing of it is left.

        `given` takes the pixels that the label speaks of to those of the image as it is displayed. What is
        noteworthy is counted in `found`, in words.
        """
        return label

    # ---- stored
    @abstractmethod
    def column_type(self, info: TaskInfo) -> str | tuple[str, tuple[int, ...]]:
        """The type of the column, and the shape of its cells where they hold several values."""

    @abstractmethod
    def encode(self, labels: Sequence[Label | None], info: TaskInfo) -> np.ndarray:
        """The labels as a column."""

    @abstractmethod
    def decode(self, value: Any, info: TaskInfo) -> Label:
        """The label in a cell of the column, which is not empty."""

    @abstractmethod
    def counts(self, column: np.ndarray, info: TaskInfo) -> tuple[int, ...]:
        """The labels of each class in a column; of a kind without classes the labels, as one number."""

    def facts(self, column: np.ndarray, info: TaskInfo) -> TaskInfo:
        """The task with what the column of its training labels says beyond their counts."""
        return info

    # ---- in a batch
    @abstractmethod
    def targets(self, batch_size: int, info: TaskInfo) -> np.ndarray:
        """Room for the targets of a batch (B, ...), holding the value of a missing label."""

    @abstractmethod
    def target(self, label: object, info: TaskInfo) -> Any:
        """A stored label as a target.

        Raises:
            LabelError: it is no label of the task.
        """

    def label_of(self, target: Any, info: TaskInfo) -> Label:
        """The label in a sample's target, which is an array; by default as in a cell of the column."""
        return self.decode(target, info)

    def seen(self, target: Any, info: TaskInfo) -> Label:
        """The label in a sample's target as it is in the batch's own image: what is drawn over that."""
        return self.label_of(target, info)

    def moved(self, target: Any, view: View, info: TaskInfo) -> Any | None:
        """The target in a view of its image; None where the view shows nothing that it speaks of."""
        return target

    def without_label(self, view: View, info: TaskInfo) -> Any | None:
        """What a target says of a view although there is no label; None where that is nothing."""
        return None

    # ---- shown
    @abstractmethod
    def text(self, label: Label, info: TaskInfo) -> str:
        """The label in words."""

    def draw(
        self,
        picture: Image.Image,
        label: Label,
        info: TaskInfo,
        colours: Sequence[Colour],
        hollow: bool = False,
    ) -> None:
        """Draw a label over a picture of its whole image, in place; a colour per legend line. In what is
        `hollow` another label can be seen."""
        raise NotImplementedError


@dataclass(frozen=True)
class StoredMap:
    """A map as it is stored: its file, size and what is counted of it (see `MapKind.tally`).

    `convention` says how the file's values were read, where there are several ways.
    """

    data: bytes
    width: int
    height: int
    tally: np.ndarray
    convention: str = ""


class MapKind(Kind):
    """Labels with a value for each pixel: a file `<key>.<task>.png` (of 8 or 16 bits) or `.npy`."""

    is_map: ClassVar[bool] = True
    dtype: ClassVar[str]
    """The values of a map in a batch."""
    channels: ClassVar[int] = 0
    """The values of a pixel: 0 for maps (H, W), else the first dimension of maps (C, H, W)."""
    covers: ClassVar[bool] = False
    """Whether `paint` leaves nothing of the picture below: such a map is shown beside it."""
    measured_whole: ClassVar[bool] = False
    """Whether metrics look at the whole map in its own size, where evaluation shows all of it."""
    missing: ClassVar[float]
    """The value of a pixel without a label: outside of the image, or of a missing map; NaN for numbers."""

    def check_facts(self, info: TaskInfo) -> None:
        self.tally(info)

    # ---- from files
    @abstractmethod
    def store(
        self,
        data: bytes,
        opened: Image.Image | np.ndarray,
        info: TaskInfo,
        values: Mapping[int, int],
    ) -> StoredMap:
        """The map in a file `data`, opened as an image or an array, as it is to be stored.

        `values` maps the file's values to classes, if not empty.

        Raises:
            UnreadableMap: the file holds no such map.
            LabelError: it holds a value that its task cannot have.
        """

    def reread(
        self,
        data: bytes,
        opened: Image.Image | np.ndarray,
        info: TaskInfo,
        values: Mapping[int, int],
    ) -> bytes:
        """A file that means what `store` would make of this one; made whenever a sample is read, so quickly.

        Raises:
            UnreadableMap, LabelError: as `store`.
        """
        return self.store(data, opened, info, values).data

    @abstractmethod
    def tally(self, info: TaskInfo) -> np.ndarray:
        """What is counted of maps before there is one."""

    def is_labelled(self, stored: StoredMap) -> bool:
        """Whether the map says anything: one without a single label is no label."""
        return True

    def add(self, tally: np.ndarray, more: np.ndarray) -> np.ndarray:
        """The tally of the maps in both."""
        return tally + more

    def counts(self, tally: np.ndarray, info: TaskInfo) -> tuple[int, ...]:
        """The pixels of each class; nothing of a kind without classes."""
        return ()

    def facts(self, tally: np.ndarray, info: TaskInfo) -> TaskInfo:
        """The task with what the tally of its training labels says beyond their counts."""
        return info

    def check_files(self, task: str, examples: Mapping[str, str], tally: np.ndarray, info: TaskInfo) -> None:
        """Refuse maps that cannot all be meant as they were read; `examples` by convention.

        Raises:
            UserError: with an example.
        """
        return

    # ---- in a batch
    def values(self, stored: np.ndarray, info: TaskInfo) -> np.ndarray:
        """What the numbers in a stored file mean: (H, W) or (C, H, W) of `dtype`."""
        return stored

    def check(self, values: np.ndarray, info: TaskInfo) -> None:
        """Refuse a map with a value that its task cannot have.

        Raises:
            LabelError: with the value.
        """
        return

    def moved(self, values: np.ndarray, view: View, info: TaskInfo) -> np.ndarray:
        """The values of a map whose pixels have been moved to where the view shows them."""
        return values

    # ---- shown
    in_colours: ClassVar[str] = ""
    """What the colours of a painted map mean, where no legend says it."""

    def palette(self, info: TaskInfo, colours: Sequence[Colour]) -> dict[int, Colour]:
        """Of a map of uint8 values (H, W) that stand for something, such as classes: the colour of each that
        has one; a colour per legend line is given. Empty of any other map."""
        return {}

    @abstractmethod
    def paint(
        self, pixels_HWC: np.ndarray, values: np.ndarray, info: TaskInfo, colours: Sequence[Colour]
    ) -> None:
        """Lay a map over a picture of its size, uint8 (H, W, 3), in place; a colour per legend line."""
