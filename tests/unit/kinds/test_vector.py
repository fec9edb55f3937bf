"""Several numbers with names: cells, columns, moments, targets."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mtl_dist.errors import UserError
from mtl_dist.kinds.cells import parse_cells
from mtl_dist.kinds.vector import Vector
from mtl_dist.kinds.vocabulary import Cell, Declared, LabelError
from mtl_dist.specs import TaskInfo

KIND = Vector()
INFO = TaskInfo("vector", ("dx", "dy", "turn"), unit="px,px,deg")


def parsed(cells: list[Cell], names: tuple[str, ...] | None = None) -> tuple[tuple[str, ...], list[object]]:
    found = parse_cells(KIND, cells, str, Declared(names))
    return found.classes, list(found.labels)


@pytest.mark.parametrize(
    "cell", [["1", "", "-2.5"], "[1, null, -2.5]", "[1, NaN, -2.5]", "1||-2.5", "1 nan -2.5"]
)
def test_a_label_is_a_list_a_json_list_or_texts_with_separators(cell: Cell) -> None:
    assert parsed([cell], INFO.classes) == (INFO.classes, [[1.0, None, -2.5]])


def test_numbers_without_names_are_called_by_their_places() -> None:
    assert parsed([["1", "2"], "", ["", ""], "[null, null]"]) == (("1", "2"), [[1.0, 2.0], None, None, None])


@pytest.mark.parametrize(
    ("cell", "message"),
    {
        "1 2": r"expected 3 numbers \(dx, dy, turn\), found 2\. A number that is missing",
        "1 2 x": "expected finite numbers, or nothing for one that is missing, found 'x'",
        "1 2 inf": "found 'inf'",
        "[1, [2], 3]": "expected a list of numbers",
        "[1, 2": "expected a list of numbers",
    }.items(),
)
def test_other_cells_are_refused(cell: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed([cell], INFO.classes)


def test_columns_name_the_numbers_and_units_are_one_or_one_each() -> None:
    assert KIND.cell_columns("dx, dy", ("dx", "dy")) == (("dx", "dy"), ("dx", "dy"))
    assert KIND.cell_columns("both", ("both",)) == (("both",), ())
    assert [number.unit for number in KIND.numbers(INFO).values()] == ["px", "px", "deg"]
    assert [number.unit for number in KIND.numbers(replace(INFO, unit="m")).values()] == ["m"] * 3
    with pytest.raises(LabelError, match="one unit, or one for each of dx, dy, turn, found 'px,deg'"):
        KIND.declare("offset", Declared(INFO.classes, "px,deg"))


def test_labels_are_the_same_after_storing_and_counts_are_of_each_number() -> None:
    labels = [[1.0, None, 3.0], None, [4.0, 5.0, None]]
    column = KIND.encode(labels, INFO)
    assert np.zeros(3, [("x", *KIND.column_type(INFO))])["x"].shape == column.shape
    assert [KIND.decode(row, INFO) for row in column] == [labels[0], [None] * 3, labels[2]]
    assert KIND.counts(column, INFO) == (2, 1, 1)
    target = KIND.target(labels[0], INFO)
    assert target.dtype == np.float32 and KIND.label_of(target, INFO) == labels[0]
    assert KIND.text(labels[0], INFO) == "dx 1 px, dy -, turn 3 deg"
    for wrong in ([1.0, 2.0], [1.0, 2.0, math.inf], [1.0, True, 2.0], 3.0):
        with pytest.raises(LabelError, match="a list of 3 numbers or nulls"):
            KIND.target(wrong, INFO)


def test_moments_of_each_number_are_pooled_over_datasets() -> None:
    rng = np.random.default_rng(0)
    column = rng.normal([1, 20, -3], [1, 5, 0.1], (40, 3))
    column[rng.random((40, 3)) < 0.3] = np.nan
    column[:15, 2] = np.nan  # one dataset has none of it
    whole = KIND.facts(column, INFO)
    assert whole.facts["mean"] == pytest.approx(np.nanmean(column, axis=0).tolist())
    assert whole.facts["std"] == pytest.approx(np.nanstd(column, axis=0).tolist())
    merged = KIND.merge([KIND.facts(column[:15], INFO), KIND.facts(column[15:], INFO)])
    for key, values in whole.facts.items():
        assert merged.facts[key] == pytest.approx(values), key
    assert KIND.numbers(merged)["dy"].minimum == pytest.approx(np.nanmin(column[:, 1]))
