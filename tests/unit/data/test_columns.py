"""Label columns say what the labels of the shards say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mtl_dist.data.columns import columns_dtype, label_columns, labels_at, labels_path
from mtl_dist.data.manifest import read_manifest
from mtl_dist.data.reader import SplitReader
from mtl_dist.data.shards import Label
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.options import PackOptions
from mtl_dist.importers.packing import pack
from mtl_dist.specs import TaskInfo
from tests.tiny_datasets import TASKS, image_of, labels_of, masks_of, png

WIDE = TASKS | {"wide": TaskInfo("multilabel", classes=tuple(str(c) for c in range(19)))}
SAMPLE = st.fixed_dictionaries(
    {},
    optional={
        "digit": st.integers(0, 2),
        "value": st.floats(allow_nan=False, allow_infinity=False),
        "tags": st.sets(st.integers(0, 3)).map(sorted),
        "wide": st.sets(st.integers(0, 18)).map(sorted),
    },
)


@given(st.lists(SAMPLE, max_size=20))
def test_labels_come_back_as_they_went_in(samples: list[dict[str, Label]]) -> None:
    labels = {task: [sample.get(task) for sample in samples] for task in WIDE}
    columns = label_columns(WIDE, labels, len(samples))
    assert columns.dtype == columns_dtype(WIDE)
    assert columns.dtype.names == ("digit", "value", "tags", "wide")
    assert columns.dtype.itemsize == 4 + 8 + 1 + 3
    for row, sample in enumerate(samples):
        assert labels_at(columns, row, {name: WIDE[name] for name in sample}) == sample
        assert (columns["digit"][row] == -1) == ("digit" not in sample)
        assert np.isnan(columns["value"][row]) == ("value" not in sample)


def test_a_prepared_dataset_has_columns_that_agree_with_its_shards(tmp_path: Path) -> None:
    records = [Record(f"s{n}", png(image_of(n)), labels_of(n), masks_of(n)) for n in range(23)]  # type: ignore[arg-type]
    tasks = {name: TaskSource(info.kind, info.classes) for name, info in TASKS.items()}
    pack(
        {"train": records}, tmp_path / "data", tasks, "tiny", options=PackOptions(workers=1, shard_samples=5)
    )
    manifest = read_manifest(tmp_path / "data")
    reader = SplitReader(tmp_path / "data", manifest, "train")
    columns = np.load(labels_path(tmp_path / "data", "train"), mmap_mode="r")
    for row in range(23):
        labels = reader.read(row).labels
        assert labels_at(columns, row, {name: TASKS[name] for name in labels}) == labels
