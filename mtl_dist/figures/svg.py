"""Charts as SVG text for a web page, whose style sheet colours them: light, dark and on paper.

A chart names classes, never colours: `s0` to `s5` are series, `grid`, `guide` and `mark` what they say. Texts
are escaped. No chart is wider than its column, whatever its view box says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

import numpy as np

WIDTH, HEIGHT = 360.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 12.0, 10.0, 34.0
_MOST_POINTS = 1200
NUMBERS_UP_TO, _NAMES_UP_TO, _LONGEST = 14, 42, 16
"""Classes up to which a matrix shows its numbers, and its names; letters up to which these are shown."""


@dataclass(frozen=True)
class Series:
    """A line through points; without points there is none. `kind` is its class in the style sheet."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    kind: str = "s0"
    dots: bool = False


@dataclass
class Chart:
    """Axes over ranges of numbers, into which marks are drawn."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str = ""
    y_label: str = ""
    width: float = WIDTH
    height: float = HEIGHT
    whole_x: bool = False
    _parts: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the data is in the picture."""
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        inner = self.width - _LEFT - _RIGHT, self.height - _TOP - _BOTTOM
        return _LEFT + across * inner[0], _TOP + (1 - up) * inner[1]

    def line(self, series: Series) -> None:
        """A line with gaps where a value is missing; a dot where it has one point alone."""
        runs: list[list[str]] = [[]]
        for x, y in zip(series.x, series.y, strict=True):
            if y is None or not math.isfinite(y):
                runs.append([])
                continue
            left, top = self.at(x, min(max(y, self.y[0]), self.y[1]))
            runs[-1].append(f"{left:.1f},{top:.1f}")
        for run in runs:
            if len(run) > 1:
                self._parts.append(f'<polyline class="line {series.kind}" points="{" ".join(run)}"/>')
            if len(run) == 1 or (series.dots and run):
                for point in run:
                    x_text, _, y_text = point.partition(",")
                    self._parts.append(
                        f'<circle class="dot {series.kind}" cx="{x_text}" cy="{y_text}" r="2.6"/>'
                    )

    def points(self, x: np.ndarray, y: np.ndarray) -> None:
        """A dot each; of very many an even choice."""
        step = max(1, -(-len(x) // _MOST_POINTS))
        for one, other in zip(x[::step].tolist(), y[::step].tolist(), strict=True):
            left, top = self.at(one, other)
            self._parts.append(f'<circle class="point s0" cx="{left:.1f}" cy="{top:.1f}" r="2.2"/>')

    def bars(self, edges: Sequence[float], heights: Sequence[float], kind: str = "s0") -> None:
        """A bar between each two edges."""
        for low, high, height in zip(edges[:-1], edges[1:], heights, strict=True):
            left, top = self.at(low, height)
            right, bottom = self.at(high, self.y[0])
            if bottom - top > 0.05:
                width = max(right - left - 1, 0.5)
                self._parts.append(
                    f'<rect class="bar {kind}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
                    f'height="{bottom - top:.1f}"/>'
                )

    def mark(self, x: float, words: str, low: bool = False) -> None:
        """A vertical line with words beside it, at its top or, if `low`, at its foot."""
        left, top = self.at(x, self.y[1])
        bottom = self.at(x, self.y[0])[1]
        far = left > self.width * 0.6
        self._parts.append(
            f'<line class="mark" x1="{left:.1f}" x2="{left:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
            f'<text class="note" x="{left + (-5 if far else 5):.1f}" '
            f'y="{bottom - 7 if low else top + 9:.1f}" '
            f'text-anchor="{"end" if far else "start"}">{escape(words)}</text>'
        )

    def segment(self, start: tuple[float, float], end: tuple[float, float], kind: str = "guide") -> None:
        """A straight line between two points of the data."""
        (x1, y1), (x2, y2) = self.at(*start), self.at(*end)
        self._parts.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def svg(self, title: str) -> str:
        """The picture; `title` is what a screen reader says."""
        axes = []
        for value, text in _labelled(ticks(*self.y)):
            left, top = self.at(self.x[0], value)
            axes.append(
                f'<line class="grid" x1="{left:.1f}" x2="{self.width - _RIGHT:.1f}" y1="{top:.1f}" '
                f'y2="{top:.1f}"/><text class="tick" x="{left - 6:.1f}" y="{top + 3.5:.1f}" '
                f'text-anchor="end">{text}</text>'
            )
        for value, text in _labelled(ticks(*self.x, most=8 if self.whole_x else 5)):
            if self.whole_x and value != int(value):
                continue
            left, bottom = self.at(value, self.y[0])
            axes.append(
                f'<text class="tick" x="{left:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{text}</text>'
            )
        middle = (_LEFT + self.width - _RIGHT) / 2
        if self.x_label:
            axes.append(
                f'<text class="label" x="{middle:.1f}" y="{self.height - 4:.1f}" text-anchor="middle">'
                f"{escape(self.x_label)}</text>"
            )
        if self.y_label:
            axes.append(
                f'<text class="label" transform="translate(10 {self.height / 2 - 8:.1f}) rotate(-90)" '
                f'text-anchor="middle">{escape(self.y_label)}</text>'
            )
        return framed("".join(axes) + "".join(self._parts), self.width, self.height, title)


def framed(content: str, width: float, height: float, title: str, most: float = 1.4) -> str:
    """A picture around SVG elements, shown up to `most` times as large as these say."""
    size = ' class="large"' if width > WIDTH * 1.4 else ""
    return (
        f'<svg{size} viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'style="max-width:{width * most:.0f}px">{content}</svg>'
    )


def lines(
    series: Sequence[Series],
    title: str,
    x_label: str,
    *,
    y: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    whole_x: bool = False,
    size: tuple[float, float] = (WIDTH, HEIGHT),
    diagonal: bool = False,
) -> str:
    """Lines over one another; "" where no point is finite."""
    known = [value for one in series for value in one.y if value is not None and math.isfinite(value)]
    across = [value for one in series for value in one.x]
    if not known or not across:
        return ""
    low, high = y or padded(min(known), max(known))
    chart = Chart((min(across), max(across)), (low, high), x_label, "", *size, whole_x)
    if chart.x[0] == chart.x[1]:
        chart.x = (chart.x[0] - 0.5, chart.x[1] + 0.5)
    if diagonal:
        chart.segment((chart.x[0], low), (chart.x[1], high))
    for one in series:
        chart.line(one)
    for place, words in marks:
        near = [
            y for one in series for x, y in zip(one.x, one.y, strict=True) if x == place and y is not None
        ]
        chart.mark(place, words, low=bool(near) and max(near) > (low + high) / 2)
    return chart.svg(title)


def histogram(values: np.ndarray, title: str, x_label: str, *, bins: int = 24, zero: bool = False) -> str:
    """How often values occur; `zero` marks 0."""
    if not len(values):
        return ""
    counts, edges = np.histogram(values, bins=bins)
    chart = Chart((float(edges[0]), float(edges[-1])), (0.0, float(counts.max()) * 1.05 or 1.0), x_label)
    chart.bars(edges.tolist(), counts.tolist())
    if zero and edges[0] < 0 < edges[-1]:
        chart.segment((0.0, 0.0), (0.0, chart.y[1]), "mark")
    return chart.svg(title)


def matrix(
    shares: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    *,
    numbers: np.ndarray | None = None,
    x_label: str = "",
    y_label: str = "",
    signed: bool = False,
) -> str:
    """A heat map of values from 0 to 1 (`signed`: -1 to 1); names and `numbers` where they can be read."""
    num_rows, num_columns = shares.shape
    most = max(num_rows, num_columns)
    named = most <= _NAMES_UP_TO
    longest = max((len(name) for name in (*rows, *columns)), default=0) if named else 0
    margin = 26 + min(_LONGEST, longest) * 6.6
    cell = max(4.0, min(56.0, 224.0 / most), min(40.0, 420.0 / most))
    parts = []
    for (i, j), share in np.ndenumerate(shares):
        number = None if numbers is None else float(numbers[i, j])
        name = f"{rows[i]} → {columns[j]}: {short(float(share) if number is None else number)}"
        corner = margin + j * cell, margin + i * cell
        shown = number if most <= NUMBERS_UP_TO else None
        parts.append(_cell(corner, cell, float(share), name, shown, signed))
    if named:
        parts += _cell_names(rows, columns, margin, cell)
    for words, turn in ((x_label, ""), (y_label, "rotate(-90)")):
        if words:
            along = margin + cell * (num_rows if turn else num_columns) / 2
            x, y = (10.0, along) if turn else (along, 10.0)
            parts.append(
                f'<text class="label" transform="translate({x:.1f} {y:.1f}) {turn}" text-anchor="middle">'
                f"{escape(words)}</text>"
            )
    across, down = margin + cell * num_columns + 6, margin + cell * num_rows + 6
    return framed("".join(parts), across, down, title, most=1.1)


def _cell(
    corner: tuple[float, float], side: float, share: float, name: str, number: float | None, signed: bool
) -> str:
    """A square of a matrix, which names itself under the pointer, and its number unless that is 0."""
    x, y = corner
    alpha = 0.0 if math.isnan(share) else min(1.0, abs(share))
    kind = "cell minus" if signed and share < 0 else "cell"
    square = (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{side - 0.8:.1f}" '
        f'height="{side - 0.8:.1f}" style="--v:{alpha:.3f}"><title>{escape(name)}</title></rect>'
    )
    if not number:
        return square
    return square + (
        f'<text class="count {"on" if alpha > 0.55 else "off"}" x="{x + side / 2:.1f}" '
        f'y="{y + side / 2 + 3.5:.1f}" text-anchor="middle">{short(number)}</text>'
    )


def _cell_names(rows: Sequence[str], columns: Sequence[str], margin: float, cell: float) -> list[str]:
    """The names at the left of the rows, and above the columns, which read upwards."""
    size = min(11.0, max(6.0, cell * 0.62))
    tick = f'<text class="tick" style="font-size:{size:.1f}px"'
    parts = [
        f'{tick} x="{margin - 5:.1f}" y="{margin + (i + 0.5) * cell + size / 3:.1f}" text-anchor="end">'
        f"{escape(cut(name))}</text>"
        for i, name in enumerate(rows)
    ]
    for j, name in enumerate(columns):
        x = margin + (j + 0.5) * cell + size / 3
        parts.append(
            f'{tick} transform="translate({x:.1f} {margin - 6:.1f}) rotate(-90)" text-anchor="start">'
            f"{escape(cut(name))}</text>"
        )
    return parts


def counts(names: Sequence[str], numbers: Sequence[float], title: str) -> str:
    """A horizontal bar for each name, with its number."""
    height, longest = 15.0, max(numbers, default=0) or 1.0
    parts = []
    for row, (name, number) in enumerate(zip(names, numbers, strict=True)):
        middle, width = row * height + 11, 170 * number / longest
        parts.append(
            f'<text class="tick" x="104" y="{middle:.1f}" text-anchor="end">{escape(cut(name))}</text>'
            f'<rect class="bar s0" x="110" y="{middle - 9:.1f}" width="{max(width, 1):.1f}" '
            f'height="{height - 4:.1f}"/>'
            f'<text class="tick" x="{114 + width:.1f}" y="{middle:.1f}">{short(number)}</text>'
        )
    return framed("".join(parts), WIDTH, height * len(names) + 4, title)


def padded(low: float, high: float) -> tuple[float, float]:
    """A range with some air around the values."""
    air = (high - low) * 0.06 or abs(high) * 0.1 or 0.5
    return (0.0 if 0 <= low < 0.25 * high else low - air), high + air


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within a range.

    >>> ticks(0, 1), ticks(0, 47)
    ([0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 10.0, 20.0, 30.0, 40.0])
    """
    span = high - low
    if not (span > 0 and math.isfinite(span)):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    steps = [factor * power for factor in (1, 2, 2.5, 5, 10, 20, 25, 50)]
    step = next(
        (s for s in steps if math.floor(high / s + 1e-9) - math.ceil(low / s - 1e-9) + 1 <= most), span
    )
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    """Each tick with its number, in as many digits as tell them apart and are true to them.

    >>> _labelled([2.2725, 2.275]), _labelled([1.0, 2.0])
    ([(2.2725, '2.2725'), (2.275, '2.2750')], [(1.0, '1'), (2.0, '2')])
    """
    texts = [short(value) for value in values]
    if len(set(texts)) < len(texts):
        near = min(abs(b - a) for a, b in pairwise(values)) / 100
        decimals = next((d for d in range(1, 12) if all(abs(round(v, d) - v) < near for v in values)), 12)
        texts = [f"{value:,.{decimals}f}" for value in values]
    return list(zip(values, texts, strict=True))


def short(value: float) -> str:
    """A number in few letters.

    >>> short(0.25), short(1500.0), short(3.0), short(0.00012), short(123.456), short(2500000), short(3e12)
    ('0.25', '1,500', '3', '1.2e-04', '123', '2.5M', '3e+12')
    """
    if value != value:
        return "–"
    value = value or 0.0  # no minus before 0
    size = abs(value)
    if size >= 1e9:
        return f"{value:.3g}"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < size < 1e-3 else f"{value:.3g}"


def cut(name: str, most: int = _LONGEST) -> str:
    """The name, shortened in its middle where it is longer: names often differ only at their ends.

    >>> cut("species number 072"), cut("cat")
    ('species …ber 072', 'cat')
    """
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}…{name[-tail:]}"
