"""Predictions as records, and where records go: JSON lines, CSV, parquet.

A record of lines is nested as an answer is; a row of a table has a column for each value, `task.value` or
`task.probabilities.class`; the numbers of a list have one each, `task.mean.0`, as in the table of a split.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from mtl_dist.durable import is_about, replacing
from mtl_dist.errors import UserError
from mtl_dist.printable import cell
from mtl_dist.sample_rows import is_vector

Record: TypeAlias = dict[str, Any]
"""`{"image": name, task: {...}}`, or `{"image": name, "error": why}`."""

_ROWS = 1000
"""Rows of a parquet file that are written at once."""


def plain(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What of an answer JSON holds: all but its maps."""
    return {key: value for key, value in answer.items() if not isinstance(value, np.ndarray)}


def flat(
    record: Mapping[str, Any], prefix: str = "", columns: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The record as a row of a table, whose `columns` say which lists of numbers have one for each number;
    by default all have."""
    row: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if is_vector(value) and (columns is None or f"{name}.0" in columns):
            value = {str(number): one for number, one in enumerate(value)}
        row |= flat(value, f"{name}.", columns) if isinstance(value, Mapping) else {name: value}
    return row


def _row(record: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    row = flat(record, columns=columns)
    for name in row:
        if name not in columns:
            raise UserError(
                f"{record.get('image', name)}: expected the same columns of every image, found {name} beside "
                "them. Write .jsonl, whose records may differ."
            )
    return row


def columns_of(example: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a table with rows like the `example`, and an example of each one's values."""
    return {"image": "", "error": ""} | flat(example)


def to_json(record: Record) -> str:
    text = json.dumps(record, ensure_ascii=False)
    if text.isprintable():
        return text
    # Escaped is what JSON may leave as it is, too: a terminal may obey controls beyond ASCII.
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def check_format(out: Path | None) -> None:
    """Refuse a file of a format that is not written, or for which a package is missing.

    Raises:
        UserError: what is.
    """
    if out is None:
        return
    if out.suffix.lower() not in _FORMATS:
        raise UserError(
            f"--out {out}: expected a name that ends in {', '.join(_FORMATS)}, found {out.suffix or 'none'}."
        )
    if out.suffix.lower() == ".parquet":
        _pyarrow()


@contextmanager
def open_records(out: Path | None, columns: Mapping[str, Any]) -> Iterator[Callable[[Record], None]]:
    """A function that takes records, and writes them to a file by its suffix, or prints JSON lines.

    The file is there, whole, when the block has ended well.

    Raises:
        UserError: it cannot be written.
    """
    if out is None:
        yield lambda record: print(to_json(record), flush=True)
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(out, sync=False) as temporary,
            _FORMATS[out.suffix.lower()](temporary, columns) as write,
        ):
            yield write
    except OSError as error:
        if not is_about(error, out.parent):
            raise
        raise UserError(f"{out}: expected a file that can be written, found: {error.strerror}.") from None


@contextmanager
def _lines(path: Path, columns: Mapping[str, Any]) -> Iterator[Callable[[Record], None]]:
    with open(path, "w", encoding="utf-8") as file:
        yield lambda record: _print(file, to_json(record))


def _print(file: IO[str], line: str) -> None:
    file.write(line + "\n")


@contextmanager
def _csv(path: Path, columns: Mapping[str, Any]) -> Iterator[Callable[[Record], None]]:
    """Comma-separated, UTF-8; several values of a cell are parted by semicolons."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writerow({name: cell(name) for name in columns})

        def write(record: Record) -> None:
            cells = _row(record, columns).items()
            writer.writerow({k: _cell(v) for k, v in cells})

        yield write


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        value = ";".join(map(str, value))
    return cell(value) if isinstance(value, str) else value


@contextmanager
def _parquet(path: Path, columns: Mapping[str, Any]) -> Iterator[Callable[[Record], None]]:
    arrow, parquet = _pyarrow()
    schema = arrow.schema([(name, _arrow_type(arrow, example)) for name, example in columns.items()])
    with parquet.ParquetWriter(path, schema) as file:
        table = _Table(lambda rows: file.write_table(arrow.Table.from_pylist(rows, schema)))
        yield lambda record: table.add(_row(record, columns))
        table.flush()


@dataclass
class _Table:
    """Rows on their way to a file."""

    write: Callable[[Sequence[Record]], None]
    rows: list[Record] = field(default_factory=list)

    def add(self, row: Record) -> None:
        self.rows.append(row)
        if len(self.rows) == _ROWS:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            self.write(self.rows)
            self.rows = []


def _arrow_type(arrow: Any, example: Any) -> Any:
    if isinstance(example, list):
        return arrow.list_(_arrow_type(arrow, example[0] if example else ""))
    types = {bool: arrow.bool_(), int: arrow.int64(), float: arrow.float64()}
    return types.get(type(example), arrow.string())


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "--out: expected pyarrow, which writes parquet, found it not installed. "
            'Install it with `pip install "mtl-dist[parquet]"`, or write .csv or .jsonl.'
        ) from None
    return pyarrow, pyarrow.parquet


_FORMATS = {".jsonl": _lines, ".json": _lines, ".csv": _csv, ".parquet": _parquet}
