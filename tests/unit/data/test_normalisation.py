"""Images are normalised by what was measured of them, unless they are 8-bit pictures; what is odd is said."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest

from mtl_dist.data.first_look import odd_normalisation
from mtl_dist.data.loader import Data, open_data
from mtl_dist.data.manifest import read_manifest, write_manifest
from mtl_dist.data.settings import DataSettings
from mtl_dist.errors import UserError
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.packing import pack
from mtl_dist.models.building import build_model
from mtl_dist.models.settings import ModelSettings
from mtl_dist.specs import HeadSpec

TASKS = {"y": TaskSource("classification", ("no", "yes"))}
HEADS = [HeadSpec("y", "vector", 2)]
SMALL = ModelSettings(backbone="simple_cnn")


def opened(out: Path, mean: float, dtype: type = np.uint16, samples: int = 4) -> Data:
    records = []
    for i in range(samples):
        file = io.BytesIO()
        np.save(file, np.random.default_rng(i).normal(mean, mean / 10, (8, 8, 2)).astype(dtype))
        records.append(Record(f"s{i}", file.getvalue(), {"y": i % 2}))
    pack({"train": records}, out, TASKS, out.name)
    return open_data(DataSettings.model_validate({"train": ({"path": out},), "image_size": 8}), ["y"])


def scale_of(settings: ModelSettings, data: Data | None, is_picture: bool) -> tuple[list[float], list[float]]:
    measured = None if data is None or data.pixels is None else (data.pixels.mean, data.pixels.std)
    channels = 3 if data is None else data.channels
    model = build_model(settings, HEADS, channels, (8, 8), measured=measured, is_picture=is_picture)
    return model.mean.flatten().tolist(), model.std.flatten().tolist()


def test_data_that_is_no_8_bit_picture_is_normalised_by_itself(tmp_path: Path) -> None:
    data = opened(tmp_path / "deep", 9000)
    mean, std = scale_of(SMALL, data, is_picture=False)
    assert mean == pytest.approx([9000, 9000], rel=0.02)
    assert std == pytest.approx([900, 900], rel=0.2)
    assert list(odd_normalisation(data, mean, std)) == []
    (said,) = odd_normalisation(data, [127.5, 127.5], [127.5, 127.5])
    assert "train of deep" in said and "far from 0 and 1" in said and "model.normalise=data" in said
    published = SMALL.model_copy(update={"normalise": "published"})
    assert scale_of(published, data, is_picture=False) == ([127.5, 127.5], [127.5, 127.5])


def test_8_bit_pictures_stay_with_the_published_normalisation(tmp_path: Path) -> None:
    data = opened(tmp_path / "deep", 9000)
    assert data.pixels is not None
    three = (data.pixels.mean[0],) * 3, (data.pixels.std[0],) * 3
    kept = build_model(SMALL, HEADS, 3, (8, 8), measured=three, is_picture=True)
    without = build_model(SMALL, HEADS, 3, (8, 8))
    assert kept.mean.tolist() == without.mean.tolist() and kept.std.tolist() == without.std.tolist()
    asked = SMALL.model_copy(update={"normalise": "data"})
    changed = build_model(asked, HEADS, 3, (8, 8), measured=three, is_picture=True)
    assert changed.mean.flatten().tolist() == pytest.approx(three[0])


def test_data_that_was_not_measured_is_told_of(tmp_path: Path) -> None:
    data = opened(tmp_path / "deep", 9000)
    write_manifest(tmp_path / "deep", dataclasses.replace(read_manifest(tmp_path / "deep"), pixels=None))
    data = open_data(data.settings, ["y"])
    assert data.pixels is None
    (said,) = odd_normalisation(data, [127.5, 127.5], [127.5, 127.5])
    assert "Prepare the data again" in said
    with pytest.raises(UserError, match=r"model\.normalise.*not measured"):
        scale_of(SMALL.model_copy(update={"normalise": "data"}), data, is_picture=False)


def test_several_datasets_are_one_distribution(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "a", 100, np.float32), opened(tmp_path / "b", 300, np.float32, 8)
    both = DataSettings.model_validate(
        {"train": ({"path": tmp_path / "a"}, {"path": tmp_path / "b"}), "image_size": 8}
    )
    pixels = open_data(both, ["y"]).pixels
    assert pixels is not None and first.pixels is not None and second.pixels is not None
    assert pixels.mean[0] == pytest.approx((first.pixels.mean[0] + 2 * second.pixels.mean[0]) / 3)
    assert pixels.std[0] > max(first.pixels.std[0], second.pixels.std[0])


def test_a_channel_of_one_value_is_not_divided_by_nothing() -> None:
    model = build_model(SMALL, HEADS, 1, (8, 8), measured=((7.0,), (0.0,)), is_picture=False)
    assert model.std.tolist() == [[[[1.0]]]]


def test_of_several_sources_the_odd_one_is_named(tmp_path: Path) -> None:
    opened(tmp_path / "deep", 9000)
    opened(tmp_path / "dark", 90)
    paths = {"train": ({"path": tmp_path / "deep"},), "val": ({"path": tmp_path / "dark", "split": "train"},)}
    data = open_data(DataSettings.model_validate({**paths, "image_size": 8}), ["y"])
    (said,) = odd_normalisation(data, [9000, 9000], [900, 900])
    assert said.startswith("train of dark: images normalised")
