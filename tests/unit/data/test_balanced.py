"""Class-balanced sampling: classes equally often at every prefix, each in epochs of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_dist.data.balanced import BalancedStream
from mtl_dist.data.columns import label_columns, labels_path
from mtl_dist.data.loader import Data, open_data, train_loader
from mtl_dist.data.settings import DataSettings
from mtl_dist.data.shards import save_index
from mtl_dist.errors import UserError
from tests.tiny_datasets import TASKS, labels_of, write_dataset

COLUMNS = st.lists(st.lists(st.integers(-1, 5), min_size=1, max_size=40), min_size=1, max_size=3).filter(
    lambda columns: max(map(max, columns)) >= 0
)


def stream(columns: list[list[int]], key: int = 3) -> BalancedStream:
    return BalancedStream([np.array(column, dtype=np.int32) for column in columns], key)


def drawn(balanced: BalancedStream, columns: list[list[int]], start: int, stop: int) -> list[tuple[int, ...]]:
    """(class, source, epoch, row) at each position."""
    samples = balanced.samples(np.arange(start, stop))
    return [(columns[source][row], source, epoch, row) for source, epoch, row in samples]


@given(COLUMNS, st.integers(0, 2**63), st.integers(0, 300))
@settings(deadline=None, max_examples=50)
def test_over_any_prefix_no_class_is_more_than_one_draw_ahead(
    columns: list[list[int]], key: int, length: int
) -> None:
    balanced = stream(columns, key)
    classes = {c for column in columns for c in column if c >= 0}
    assert balanced.num_classes == len(classes)
    counts = Counter({c: 0 for c in classes})
    for found, *_ in drawn(balanced, columns, 0, length):
        counts[found] += 1
        assert max(counts.values()) - min(counts.values()) <= 1
    assert set(counts) == classes


@given(COLUMNS, st.integers(0, 2**63))
@settings(deadline=None, max_examples=50)
def test_a_class_shows_each_of_its_samples_once_per_epoch_of_its_own(
    columns: list[list[int]], key: int
) -> None:
    balanced = stream(columns, key)
    everything = [(s, r) for s, column in enumerate(columns) for r in range(len(column))]
    length = 3 * balanced.num_classes * len(everything)
    draws = drawn(balanced, columns, 0, length)
    for c in {found for found, *_ in draws}:
        members = sorted((s, r) for s, r in everything if columns[s][r] == c)
        of_class = [(epoch, source, row) for found, source, epoch, row in draws if found == c]
        for epoch in range(3):
            part = of_class[epoch * len(members) : (epoch + 1) * len(members)]
            assert {e for e, *_ in part} == {epoch}
            assert sorted(part) == [(epoch, s, r) for s, r in members]


@given(COLUMNS, st.integers(0, 10**12), st.integers(1, 40))
@settings(deadline=None, max_examples=50)
def test_the_sample_at_a_position_does_not_depend_on_what_is_asked_with_it(
    columns: list[list[int]], start: int, length: int
) -> None:
    balanced = stream(columns)
    together = drawn(balanced, columns, start, start + length)
    alone = [drawn(balanced, columns, p, p + 1)[0] for p in range(start, start + length)]
    assert together == alone


def test_blocks_and_epochs_have_orders_of_their_own() -> None:
    columns = [[number % 8 for number in range(80)]]
    draws = drawn(stream(columns), columns, 0, 8 * 20)
    blocks = {tuple(c for c, *_ in draws[b * 8 : b * 8 + 8]) for b in range(20)}
    assert len(blocks) == 20
    rows = [row for c, _, _, row in draws if c == 0]
    assert rows[:10] != rows[10:]
    other = drawn(stream(columns, key=4), columns, 0, 8 * 20)
    assert [c for c, *_ in other] != [c for c, *_ in draws]


def test_every_place_of_a_block_sees_every_class_equally_often() -> None:
    columns = [[0] * 5 + [1] * 500 + [2] * 50 + [3] * 7]
    classes = np.array([c for c, *_ in drawn(stream(columns), columns, 0, 4 * 4000)]).reshape(-1, 4)
    for place in range(4):
        counts = np.bincount(classes[:, place], minlength=4)
        assert ((counts - 1000) ** 2 / 1000).sum() < 3 + 6 * np.sqrt(6)


# ---------------------------------------------------------------- as a setting
@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name, length, first in (("tiny", 23, 0), ("other", 9, 300)):
        directory = write_dataset(root / name, {"train": length}, first=first)
        labels = [labels_of(n) for n in range(first, first + length)]
        columns = {task: [each.get(task) for each in labels] for task in TASKS}
        save_index(labels_path(directory, "train"), label_columns(TASKS, columns, length))  # type: ignore[arg-type]
    write_dataset(root / "bare", {"train": 4})
    return root


def settings_for(*paths: str, task: str = "digit", **options: Any) -> DataSettings:
    stated = {
        "train": [{"path": path} for path in paths],
        "image_size": [8, 10],
        "augment": "none",
        "sampling": {"kind": "class_balanced", "task": task},
    }
    return DataSettings.model_validate({**stated, **options}, strict=False)


def keys_of(data: Data, world_size: int, accumulation: int) -> dict[int, tuple[str, int]]:
    """The key and the digit at each position."""
    found: dict[int, tuple[str, int]] = {}
    for rank in range(world_size):
        batches = train_loader(
            data,
            seed=7,
            global_batch=6,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            start_position=0,
            end_position=60,
            workers=0,
            pin_memory=False,
        )
        for batch in batches:
            assert batch.labelled["digit"].all()
            digits = zip(batch.keys, batch.targets["digit"].tolist(), strict=True)
            found |= dict(zip(batch.positions_B.tolist(), digits, strict=True))
    return found


def test_a_run_draws_balanced_batches_however_it_is_cut(root: Path) -> None:
    data = open_data(settings_for("tiny", "other"), TASKS, root)
    assert data.describe() == "train 32, balanced over 3 classes of digit"
    found = keys_of(data, 1, 1)
    for step in range(10):
        digits = [digit for _, digit in (found[p] for p in range(6 * step, 6 * step + 6))]
        assert sorted(digits) == [0, 0, 1, 1, 2, 2]
    assert keys_of(data, 3, 2) == found


@pytest.mark.parametrize(
    ("paths", "task", "message"),
    [
        (
            ["tiny"],
            "value",
            r"data\.sampling\.task: expected a classification task.*\(digit\), found 'value'",
        ),
        (["tiny"], "digits", r"found 'digits'"),
        (["bare"], "digit", r"train\.labels\.npy: expected the label columns"),
    ],
)
def test_what_cannot_be_balanced_is_reported(root: Path, paths: list[str], task: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_data(settings_for(*paths, task=task), TASKS, root)


def test_balancing_and_mixing_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="mixing: expected proportional"):
        settings_for("tiny", "other", mixing={"kind": "equal"})
