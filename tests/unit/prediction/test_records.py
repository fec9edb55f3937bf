"""Records in files: JSON lines, CSV and parquet say the same, and a file is whole or absent."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from mtl_dist.errors import UserError
from mtl_dist.prediction.records import check_format, columns_of, open_records

ANSWER = {
    "breed": {"class_id": 1, "class_name": "Ça", "probabilities": {"a": 0.25, "b,c": 0.75}},
    "tags": {"labels": ["p", "q"], "probabilities": {"p": 0.5}},
    "age": {"value": 4.5, "unit": None},
    "surface": {"mean": [-0.5, 0.5, -1e-05]},
}
RECORDS = [{"image": "a.png", **ANSWER}, {"image": "b.png", "error": "no image"}]


def write(out: Path) -> None:
    with open_records(out, columns_of(ANSWER)) as take:
        for record in RECORDS:
            take(record)


def test_lines_are_the_records(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "deep/out.jsonl").read_text().splitlines()] == RECORDS


def test_a_table_has_a_column_for_each_value_also_where_an_image_has_none(tmp_path: Path) -> None:
    write(tmp_path / "out.csv")
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        good, bad = csv.DictReader(file)
    assert good["breed.class_name"] == "Ça"
    assert float(good["breed.probabilities.b,c"]) == 0.75
    assert good["tags.labels"] == "p;q"
    assert [float(good[f"surface.mean.{axis}"]) for axis in range(3)] == [-0.5, 0.5, -1e-05]
    assert (good["error"], bad["error"], bad["age.value"]) == ("", "no image", "")


def test_parquet_keeps_the_types(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write(tmp_path / "out.parquet")
    good, bad = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert good["breed.class_id"] == 1
    assert good["tags.labels"] == ["p", "q"]
    assert good["age.value"] == 4.5
    assert [good[f"surface.mean.{axis}"] for axis in range(3)] == [-0.5, 0.5, -1e-05]
    assert bad["error"] == "no image"
    assert bad["breed.class_name"] is None


def test_a_missing_package_and_an_unknown_format_are_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"mtl-dist\[parquet\]"):
        check_format(Path("out.parquet"))
    with pytest.raises(UserError, match=r"expected a name that ends in \.jsonl, \.json, \.csv, \.parquet"):
        check_format(Path("out.xlsx"))


def test_a_run_that_breaks_off_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_records(tmp_path / "out.csv", columns_of(ANSWER)) as take:
        take(RECORDS[0])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_numbers_and_what_parts_them_have_no_apostrophe_and_formulas_have_one(tmp_path: Path) -> None:
    values = {"some": [], "grades": ["-1", "-2"], "names": ["-a", "b"], "text": "=1+1"}
    with open_records(tmp_path / "out.csv", columns_of({"own": values})) as take:
        take({"image": "a.png", "own": values | {"some": [-1.5, 2.0]}})
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["own.some"] == "-1.5;2.0"
    assert row["own.grades"] == "-1;-2"
    assert (row["own.names"], row["own.text"]) == ("'-a;b", "'=1+1")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_more_numbers_than_a_table_has_columns_for_are_a_line(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    with (
        pytest.raises(UserError, match=r"^b\.png: .* found own\.at\.2 beside them\. Write \.jsonl"),
        open_records(tmp_path / f"out{suffix}", columns_of({"own": {"at": [0.0, 0.0]}})) as take,
    ):
        take({"image": "a.png", "own": {"at": [1.0, 2.0]}})
        take({"image": "b.png", "own": {"at": [1.0, 2.0, 3.0]}})
    assert list(tmp_path.iterdir()) == []
