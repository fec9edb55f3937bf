"""The table of a set of stacks: a row for each stack, or for each page of each stack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mtl_dist.errors import UserError
from mtl_dist.importers.summary import listed
from mtl_dist.importers.table_files import Row, check_whole_lines, read_table

_STACK_COLUMNS = ("stack", "file", "path", "filename")
_PAGE_COLUMNS = ("page", "frame")


@dataclass(frozen=True, eq=False)
class StackTable:
    """The rows by what the table calls a stack, and by page; the page -1 is the row of a whole stack."""

    where: str
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[int, Row]]
    files: tuple[str, ...] = ()

    def rows_of(self, name: str, path: str, num_frames: int) -> Callable[[int], Row]:
        """What gives the row of each frame of a stack; one of empty cells where the table has none.

        Raises:
            UserError: a row for a page that the stack lacks.
        """
        empty = Row(f"{self.where or 'the stacks'}, {path}", dict.fromkeys(self.columns, ""))
        pages = next((self.rows[each] for each in _names(name, path) if each in self.rows), {})
        for page, row in pages.items():
            if page >= num_frames:
                raise UserError(
                    f"{row.where}: expected a page from 0 to {num_frames - 1} of {path}, found {page}."
                )
        return lambda frame: pages.get(frame, pages.get(-1, empty))

    def check_used(self, stacks: Sequence[tuple[str, str]]) -> None:
        """Refuse a table that speaks of stacks which are not there, or of none.

        Raises:
            UserError: with the first such row.
        """
        known = {each for name, path in stacks for each in _names(name, path)}
        for stack, pages in self.rows.items():
            if stack not in known:
                row = next(iter(pages.values()))
                raise UserError(
                    f"{row.where}: expected one of the stacks {listed([path for _, path in stacks])}, found "
                    f"{stack!r}."
                )


NO_TABLE = StackTable("", (), {})


def read_stack_table(path: Path, src: Path) -> StackTable:
    """The table in a file, which is looked for in the directory of the stacks first.

    Raises:
        UserError: no table, one without a column of stacks, or two rows for one page.
    """
    inside = src / path
    table = read_table(inside if inside.is_file() else path, None)
    where = str(inside if inside.is_file() else path)
    check_whole_lines(table.short, table.columns)
    stack_column = next((column for column in _STACK_COLUMNS if column in table.columns), None)
    page_column = next((column for column in _PAGE_COLUMNS if column in table.columns), None)
    if stack_column is None:
        raise UserError(
            f"{where}: expected a column {' or '.join(_STACK_COLUMNS)}, found {', '.join(table.columns)}."
        )
    rows: dict[str, dict[int, Row]] = {}
    for row in table.rows:
        page = -1 if page_column is None else _page(row, page_column)
        pages = rows.setdefault(str(row.cells[stack_column]), {})
        if page in pages:
            what = "stack" if page < 0 else f"page ({page})"
            raise UserError(
                f"{row.where}: expected one row for each {what} of {row.cells[stack_column]}, found another "
                f"in {pages[page].where}."
            )
        pages[page] = row
    return StackTable(where, table.columns, rows, table.files)


def _page(row: Row, column: str) -> int:
    text = str(row.cells[column])
    if not text.isdecimal():
        raise UserError(f"{row.where}, column {column!r}: expected a page from 0 on, found {text!r}.")
    return int(text)


def _names(name: str, path: str) -> tuple[str, ...]:
    """What a table may call a stack: its path, its file name, its stem, or what stands for the star."""
    return (path, PurePosixPath(path).name, PurePosixPath(path).stem, name)
