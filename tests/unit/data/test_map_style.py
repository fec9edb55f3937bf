"""Map-style Datasets as sources: samples, order and refusals are those of every other dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_dist.config.loading import resolved_settings
from mtl_dist.data.facts import identities
from mtl_dist.data.inspect import inspect_dataset
from mtl_dist.data.loader import Data, open_data, train_loader
from mtl_dist.data.manifest import read_manifest
from mtl_dist.data.settings import DataSettings
from mtl_dist.errors import UserError
from mtl_dist.importers.external import with_indexes
from tests.tiny_datasets import image_of, write_dataset

FIELDS = {
    "digit": {"kind": "classification", "classes": ["a", "b", "c"]},
    "value": {"kind": "regression", "unit": "mm"},
    "tags": {"kind": "multilabel", "classes": ["p", "q", "r", "s"]},
    "shape": {"kind": "segmentation", "classes": ["ground", "thing"]},
}


def settings_of(source: dict[str, Any], **more: Any) -> DataSettings:
    common = {"image_size": [8, 10], "augment": "none", "workers": 0}
    return resolved_settings(DataSettings, {**common, "train": [source], **more})


def tiny(kind: str = "Tiny", fields: dict[str, Any] = FIELDS, **arguments: Any) -> dict[str, Any]:
    return {"dataset": {"kind": f"tests.map_datasets.{kind}", **arguments}, "fields": fields}


def opened(root: Path, source: dict[str, Any], **more: Any) -> Data:
    settings = settings_of(source, **more)
    tasks = source.get("fields", FIELDS)
    return open_data(with_indexes(settings, root), list(tasks), root)


def batches(data: Data, rank: int = 0, world_size: int = 1, start: int = 0) -> list[Any]:
    loader = train_loader(
        data,
        seed=3,
        global_batch=8,
        accumulation=1,
        rank=rank,
        world_size=world_size,
        start_position=start,
        end_position=48,
        workers=0,
        pin_memory=False,
    )
    return list(loader)


def by_position(some: list[Any]) -> dict[int, Any]:
    found = {}
    for batch in some:
        for i, position in enumerate(batch.positions_B.tolist()):
            targets = {
                name: target[i].tolist() if bool(batch.labelled[name][i]) else None
                for name, target in batch.targets.items()
            }
            found[position] = (batch.images_BCHW[i].tolist(), targets)
    return found


def test_samples_labels_and_statistics_are_those_of_the_same_samples_packed(tmp_path: Path) -> None:
    write_dataset(tmp_path / "packed", {"train": 20})
    packed = open_data(settings_of({"path": str(tmp_path / "packed")}), list(FIELDS))
    data = opened(tmp_path, tiny())
    assert data.num_samples("train") == 20 and data.channels == 3 and data.image_dtype == "uint8"
    for name, info in data.task_infos.items():
        same = packed.task_infos[name]
        assert (info.kind, info.classes, info.num_labelled, info.class_counts) == (
            same.kind,
            same.classes,
            same.num_labelled,
            same.class_counts,
        )
    found, expected = (sorted(map(repr, by_position(batches(each)).values())) for each in (data, packed))
    assert sorted(set(found)) == sorted(set(expected))


def test_the_order_is_the_same_on_two_ranks_and_after_a_resume_on_others(tmp_path: Path) -> None:
    data = opened(tmp_path, tiny())
    whole = by_position(batches(data))
    assert len(whole) == 48
    two = [by_position(batches(data, rank, 2)) for rank in (0, 1)]
    assert {**two[0], **two[1]} == whole
    resumed = [by_position(batches(data, rank, 4, start=24)) for rank in range(4)]
    assert {k: v for part in resumed for k, v in part.items()} == {k: whole[k] for k in range(24, 48)}


def test_an_index_is_made_once_and_again_for_other_samples(tmp_path: Path) -> None:
    first = identities(opened(tmp_path, tiny()))
    (made,) = [path for path in (tmp_path / ".mtl").iterdir() if path.is_dir()]
    before = (made / "dataset.json").stat().st_mtime_ns
    assert identities(opened(tmp_path, tiny())) == first
    assert (made / "dataset.json").stat().st_mtime_ns == before
    assert inspect_dataset(made, verify=True).problems == ()
    (other,) = identities(opened(tmp_path, tiny(first=1)))["train"]
    assert first["train"][0].differences(other)
    assert len([path for path in (tmp_path / ".mtl").iterdir() if path.is_dir()]) == 2
    named = {**tiny(), "index": "here"}
    opened(tmp_path, named)
    with pytest.raises(UserError, match="expected an index of the Dataset in the recipe as it is now, found"):
        opened(tmp_path, {**tiny(first=1), "index": "here"})


def test_tuples_pictures_tensors_and_vectors_are_understood(tmp_path: Path) -> None:
    pairs = opened(tmp_path, tiny("Pairs", {"digit": {"kind": "classification"}}))
    assert pairs.task_infos["digit"].classes == ("a", "b", "c")
    images = {repr(image) for image, _ in by_position(batches(pairs)).values()}
    assert repr(torch.from_numpy(image_of(7)).permute(2, 0, 1).tolist()) in images
    fields = {"digit": {"kind": "classification"}, "tags": FIELDS["tags"]}
    nested = opened(tmp_path, tiny("Nested", fields))
    assert nested.task_infos["tags"].class_counts == (5, 5, 5, 5)
    apart = {name: {**each, "from": f"1.{name}"} for name, each in fields.items()}
    assert opened(tmp_path, tiny("Nested", apart)).task_infos == nested.task_infos


def test_val_is_held_out_or_another_dataset_with_the_class_names_of_training(tmp_path: Path) -> None:
    held = opened(tmp_path, {**tiny(), "indexing": {"val": 0.25}})
    assert (held.num_samples("train"), held.num_samples("val")) == (15, 5)
    fields = {"digit": {"kind": "classification"}}
    source = {"dataset": {"kind": "tests.map_datasets.Tiny", "first": 100, "length": 2}}
    data = opened(tmp_path, tiny("Tiny", fields), val=[source])
    assert data.num_samples("val") == 2
    manifest = read_manifest(data.sources["val"][0].facts.path)
    assert manifest.tasks["digit"].classes == ("a", "b", "c")
    assert np.unique(data.sources["val"][0].reader.classes("digit")).tolist() == [-1, 2]


def test_a_fingerprint_of_its_own_is_what_a_dataset_is_known_by(tmp_path: Path) -> None:
    (one,) = opened(tmp_path, tiny("Known"), val=None).sources["train"]
    manifest = read_manifest(one.facts.path)
    assert manifest.map_style is not None
    assert manifest.map_style.dataset["kind"] == "tests.map_datasets.Known"


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (tiny("Unsteady", {"digit": {"kind": "classification"}}), "expected the same image when it is read"),
        (tiny("Odd", {"digit": {"kind": "classification"}}), "expected a label of digit, found a object"),
        (tiny(broken=7), "Tiny, sample 7: OSError: no such file"),
        (tiny(length=0), "expected samples, found none with .*length: 0"),
        (
            tiny("Pairs", FIELDS),
            "fields.digit.from: expected its place in a sample, which is a tuple of Tensor",
        ),
        ({**tiny(), "image": "picture"}, "expected an image at 'picture' of a sample, found a NoneType"),
    ],
)
def test_what_a_dataset_does_wrong_is_one_line(tmp_path: Path, source: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        opened(tmp_path, source)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (tiny("Endless"), "expected a map-style Dataset, with __len__ and __getitem__, found"),
        (
            {"dataset": "tests.map_datasets.Tiny"},
            "fields: expected the tasks that a `dataset` has, found none",
        ),
        ({**tiny(), "path": "data/x"}, "expected path or dataset, found both"),
        ({}, "expected path or dataset, found none"),
        ({**tiny(), "indexing": {"group": "patient"}}, "indexing.group: expected none of a `dataset`"),
        ({**tiny(), "stream": True}, "stream: expected false of a `dataset`"),
        ({"path": "x.tar", "fields": {"a": {"kind": "regression"}}}, "fields.a.from: expected the field in"),
    ],
)
def test_settings_that_do_not_fit_are_refused(source: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        settings_of(source)
