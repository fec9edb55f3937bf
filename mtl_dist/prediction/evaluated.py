"""The table of an evaluated split in the run folder: written as CSV and parquet, and read again."""

from __future__ import annotations

import csv
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mtl_dist.errors import UserError
from mtl_dist.prediction.records import open_records
from mtl_dist.printable import text_of_cell
from mtl_dist.run_folder import RunFolder
from mtl_dist.sample_rows import PLACE, Table

_TEXTS = {"dataset", "key", "class_name", "labels"}
"""The last part of the names of columns that hold words; a `label` does where it stands for classes."""


def write_predictions(folder: RunFolder, split: str, table: Table) -> list[Path]:
    """Write evaluation/SPLIT_predictions.csv, and .parquet where pyarrow is installed; returns the paths."""
    path = folder.predictions_path(split)
    paths = [path, *([path.with_suffix(".parquet")] if find_spec("pyarrow") else [])]
    columns = {name: _example(values) for name, values in table.columns.items()}
    for out in paths:
        with open_records(out, columns) as write:
            for row in table.rows():
                write(row)
    return paths


def read_predictions(folder: RunFolder, split: str) -> Table | None:
    """The rows of a split; None where none were written.

    Raises:
        UserError: the file is damaged.
    """
    path = folder.predictions_path(split)
    if not path.is_file():
        return None
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file))
        names = [text_of_cell(name) for name in header]
        if tuple(names[: len(PLACE)]) != PLACE or any(len(row) != len(names) for row in rows):
            raise ValueError("rows of another length than the header")
        return Table({name: _read(name, names, [row[at] for row in rows]) for at, name in enumerate(names)})
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{path}: expected a table of predictions, found a damaged file ({error}). Write it again: "
            f"mtl evaluate RUN --split {split} --predictions."
        ) from None


def announce(paths: list[Path], num_samples: int, say: Callable[[str], None]) -> None:
    """Say where they are."""
    also = "" if len(paths) > 1 else '; pip install "mtl-dist[parquet]" adds .parquet'
    say(f"{paths[0]}: {num_samples:,} rows{also}")


def _example(values: np.ndarray) -> Any:
    if values.dtype != object:
        return 0.0
    return next((value for value in values if value is not None), "")


def _read(name: str, names: list[str], cells: list[str]) -> np.ndarray:
    task, _, last = name.rpartition(".")
    words = last in _TEXTS or (
        last == "label"
        and (f"{task}.label_id" in names or any(n.startswith(f"{task}.truths.") for n in names))
    )
    if words:
        column = np.empty(len(cells), dtype=object)
        column[:] = [text_of_cell(cell) for cell in cells]
        return column
    known = {"": np.nan, "True": 1.0, "False": 0.0}
    return np.array([known[cell] if cell in known else float(cell) for cell in cells], dtype=np.float64)
