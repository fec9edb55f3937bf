"""Tables for the terminal, whose cells say what they hold: no escape sequence and no markup acts."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mtl_dist.printable import printable


class CellTable(Table):
    """A rich table of texts of unknown origin; what is too wide for it goes on in the next line, whole."""

    def add_column(self, header: RenderableType = "", *args: Any, **options: Any) -> None:
        super().add_column(_cell(header), *args, **{"overflow": "fold"} | options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*(None if cell is None else _cell(cell) for cell in cells), **options)


def _cell(cell: RenderableType) -> RenderableType:
    return Text("\n".join(map(printable, cell.split("\n")))) if isinstance(cell, str) else cell
