"""The loader: every sample exactly once per epoch, one stream however it is cut, no damage hidden."""

from __future__ import annotations

import logging
import os
import pickle
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_dist.batch import Batch
from mtl_dist.config.loading import load_settings
from mtl_dist.data import batch_loader, batches
from mtl_dist.data.loader import BatchLoader, Data, eval_loader, open_data, train_loader
from mtl_dist.data.manifest import read_manifest, write_manifest
from mtl_dist.data.mixing import Schedule, Stream
from mtl_dist.data.order import Order
from mtl_dist.data.partition import EvaluationPartition, TrainingPartition
from mtl_dist.data.settings import DataSettings
from mtl_dist.data.transforms import ImageTransform
from mtl_dist.errors import UserError
from tests import tiny_datasets
from tests.tiny_datasets import (
    TASKS,
    encoded,
    image_of,
    labels_of,
    mask_of,
    masks_of,
    npy,
    png,
    write_dataset,
)

TRAIN = 23


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root / "tiny", {"train": TRAIN, "val": 11, "test": 3})
    write_dataset(root / "other", {"train": 9, "val": 4}, first=300, tasks={"digit": TASKS["digit"]})
    return root


def settings_for(*paths: str, **options: Any) -> DataSettings:
    stated = {"train": [{"path": path} for path in paths], "image_size": [8, 10], "augment": "none"}
    return DataSettings.model_validate({**stated, **options}, strict=False)


def opened(root: Path, *paths: str, **options: Any) -> Data:
    return open_data(settings_for(*(paths or ("tiny",)), **options), TASKS, root)


def training(data: Data, **options: Any) -> BatchLoader:
    stated: dict[str, Any] = {
        "seed": 7,
        "global_batch": 6,
        "accumulation": 1,
        "rank": 0,
        "world_size": 1,
        "start_position": 0,
        "end_position": data.num_train_samples,
        "workers": 0,
        "pin_memory": False,
    }
    return train_loader(data, **{**stated, **options})


def contents(batches: Iterator[Batch] | BatchLoader) -> dict[int, tuple[Any, ...]]:
    """What each valid position holds: key, pixels, labels."""
    found: dict[int, tuple[Any, ...]] = {}
    for batch in batches:
        for i in range(len(batch)):
            if batch.valid_B[i]:
                labels = [
                    (name, batch.targets[name][i].tolist()) for name, has in batch.labelled.items() if has[i]
                ]
                position = int(batch.positions_B[i])
                assert position not in found
                found[position] = (batch.keys[i], batch.images_BCHW[i].tolist(), labels)
    return found


def check_sample(number: int, image_CHW: torch.Tensor, batch: Batch, i: int) -> None:
    """Sample i of a batch is the dataset's sample of this number, seen as it is stored."""
    assert image_CHW.permute(1, 2, 0).tolist() == image_of(number).tolist()
    labels, masks = labels_of(number), masks_of(number)
    for name in batch.targets:
        assert bool(batch.labelled[name][i]) == (name in labels or name in masks)
    assert batch.targets["digit"][i] == labels.get("digit", 0)
    assert batch.targets["value"][i] == labels.get("value", 0)
    expected_tags = [float(c in labels.get("tags", [])) for c in range(4)]  # type: ignore[operator]
    assert batch.targets["tags"][i].tolist() == expected_tags
    expected_mask = torch.from_numpy(mask_of(number)) if masks else torch.full((8, 10), 255)
    assert torch.equal(batch.targets["shape"][i].int(), expected_mask.int())


# ---------------------------------------------------------------- what a batch is
def test_a_batch_holds_the_samples_that_were_written(datasets: Path) -> None:
    for batch in training(opened(datasets), global_batch=5):
        assert batch.images_BCHW.dtype == torch.uint8
        assert batch.images_BCHW.is_contiguous(memory_format=torch.channels_last)
        dtypes = {name: target.dtype for name, target in batch.targets.items()}
        assert dtypes == {
            "digit": torch.int64,
            "value": torch.float32,
            "tags": torch.float32,
            "shape": torch.uint8,
        }
        for i in range(len(batch)):
            if batch.valid_B[i]:
                check_sample(int(batch.keys[i][6:]), batch.images_BCHW[i], batch, i)


def test_only_the_tasks_asked_for_are_loaded(datasets: Path) -> None:
    data = open_data(settings_for("tiny"), ["value"], datasets)
    batch = next(iter(training(data)))
    assert list(batch.targets) == list(batch.labelled) == list(data.task_infos) == ["value"]


def test_images_deeper_than_eight_bits_are_raw_floats(tmp_path: Path) -> None:
    directory = write_dataset(
        tmp_path / "deep", {"train": 4}, encode=lambda number: npy(image_of(number).astype(np.uint16) * 200)
    )
    write_manifest(directory, replace(read_manifest(directory), image_dtype="uint16"))
    batch = next(iter(training(opened(tmp_path, "deep"), global_batch=4)))
    assert batch.images_BCHW.dtype == torch.float32
    assert batch.images_BCHW.is_contiguous(memory_format=torch.channels_last)
    for i, key in enumerate(batch.keys):
        assert batch.images_BCHW[i].permute(1, 2, 0).tolist() == (image_of(int(key[6:])) * 200.0).tolist()


# ---------------------------------------------------------------- one stream, however it is cut
@pytest.mark.parametrize(
    ("world_size", "global_batch", "workers"),
    [
        *((w, g, 0) for w, g in ((1, 1), (1, 4), (4, 8), (5, 10), (5, 40))),
        *((w, 6, n) for w in (1, 2, 3) for n in (0, 1, 2)),
    ],
)
def test_every_sample_comes_exactly_once_per_epoch(
    datasets: Path, world_size: int, global_batch: int, workers: int
) -> None:
    data = opened(datasets)
    options = {"global_batch": global_batch, "world_size": world_size, "workers": workers}
    found: dict[int, tuple[Any, ...]] = {}
    lengths = set()
    for rank in range(world_size):
        loader = training(data, rank=rank, end_position=2 * TRAIN, **options)
        batches = list(loader)
        lengths.add(len(batches))
        assert len(loader) == len(batches)
        mine = contents(iter(batches))
        assert not mine.keys() & found.keys()
        found |= mine
    assert lengths == {-(-2 * TRAIN // global_batch)}
    assert sorted(found) == list(range(2 * TRAIN))
    for epoch in range(2):
        keys = [found[position][0] for position in range(epoch * TRAIN, (epoch + 1) * TRAIN)]
        assert sorted(keys) == [f"sample{n:05d}" for n in range(TRAIN)]


@pytest.fixture(scope="module")
def reference(datasets: Path) -> dict[int, tuple[Any, ...]]:
    """Positions 0 to 70 of an augmented, mixed stream, read one by one on one rank."""
    return contents(training(augmented(datasets), global_batch=1, end_position=70))


def augmented(datasets: Path) -> Data:
    return opened(datasets, "tiny", "other", augment="strong", image_size=[12, 9])


@given(
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 60),
    st.integers(0, 40),
    st.sampled_from([0, 0, 0, 0, 2]),
)
@settings(max_examples=25, deadline=None)
def test_any_cut_and_any_start_shows_the_same_samples_in_the_same_views(
    datasets: Path,
    reference: dict[int, tuple[Any, ...]],
    world_size: int,
    accumulation: int,
    micro_batch: int,
    start: int,
    length: int,
    workers: int,
) -> None:
    data = augmented(datasets)
    end = min(start + length, 70)
    global_batch = world_size * accumulation * micro_batch
    found: dict[int, tuple[Any, ...]] = {}
    for rank in range(world_size):
        loader = training(
            data,
            global_batch=global_batch,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            start_position=start,
            end_position=end,
            workers=workers if rank == 0 else 0,
        )
        batches = list(loader)
        assert (
            len(batches) == -(-(end - start) // global_batch) * accumulation if end > start else not batches
        )
        assert all(len(batch) == micro_batch for batch in batches)
        found |= contents(iter(batches))
    assert found == {position: reference[position] for position in range(start, end)}


def test_micro_batches_of_the_ranks_are_consecutive_slices_of_the_step() -> None:
    for step in range(2):
        expected = 100 + step * 24
        for part in range(2):
            for rank in range(3):
                partition = TrainingPartition(24, 2, rank, 3, start=100, end=148)
                positions = partition.positions(step * 2 + part)
                assert positions.tolist() == list(range(expected, expected + 4))
                expected += 4


@pytest.mark.parametrize(("length", "accumulation"), [(10_000, 1), (123_457, 2)])
def test_a_thousand_ranks_count_every_position_of_an_epoch_once(length: int, accumulation: int) -> None:
    world_size = 1024
    global_batch = world_size * accumulation * 3
    stream = Stream([Order([1000] * (length // 1000) + [length % 1000], 8, key=1)], Schedule([length]))
    counts = np.zeros(length, dtype=int)
    lengths = set()
    for rank in range(world_size):
        partition = TrainingPartition(global_batch, accumulation, rank, world_size, start=0, end=length)
        lengths.add(len(partition))
        positions = np.concatenate([partition.positions(index) for index in range(len(partition))])
        positions = positions[positions < length]
        if len(positions):
            np.add.at(counts, stream.samples(positions).rows, 1)
    assert (counts == 1).all()
    assert len(lengths) == 1


@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None)
def test_partitions_for_evaluation_give_every_sample_to_one_rank_and_equal_batches(
    length: int, batch_size: int, world_size: int
) -> None:
    partitions = [EvaluationPartition(batch_size, rank, world_size, length) for rank in range(world_size)]
    assert len({len(partition) for partition in partitions}) == 1
    positions = [p for part in partitions for i in range(len(part)) for p in part.positions(i) if p < length]
    assert sorted(positions) == list(range(length))
    assert len(partitions[0]) * batch_size * world_size - length < batch_size * world_size


def test_an_epoch_may_end_inside_a_batch(datasets: Path) -> None:
    loader = training(opened(datasets), global_batch=20, end_position=40)
    assert [int(b.valid_B.sum()) for b in loader] == [20, 20]


def test_epochs_and_seeds_have_orders_of_their_own(datasets: Path) -> None:
    data = opened(datasets)
    found = contents(training(data, end_position=2 * TRAIN))
    other = contents(training(data, seed=8))
    orders = [
        [found[p][0] for p in range(TRAIN)],
        [found[p][0] for p in range(TRAIN, 2 * TRAIN)],
        [other[p][0] for p in range(TRAIN)],
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_sample_is_seen_otherwise_in_every_epoch(datasets: Path) -> None:
    data = opened(datasets, augment="strong")
    found = contents(training(data, end_position=2 * TRAIN))
    by_key: dict[str, list[Any]] = {}
    for key, pixels, _ in found.values():
        by_key.setdefault(key, []).append(pixels)
    assert sum(first != second for first, second in by_key.values()) > TRAIN * 0.8


# ---------------------------------------------------------------- padding
@pytest.mark.parametrize("end", [1, 3, 7, 23])
def test_what_fills_the_last_global_batch_repeats_it_and_counts_nowhere(datasets: Path, end: int) -> None:
    data = opened(datasets)
    for rank in range(3):
        *_, last = training(data, global_batch=12, rank=rank, world_size=3, end_position=end)
        padding = ~last.valid_B
        assert torch.equal(padding, last.positions_B >= end)
        for name, has in last.labelled.items():
            assert not has[padding].any(), name
        first = (end - 1) // 12 * 12
        real = {p: c[1] for p, c in contents(training(data, global_batch=1, end_position=end)).items()}
        shown = [real[p] for p in range(first, end)]
        for i in padding.nonzero().flatten().tolist():
            assert last.images_BCHW[i].tolist() in shown


def test_no_positions_are_no_batches(datasets: Path) -> None:
    assert list(training(opened(datasets), start_position=5, end_position=5)) == []


def test_a_global_batch_that_does_not_divide_is_refused(datasets: Path) -> None:
    with pytest.raises(UserError, match=r"multiple of ranks x accumulation = 2 x 2 = 4, found 6"):
        training(opened(datasets), world_size=2, accumulation=2)


# ---------------------------------------------------------------- evaluation
@pytest.mark.parametrize(
    ("world_size", "batch_size", "workers"), [(1, 4, 0), (1, 4, 2), (3, 2, 0), (4, 5, 0)]
)
def test_evaluation_sees_every_sample_once_in_its_stored_order(
    datasets: Path, world_size: int, batch_size: int, workers: int
) -> None:
    data = opened(datasets, augment="strong")
    found: dict[int, tuple[Any, ...]] = {}
    lengths = set()
    for rank in range(world_size):
        loader = eval_loader(
            data, "val", batch_size=batch_size, rank=rank, world_size=world_size, workers=workers
        )
        batches = list(loader)
        lengths.add(len(batches))
        assert all(len(batch) == batch_size for batch in batches)
        found |= contents(iter(batches))
    assert len(lengths) == 1
    assert [found[p][0] for p in range(11)] == [f"sample{TRAIN + n:05d}" for n in range(11)]
    assert [found[p][1] for p in range(11)] == [
        image_of(TRAIN + n).transpose(2, 0, 1).tolist() for n in range(11)
    ]


def test_an_evaluation_loader_can_be_used_again(datasets: Path) -> None:
    loader = eval_loader(opened(datasets), "val", batch_size=4, rank=0, world_size=1, workers=1)
    assert contents(loader) == contents(loader)


def test_a_split_that_is_not_there_is_named(datasets: Path) -> None:
    with pytest.raises(UserError, match=r"'tset'. Did you mean test\?"):
        eval_loader(opened(datasets), "tset", batch_size=4, rank=0, world_size=1, workers=0)


# ---------------------------------------------------------------- several sources
def test_mixed_sources_with_other_tasks_show_every_sample_once_per_epoch(datasets: Path) -> None:
    data = opened(datasets, "tiny", "other")
    assert data.num_train_samples == TRAIN + 9
    keys = []
    for batch in training(data, global_batch=8, end_position=32):
        keys += batch.keys
        for i, key in enumerate(batch.keys):
            number = int(key[6:])
            if number >= 300:
                assert not any(batch.labelled[name][i] for name in ("value", "tags", "shape"))
                assert bool(batch.labelled["digit"][i]) == (number % 5 > 0)
                assert (batch.targets["shape"][i] == 255).all()
            else:
                check_sample(number, batch.images_BCHW[i], batch, i)
    expected = [f"sample{n:05d}" for n in (*range(TRAIN), *range(300, 309))]
    assert sorted(keys) == expected


def test_the_validation_sets_of_all_sources_follow_one_another(datasets: Path) -> None:
    data = opened(datasets, "tiny", "other")
    found = contents(eval_loader(data, "val", batch_size=4, rank=0, world_size=1, workers=0))
    expected = [*range(TRAIN, TRAIN + 11), *range(309, 313)]
    assert [found[p][0] for p in sorted(found)] == [f"sample{n:05d}" for n in expected]


def test_weights_decide_how_often_a_source_is_seen(datasets: Path) -> None:
    train = [{"path": "tiny", "weight": 1.0}, {"path": "other", "weight": 3.0}]
    data = opened(datasets, train=train, mixing={"kind": "weights"})
    found = contents(training(data, global_batch=4, end_position=80))
    assert sum(int(key[6:]) >= 300 for key, *_ in found.values()) == 60
    assert data.num_train_samples == TRAIN + 9


# ---------------------------------------------------------------- the facts of the data
def test_facts_of_the_tasks_come_from_the_split_that_is_trained_on(datasets: Path) -> None:
    data = opened(datasets)
    assert data.image_size == (8, 10)
    assert data.channels == 3
    assert data.splits == ("train", "val", "test")
    assert data.num_train_samples == TRAIN
    digits = [labels_of(n).get("digit") for n in range(TRAIN)]
    assert data.task_infos["digit"].num_labelled == sum(d is not None for d in digits)
    assert data.task_infos["digit"].class_counts == tuple(digits.count(c) for c in range(3))
    val = opened(datasets, train=[{"path": "tiny", "split": "val"}])
    assert val.task_infos["digit"].num_labelled == sum(
        "digit" in labels_of(n) for n in range(TRAIN, TRAIN + 11)
    )


def test_facts_of_several_sources_are_pooled(datasets: Path, tmp_path: Path) -> None:
    values = {"a": np.array([1.0, 2.0, 6.0, 9.0]), "b": np.array([-3.0, 5.0, 5.5])}
    for name, numbers in values.items():
        directory = write_dataset(tmp_path / name, {"train": 4})
        manifest = read_manifest(directory)
        info = replace(
            manifest.tasks["value"],
            num_labelled=len(numbers),
            mean=float(numbers.mean()),
            std=float(numbers.std()),
            minimum=float(numbers.min()),
            maximum=float(numbers.max()),
        )
        write_manifest(directory, replace(manifest, tasks=manifest.tasks | {"value": info}))
    data = opened(tmp_path, "a", "b")
    everything = np.concatenate([*values.values()])
    assert data.task_infos["value"].mean == pytest.approx(everything.mean(), rel=1e-12)
    assert data.task_infos["value"].std == pytest.approx(everything.std(), rel=1e-12)
    assert (data.task_infos["value"].minimum, data.task_infos["value"].maximum) == (-3, 9)
    single = opened(tmp_path, "a")
    assert data.task_infos["digit"].num_labelled == 2 * single.task_infos["digit"].num_labelled
    assert data.task_infos["digit"].class_counts == tuple(
        2 * c for c in single.task_infos["digit"].class_counts
    )
    assert data.task_infos["value"].num_labelled == 2 * single.task_infos["value"].num_labelled


def test_the_mix_is_stated(datasets: Path) -> None:
    assert opened(datasets).describe() == "train 23; val 11; test 3"
    mixed = opened(datasets, "tiny", "other", mixing={"kind": "equal"}).describe()
    assert mixed == "train 32; val 15; test 3; training mix equal: tiny 50.0%, other 50.0%"


def test_val_and_test_can_be_stated(datasets: Path) -> None:
    data = opened(datasets, val=[{"path": "other", "split": "train"}], test=[])
    assert data.splits == ("train", "val")
    assert data.num_samples("val") == 9


def test_grey_sources_are_shown_in_colour_beside_coloured_ones(datasets: Path, tmp_path: Path) -> None:
    directory = write_dataset(
        tmp_path / "grey", {"train": 4}, encode=lambda number: npy(image_of(number)[..., 0])
    )
    write_manifest(directory, replace(read_manifest(directory), channels=1))
    alone, mixed = opened(tmp_path, "grey"), opened(tmp_path, "grey", str(datasets / "tiny"))
    assert next(iter(training(alone, global_batch=4))).images_BCHW.shape == (4, 1, 8, 10)
    assert next(iter(training(mixed, global_batch=4))).images_BCHW.shape == (4, 3, 8, 10)


def renamed(directory: Path, **changes: Any) -> None:
    write_manifest(directory, replace(read_manifest(directory), **changes))


def test_sources_that_do_not_fit_together_are_refused(datasets: Path, tmp_path: Path) -> None:
    tiny = str(datasets / "tiny")
    directory = write_dataset(tmp_path / "odd", {"train": 4, "val": 2})
    tasks = read_manifest(directory).tasks
    renamed(directory, tasks=tasks | {"digit": replace(tasks["digit"], classes=("a", "c", "b"))})
    line = r"odd: expected 3 classes \(a, b, c\) for the task digit.* found 3 classes \(a, c, b\)"
    with pytest.raises(UserError, match=line):
        opened(tmp_path, tiny, "odd")
    with pytest.raises(UserError, match=line):
        opened(tmp_path, tiny, val=[{"path": "odd", "split": "val"}])
    renamed(directory, tasks=tasks, channels=4)
    with pytest.raises(UserError, match="expected images of 4 channels as in other sources, found 3"):
        opened(tmp_path, tiny, "odd")
    renamed(directory, channels=3, image_dtype="float32")
    with pytest.raises(UserError, match=r"odd: expected uint8 images .* found float32"):
        opened(tmp_path, tiny, "odd")


@pytest.mark.parametrize(
    ("options", "tasks", "message"),
    [
        (
            {},
            ["digits"],
            r"tasks\.digits: .* Did you mean digit\? Tasks in the data: digit, value, tags, shape",
        ),
        ({"train": [{"path": "nowhere"}]}, TASKS, "nowhere: expected a prepared dataset, found no such"),
        (
            {"train": [{"path": "tiny", "split": "tran"}]},
            TASKS,
            "split 'tran', found none of this name",
        ),
        (
            {"val": [{"path": "tiny", "split": "vall"}]},
            TASKS,
            "split 'vall', found none of this name",
        ),
    ],
)
def test_what_is_not_there_is_named(
    datasets: Path, options: dict[str, Any], tasks: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        open_data(settings_for("tiny", **options), tasks, datasets)


def test_a_task_without_a_label_is_told_by_its_count(tmp_path: Path) -> None:
    write_dataset(tmp_path / "one", {"train": 1})
    data = opened(tmp_path, "one")
    assert data.task_infos["digit"].num_labelled == 0
    batch = next(iter(training(data, global_batch=1)))
    assert not any(has.any() for has in batch.labelled.values())


# ---------------------------------------------------------------- settings
RECIPE = "train: [{path: a}, {path: b}]\nimage_size: 64\n"


def test_settings_are_read_as_a_recipe_states_them(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(RECIPE)
    overrides = ["augment.rotate=10", "augment.flip=true", "mixing={kind: temperature, temperature: 3}"]
    read = load_settings(DataSettings, path, [*overrides, "shuffle_window=full", "image_size=[32, 48]"])
    assert read.augmentation.rotate == 10
    assert read.augmentation.flip
    assert read.augmentation.crop_scale == (1.0, 1.0)
    assert read.size == (32, 48)
    assert load_settings(DataSettings, path).size == (64, 64)
    assert load_settings(DataSettings, path, ["augment=strong"]).augmentation.erase > 0
    assert (
        read.without_augmentation().augmentation
        == load_settings(DataSettings, path, ["augment=none"]).augmentation
    )
    assert read.with_absolute_paths(tmp_path).train[1].path == tmp_path / "b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mixing.kind=weights", r"train\.0\.weight: expected a number > 0, found nothing"),
        ("train.1.weight=2", r"train\.1\.weight: expected none with .*proportional.*, found 2"),
        ("shuffle_window=0", "shuffle_window: expected"),
        ("shuffle_window=none", "shuffle_window: expected"),
        ("augment=standart", "augment: expected .*standard"),
        ("on_bad_sample={kind: skip, max_fraction: 2}", r"on_bad_sample\.max_fraction: expected"),
        ("image_size=0", "image_size: expected"),
        ("workers=-1", "workers: expected"),
        ("train=[]", "train: expected"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(RECIPE)
    with pytest.raises(UserError, match=message) as error:
        load_settings(DataSettings, path, [override])
    assert len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------- broken samples
def spoiled(number: int) -> bytes:
    return b"\xff\xd8\xff rotten" if number in (3, 17) else encoded(number)


@pytest.fixture(scope="module")
def rotten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rotten")
    write_dataset(root / "tiny", {"train": TRAIN}, encode=spoiled)
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_sample_ends_the_run_with_one_line_that_names_it(rotten: Path, workers: int) -> None:
    with pytest.raises(UserError, match=r"train-00000\d\.tar, sample sample000\d\d: a damaged JPEG") as error:
        list(training(opened(rotten), workers=workers))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_samples_can_be_masked_and_are_named_and_counted(
    rotten: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = opened(rotten, on_bad_sample={"kind": "skip", "max_fraction": 0.1})
    with caplog.at_level(logging.WARNING):
        batches = list(training(data, workers=workers))
    assert [len(batch) for batch in batches] == [6, 6, 6, 6]
    assert sum(batch.num_bad for batch in batches) == 2
    found = contents(iter(batches))
    expected = {f"sample{n:05d}" for n in range(TRAIN) if n not in (3, 17)}
    assert {key for key, *_ in found.values()} == expected
    for batch in batches:
        bad = ~batch.valid_B & (batch.positions_B < TRAIN)
        assert int(bad.sum()) == batch.num_bad
        assert (batch.images_BCHW[bad] == 0).all()
        assert (batch.targets["shape"][bad] == 255).all()
        assert not any(has[bad].any() for has in batch.labelled.values())
    for key in ("sample00003", "sample00017"):
        assert sum(key in message and "damaged JPEG" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("group", [(1, 1 << 20), (3, 1 << 20), (8, 1)])
def test_how_many_samples_are_decoded_side_by_side_changes_nothing(
    rotten: Path, monkeypatch: pytest.MonkeyPatch, group: tuple[int, int]
) -> None:
    skip = {"kind": "skip", "max_fraction": 0.1}
    data = opened(rotten, on_bad_sample=skip, augment={"crop_scale": [0.3, 1.0], "flip": True})
    expected = contents(training(data))
    monkeypatch.setattr(batches, "_GROUP", group[0])
    monkeypatch.setattr(batches, "_GROUP_BYTES", group[1])
    assert contents(training(data)) == expected


def test_too_many_broken_samples_end_the_run(rotten: Path) -> None:
    data = opened(rotten, on_bad_sample={"kind": "skip", "max_fraction": 0.05})
    with pytest.raises(UserError, match=r"max_fraction: expected at most 0\.05 .* found 2 of"):
        list(training(data))


def test_one_broken_sample_within_the_bound_is_no_reason_to_stop_early(rotten: Path) -> None:
    data = opened(rotten, on_bad_sample={"kind": "skip", "max_fraction": 0.09})
    assert sum(batch.num_bad for batch in training(data, global_batch=1, end_position=3 * TRAIN)) == 6


def spoil_labels(directory: Path, row: int, text: bytes) -> None:
    index = np.load(directory / "train.index.npy")[row]
    with open(directory / "train-000000.tar", "r+b") as tar:
        tar.seek(int(index["json_offset"]))
        tar.write(text.ljust(int(index["json_size"])))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"digit":3,"tags":[0],"value":1}', "label digit is 3, where a class from 0 to 2 is expected"),
        (b'{"digit":0.5,"tags":[0],"value":1}', "label digit is 0.5"),
        (b'{"tags":[0],"value":1}', "labels lack digit, which the index says it has"),
        (b'{"digit":1,"tags":[4],"value":1}', "label tags is 4, where a class from 0 to 3"),
        (b'{"digit":1,"tags":1,"value":1}', "label tags is 1, where a list"),
        (b'{"digit":1,"tags":[0],"value":"x"}', "label value is 'x', where a number"),
        (b'{"digit":1,"tags":[0],"value":NaN}', "label value is nan, where a number"),
    ],
)
def test_labels_that_cannot_be_are_reported(tmp_path: Path, text: bytes, reason: str) -> None:
    directory = write_dataset(tmp_path / "tiny", {"train": 2}, first=1)
    spoil_labels(directory, 0, text)
    with pytest.raises(UserError, match=f"sample sample00001: its {reason}"):
        list(training(opened(tmp_path)))


def test_a_mask_of_another_size_or_class_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, mask, reason in (
        ("small", np.zeros((4, 10), np.uint8), "its mask shape is 10x4, its image 10x8"),
        (
            "beyond",
            np.full((8, 10), 2, np.uint8),
            "its mask shape holds 2, where classes from 0 to 1 and 255",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(tiny_datasets, "masks_of", lambda number, mask=mask: {"shape": png(mask)})
            write_dataset(tmp_path / name, {"train": 2})
        with pytest.raises(UserError, match=reason):
            list(training(opened(tmp_path, name)))


# ---------------------------------------------------------------- processes
@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_every_global_generator_alone(datasets: Path, workers: int) -> None:
    data = opened(datasets, augment="strong")
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(training(data, workers=workers))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


def children() -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            if parent == os.getpid():
                found.add(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find the workers")
@pytest.mark.parametrize("still_starting", [False, True])
def test_workers_go_on_when_signals_reach_every_process(
    datasets: Path, still_starting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if still_starting:
        begin = batch_loader.begin_worker
        slow = lambda worker: (time.sleep(worker), begin(worker))  # noqa: E731
        monkeypatch.setattr(batch_loader, "begin_worker", slow)
    before = children()
    batches = iter(training(opened(datasets), global_batch=1, workers=2))
    found = contents(iter([next(batches)]))
    workers = children() - before
    assert len(workers) >= 2
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        for worker in workers:
            if "resource_tracker" not in Path(f"/proc/{worker}/cmdline").read_text():
                os.kill(worker, number)
    found |= contents(batches)
    assert sorted(found) == list(range(TRAIN))


def test_batches_can_be_built_by_a_process_that_was_not_forked(datasets: Path) -> None:
    loader = training(augmented(datasets), global_batch=8)
    batches = pickle.loads(pickle.dumps(loader.batches))
    ours, theirs = next(iter(loader)), batches[0].batch()
    assert theirs.keys == ours.keys
    assert torch.equal(theirs.images_BCHW, ours.images_BCHW)


def test_a_worker_builds_its_batch_in_shared_memory(datasets: Path) -> None:
    batch = next(iter(training(opened(datasets), workers=1)))
    assert batch.images_BCHW.is_shared()
    assert (
        batch.targets["shape"].untyped_storage().data_ptr() == batch.images_BCHW.untyped_storage().data_ptr()
    )


def test_a_training_dataset_without_a_label_of_the_recipe_s_tasks_is_left_out(tmp_path: Path) -> None:
    write_dataset(tmp_path / "breeds", {"train": 12, "val": 4}, tasks={"digit": TASKS["digit"]})
    write_dataset(tmp_path / "moods", {"train": 9, "val": 3}, tasks={"value": TASKS["value"]})
    settings = settings_for(str(tmp_path / "breeds"), str(tmp_path / "moods"))
    both, one = open_data(settings, ["digit", "value"]), open_data(settings, ["digit"])
    assert (both.num_train_samples, both.num_samples("val")) == (21, 7)
    assert (one.num_train_samples, one.num_samples("val")) == (12, 4)
    assert one.left_out == ("moods",)
    assert "left out, with no label of these tasks: moods" in one.describe()


class Halving(ImageTransform):
    """Shows every second pixel."""

    training_only = False

    def size_after(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // 2, size[1] // 2

    def __call__(self, image_CHW: Any, masks: Any, draws: Any) -> Any:
        return image_CHW[:, ::2, ::2], masks


class HalvingOfTraining(Halving):
    training_only = True


def test_a_transform_that_changes_the_size_makes_the_batches_size(datasets: Path) -> None:
    step = f"{__name__}.Halving"
    data = open_data(settings_for("tiny", transforms=[step]), ["digit", "value"], datasets)
    assert data.image_size == (4, 5)
    for loader in (training(data), eval_loader(data, "val", batch_size=4, rank=0, world_size=1, workers=0)):
        batch = next(iter(loader))
        assert batch.images_BCHW.shape[2:] == (4, 5)


@pytest.mark.parametrize(
    ("step", "tasks", "said"),
    [
        (
            "HalvingOfTraining",
            ["digit"],
            "the same size in training and in evaluation, found 4 x 5 and 8 x 10",
        ),
        ("Halving", ["digit", "shape"], "steps that keep 8 x 10, because shape has a place"),
    ],
)
def test_a_size_that_training_or_masks_cannot_have_is_refused(
    datasets: Path, step: str, tasks: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=f"data.transforms: expected {said}"):
        open_data(settings_for("tiny", transforms=[f"{__name__}.{step}"]), tasks, datasets)
