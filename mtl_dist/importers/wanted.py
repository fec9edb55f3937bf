"""Which tasks a user wants from data with columns: of what kind, from which column, with which classes.

--label regression:age=age_years      a task `age` of the kind regression, from the column `age_years`
--regression age=age_years            the same in short, for every kind there is
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeAlias

from mtl_dist.config import yaml_text
from mtl_dist.config.nearest import nearest
from mtl_dist.data.shards import check_task_names
from mtl_dist.errors import UserError
from mtl_dist.importers.jobs import TaskSource
from mtl_dist.importers.options import Help
from mtl_dist.importers.table_files import Row, read_labels
from mtl_dist.kinds.kind import Label
from mtl_dist.kinds.registry import kind_of, scalar_kind
from mtl_dist.kinds.vocabulary import (
    COLOUR,
    MISSING,
    Cell,
    ClassNames,
    Declared,
    LabelError,
    class_value,
    plain,
)
from mtl_dist.specs import TaskInfo

Names: TypeAlias = str | Sequence[str] | Mapping[str, str]
"""Class names as they are given: by index, or by value or colour."""
Labels: TypeAlias = Annotated[
    dict[str, str],
    Help("A task of any kind, from a column; --KIND TASK=COLUMN in short.", "KIND:TASK=COLUMN", "label"),
]
Classes: TypeAlias = Annotated[
    dict[str, str | tuple[str, ...] | dict[str, str]],
    Help("Class names by index, or by value as 0:NAME,255:NAME; - for what is ignored.", "TASK=NAME,..."),
]
Colours: TypeAlias = Annotated[
    dict[str, str | dict[str, str]],
    Help("Classes of masks in colours: #804080:road,#000000:- (- is ignored).", "TASK=#RRGGBB:NAME,..."),
]
Units: TypeAlias = Annotated[
    dict[str, str], Help("The unit of a number, such as years.", "TASK=UNIT", "unit")
]
Facts: TypeAlias = Annotated[
    dict[str, str | dict[str, Any]],
    Help(
        "What else a kind wants to know of its labels: 'depth=scale: 0.001, range: [0.1, 10]'. docs/kinds.md",
        "TASK=KEY: VALUE,...",
        "facts",
    ),
]
Separator: TypeAlias = Annotated[str, Help("What stands between a cell's classes.", "TEXT")]
Missing: TypeAlias = Annotated[
    tuple[str, ...],
    Help("The words that mean no label, in place of NA, N/A, NaN, null and the like.", "WORD,..."),
]
Strict: TypeAlias = Annotated[bool, Help("Refuse two texts for one class, such as 1 and 1.0.")]


@dataclass(frozen=True)
class Wanted:
    """A task that is wanted: the name of its kind, its column (or files), and what was said of it."""

    task: str
    kind: str
    column: str
    declared: Declared

    @property
    def is_map(self) -> bool:
        """Whether its labels are files of their own."""
        return kind_of(self.kind).is_map

    def columns(self, columns: Sequence[str], where: str) -> tuple[str, ...]:
        """The columns in which a label that is no map stands, all of which are there.

        Raises:
            UserError: one is not.
        """
        names, _ = scalar_kind(self.kind).cell_columns(self.column, columns)
        check_columns(names, columns, where)
        return names

    def read(
        self, rows: Sequence[Row], classes: ClassNames | None = None
    ) -> tuple[TaskSource, Sequence[Label | None], list[str]]:
        """The task, the label of each row, and notes; `classes` came with the data, where none were declared.

        Raises:
            UserError: a cell that holds no label of the task.
        """
        there = tuple(rows[0].cells) if rows else ()
        columns, known = scalar_kind(self.kind).cell_columns(self.column, there)
        declared = self.with_classes(classes if classes is not None else known or None)
        if len(columns) > 1:
            rows = [Row(row.where, {self.column: _joined(row, columns, declared)}) for row in rows]
        parsed = read_labels(self.kind, rows, self.column, declared)
        notes = [f"{self.task}: {note}" for note in parsed.notes]
        try:
            info = kind_of(self.kind).declare(self.task, replace(declared, classes=parsed.classes or None))
        except LabelError as error:
            raise UserError(f"classes of {self.task!r}: {error}") from None
        return TaskSource(info.kind, info.classes, info.unit, facts=info.facts), parsed.labels, notes

    def map_task(self, classes: ClassNames | None = None) -> TaskSource:
        """The task, whose labels are maps.

        Raises:
            UserError: classes that maps cannot have.
        """
        declared = self.with_classes(classes)
        try:
            info = kind_of(self.kind).declare(self.task, declared)
        except LabelError as error:
            raise UserError(f"classes of {self.task!r}: {error}") from None
        return TaskSource(info.kind, info.classes, info.unit, declared.class_values, info.facts)

    def with_classes(self, classes: ClassNames | None) -> Declared:
        """What was said of the task, or the classes that came with the data."""
        said = self.declared
        return said if said.classes is not None else replace(said, classes=classes)


def _joined(row: Row, columns: Sequence[str], declared: Declared) -> Cell:
    """The cells of several columns as one; empty where they all are.

    Raises:
        UserError: one holds a list.
    """
    cells = []
    for column in columns:
        cell = row.cells[column]
        if isinstance(cell, list):
            raise UserError(f"{row.where}: expected one value in column {column!r}, found {cell}.")
        cells.append("" if plain(cell) in declared.missing_words else plain(cell))
    return cells if any(cells) else ""


def wanted_tasks(
    labels: Mapping[str, str],
    classes: Mapping[str, str | Sequence[str] | Mapping[str, str]],
    units: Mapping[str, str],
    separator: str,
    missing: Sequence[str] = MISSING,
    strict: bool = False,
    facts: Mapping[str, str | Mapping[str, Any]] = {},
) -> list[Wanted]:
    """The tasks of a request, in its order.

    Raises:
        UserError: none, a name that cannot be one, or classes, a unit or facts of no task.
    """
    if not labels:
        raise UserError(
            "tasks: expected at least one task, found none. Example: --classification breed=COLUMN"
        )
    check_task_names(labels)
    for option, given in (("--classes", classes), ("--unit", units), ("--facts", facts)):
        for task in given:
            if task not in labels:
                raise UserError(f"{option}: expected one of the tasks {', '.join(labels)}, found {task!r}.")
    wanted = []
    for task, text in labels.items():
        kind, colon, column = text.partition(":")
        if not (colon and kind and column):
            raise UserError(f"--label {task}: expected KIND:{task}=COLUMN, found {text!r}.")
        kind_of(kind)
        names = class_names(task, classes[task]) if task in classes else None
        stated = stated_facts(task, kind, facts[task]) if task in facts else {}
        declared = Declared(names, units.get(task, ""), separator, stated, tuple(missing), strict)
        wanted.append(Wanted(task, kind, column, declared))
    return wanted


def stated_facts(task: str, kind: str, given: str | Mapping[str, Any]) -> dict[str, Any]:
    """`scale: 0.001, range: [0.1, 10]`, as YAML writes a mapping; or the mapping itself.

    Raises:
        UserError: it is none, or means nothing to the kind.
    """
    found: Any = given
    if isinstance(given, str):
        inner = given.strip().removeprefix("{").removesuffix("}")
        try:
            found, _ = yaml_text.parse(f"{{{inner}}}") if ":" in inner else (None, [])
        except yaml_text.YamlError:
            found = None
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"--facts {task}: expected KEY: VALUE, ... (scale: 0.001), found {given!r}.")
    facts = {str(key): value for key, value in found.items()}
    try:
        kind_of(kind).check_facts(kind_of(kind).restated(TaskInfo(kind, ()), facts))
    except UserError as error:
        raise UserError(f"--facts {task}: {error}") from None
    return facts


def with_colours(classes: Mapping[str, Names], colours: Mapping[str, Names]) -> dict[str, Names]:
    """The classes of each task, those of masks in colours too.

    Raises:
        UserError: both are said of a task, or no colours.
    """
    for task, given in colours.items():
        if task in classes:
            raise UserError(f"--colours {task}: expected it without --classes {task}, found both.")
        names = class_names(task, given)
        if not isinstance(names, Mapping) or any(value < COLOUR for value in names):
            raise UserError(f"--colours {task}: expected #RRGGBB:NAME,..., found {given!r}.")
    return {**classes, **colours}


def check_columns(wanted: Iterable[str], columns: Sequence[str], where: str) -> None:
    """Refuse columns that are not there.

    Raises:
        UserError: with the nearest one that is.
    """
    for column in wanted:
        if column not in columns:
            near = nearest(column, columns)
            raise UserError(
                f"{where}: expected a column {column!r}, found {', '.join(map(repr, columns)) or 'none'}."
                f"{f' Did you mean {near!r}?' if near else ''}"
            )


def class_names(task: str, given: str | Sequence[str] | Mapping[str, str]) -> ClassNames:
    """`background,lesion` by index, `0:background,255:lesion` by value; or these as a list and a mapping.

    Raises:
        UserError: it has another form.
    """
    if isinstance(given, str):
        parts = [part.strip() for part in given.split(",")]
        pairs = [part.partition(":") for part in parts]
        by_value = any(colon for _, colon, _ in pairs)
        given = {value.strip(): name for value, _, name in pairs} if by_value else parts
        given_text = ",".join(parts)
    else:
        given_text = str(given)
    if isinstance(given, Mapping):
        numbers = {value: class_value(value) for value in given}
        if all(given.values()) and None not in numbers.values():
            return {number: given[value] for value, number in numbers.items() if number is not None}
    elif all(given):
        return list(given)
    raise UserError(
        f'--classes: expected {task}=NAME,NAME,... or {task}=0:NAME,1:NAME,..., found "{given_text}".'
    )
