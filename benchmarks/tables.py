"""What a benchmark found: rows of values, for JSON, a terminal and docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

Value = str | int | float | None
"""None where there is nothing to say."""
Row = Mapping[str, Value]


@dataclass(frozen=True)
class Findings:
    """One table; every row has the columns of the first one."""

    title: str
    rows: Sequence[Row]

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0])

    def show(self, console: Console) -> None:
        """Print it."""
        console.print(f"\n{self.title}", highlight=False, soft_wrap=True)
        table = Table()
        for column in self.columns:
            table.add_column(column, justify="right" if self._holds_numbers(column) else "left")
        for row in self.rows:
            table.add_row(*(shown(row[column]) for column in self.columns))
        console.print(table)

    def markdown(self) -> str:
        """The same as docs have it."""
        rules = ["---:" if self._holds_numbers(column) else "---" for column in self.columns]
        lines = [self.columns, rules, *([shown(row[c]) for c in self.columns] for row in self.rows)]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])

    def to_json(self) -> dict[str, Any]:
        """For `Findings(**it)`."""
        return asdict(self)

    def _holds_numbers(self, column: str) -> bool:
        return not any(isinstance(row[column], str) for row in self.rows)


def shown(value: Value) -> str:
    """A value with as many digits as mean something."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"
