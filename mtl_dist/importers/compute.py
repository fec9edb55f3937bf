"""Columns computed from others: `--compute 'hours=page * 0.5 - onset'`.

An expression sees the columns of its row by their names, `column("a name")` for other names. A cell that is a
number is one, which remembers its text: a cell that is passed on, compared with a text or given to a function
of texts is taken to the letter (`01`, `1E50`). An empty cell is None, and whatever is computed from None is a
missing value. There are
arithmetic, comparisons, `and`, `or`, `not`, `in`, `A if CONDITION else B`, and the functions below. Or it is
the import path of a function: cells by column -> value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from mtl_dist.errors import UserError
from mtl_dist.importers.options import Help
from mtl_dist.importers.table_files import Row
from mtl_dist.kinds.vocabulary import Cell

Computed: TypeAlias = Annotated[
    dict[str, str],
    Help("A new column from an expression over the others, as 'hours=page * 0.5'.", "COLUMN=EXPRESSION"),
]


class _Whole(int):
    """A whole number in a cell, and its text."""

    text: str

    def __eq__(self, other: object) -> bool:
        return self.text == other if isinstance(other, str) else int(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__


class _Real(float):
    """A number in a cell, and its text."""

    text: str

    def __eq__(self, other: object) -> bool:
        return self.text == other if isinstance(other, str) else float(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = float.__hash__


def _text(value: Any) -> str:
    """A value as text; of a cell the text that it holds."""
    return value.text if isinstance(value, _Whole | _Real) else str(value)


def _of_texts(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of texts, which takes cells of numbers by their text."""

    def call(*arguments: Any) -> Any:
        return function(*(_text(a) if isinstance(a, _Whole | _Real) else a for a in arguments))

    return call


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": round,
    "int": int,
    "float": float,
    "text": _text,
    "len": _of_texts(len),
    "lower": _of_texts(str.lower),
    "upper": _of_texts(str.upper),
    "startswith": _of_texts(str.startswith),
    "endswith": _of_texts(str.endswith),
    "floor": math.floor,
    "ceil": math.ceil,
    "sqrt": math.sqrt,
    "log": math.log,
    "exp": math.exp,
}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")

Function: TypeAlias = Callable[[Mapping[str, Cell]], Any]


def with_computed(rows: Sequence[Row], computed: Mapping[str, str]) -> list[Row]:
    """The rows with the computed columns; a later one sees the earlier ones.

    Raises:
        UserError: an expression that cannot be understood, or a column that is there already or missing.
    """
    functions = {column: _function(column, text) for column, text in computed.items()}
    found = []
    for row in rows:
        cells = dict(row.cells)
        for column, function in functions.items():
            if column in row.cells:
                raise UserError(
                    f"--compute {column}: expected a new column, found one of this name. Choose another."
                )
            try:
                cells[column] = _cell(function(cells))
            except UserError as error:
                raise UserError(f"{row.where}: --compute {column}: {error}") from None
        found.append(Row(row.where, cells))
    return found


def _function(column: str, text: str) -> Function:
    if _IMPORT_PATH.fullmatch(text):
        return _imported(column, text)
    from simpleeval import SimpleEval

    evaluator = SimpleEval()
    try:
        parsed = evaluator.parse(text)
    except Exception as error:  # whatever the parser raises
        raise UserError(f"--compute {column}: expected an expression, found {text!r}: {error}.") from None

    def compute(cells: Mapping[str, Cell]) -> Any:
        values = {name: _value(cell) for name, cell in cells.items()}

        def column_of(name: str) -> Any:
            if name not in values:
                raise UserError(_unknown(name, values))
            return values[name]

        evaluator.names = {**values, "None": None, "True": True, "False": False}
        evaluator.functions = {**FUNCTIONS, "column": column_of}
        try:
            return evaluator.eval(text, previously_parsed=parsed)
        except UserError:
            raise
        except TypeError as error:
            if any(value is None for value in values.values()):
                return None
            raise UserError(f"expected values that {text!r} can be computed from, found: {error}.") from None
        except Exception as error:  # simpleeval's own, and what arithmetic raises
            name = getattr(error, "name", None)
            if isinstance(name, str):
                raise UserError(_unknown(name, values)) from None
            raise UserError(f"expected values that {text!r} can be computed from, found: {error}.") from None

    return compute


def _unknown(name: str, columns: Mapping[str, Any]) -> str:
    return f"expected one of the columns {', '.join(columns)}, found {name!r}."


def _imported(column: str, path: str) -> Function:
    from mtl_dist.config.user_defined import PartError, imported

    try:
        found = imported(path)
    except PartError as error:
        raise UserError(f"--compute {column}: {error}") from None
    if not callable(found):
        raise UserError(f"--compute {column}: expected a function at {path}, found {type(found).__name__}.")
    function: Function = found
    return function


def _value(cell: Cell) -> Any:
    if isinstance(cell, list):
        return cell
    if not cell:
        return None
    if _NUMBER.fullmatch(cell):
        number: _Whole | _Real = _Whole(cell) if cell.lstrip("+-").isdecimal() else _Real(cell)
        number.text = cell
        return number
    return cell


def _cell(value: Any) -> Cell:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | tuple):
        return [_text(item) for item in value]
    if isinstance(value, _Whole | _Real):
        return value.text
    return repr(value) if isinstance(value, float) else str(value)
