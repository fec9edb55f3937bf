"""The rows of an evaluated split in the run folder, of every kind: they can be written and read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mtl_dist.prediction.evaluated import read_predictions, write_predictions
from mtl_dist.prediction.records import columns_of, plain
from mtl_dist.run_folder import RunFolder
from mtl_dist.sample_rows import Table
from tests.unit.tasks.test_resampling import ALL, table_of


@pytest.mark.parametrize("which", ALL)
def test_rows_are_read_as_they_were_written(which: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    table = table_of(which)[1]
    folder.evaluation.mkdir()
    paths = write_predictions(folder, "val", table)
    found = read_predictions(folder, "val")
    assert found is not None
    assert list(found.columns) == list(table.columns)
    for name, values in table.columns.items():
        if values.dtype == np.float64:
            assert found.columns[name] == pytest.approx(values, rel=1e-5, nan_ok=True), name
    if len(paths) > 1:
        parquet = pytest.importorskip("pyarrow.parquet")
        assert parquet.read_table(paths[1]).column_names == list(table.columns)


@pytest.mark.parametrize("which", ALL)
def test_an_answer_has_the_columns_that_it_has_in_the_table_of_a_split(which: str) -> None:
    task, table, *_ = table_of(which)
    size = (4, 4) if task.layout == "map" else ()
    answer = plain(task.decode(torch.zeros(1, task.loss.num_outputs, *size))[0])
    names = columns_of({"it": answer}).keys() - {"image", "error"}
    assert {name for name in names if not name.rpartition(".")[2].startswith("unit")} <= table.columns.keys()


def test_a_direction_has_a_column_for_each_of_its_numbers() -> None:
    table = table_of("normals")[1]
    means = np.stack([table.columns[f"it.mean.{axis}"] for axis in range(3)])
    assert np.linalg.norm(means, axis=0) == pytest.approx(1)


def test_a_text_that_a_spreadsheet_would_take_for_a_formula_is_read_as_it_was(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.evaluation.mkdir()
    keys = np.array(["=1+1", "-b", "'tis", "-0.5", "@x"], dtype=object)
    names = np.array(["d"] * len(keys), dtype=object)
    table = Table({"position": np.arange(len(keys), dtype=np.float64), "dataset": names, "key": keys})
    write_predictions(folder, "val", table)
    assert "'=1+1" in folder.predictions_path("val").read_text()
    found = read_predictions(folder, "val")
    assert found is not None
    assert found.columns["key"].tolist() == keys.tolist()
