"""The built-in digits: three tasks that belong to the stored picture."""

from __future__ import annotations

import builtins
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

pytest.importorskip("sklearn", reason="the demo extra is not installed")
pytest.importorskip("skimage", reason="the demo extra is not installed")

from mtl_dist.data.manifest import Manifest
from mtl_dist.durable import sha256_of
from mtl_dist.errors import UserError
from mtl_dist.importers.digits import ENLARGED, enlarge
from mtl_dist.importers.measures import INK, stroke_width
from mtl_dist.importers.options import PackOptions
from tests.source_files import prepared

HERE = PackOptions(workers=1)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("data") / "digits"
    return out, prepared("digits", out, HERE)


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_all_digits_are_there_with_all_labels(digits: tuple[Path, Manifest]) -> None:
    _, manifest = digits
    assert sum(split.num_samples for split in manifest.splits.values()) == 1797
    assert [(name, info.kind) for name, info in manifest.tasks.items()] == [
        ("digit", "classification"),
        ("thickness", "regression"),
        ("ink", "segmentation"),
    ]
    for split in manifest.splits.values():
        assert all(counts.missing == 0 for counts in split.labels.values())
    assert (manifest.channels, manifest.image_dtype) == (1, "uint8")


def test_every_digit_is_split_70_15_15(digits: tuple[Path, Manifest]) -> None:
    _, manifest = digits
    counts = np.array([split.labels["digit"].class_counts for split in manifest.splits.values()])
    np.testing.assert_allclose(
        counts / counts.sum(axis=0), [[0.7] * 10, [0.15] * 10, [0.15] * 10], atol=0.006
    )


def test_the_labels_are_measured_on_the_stored_picture(digits: tuple[Path, Manifest]) -> None:
    out, _ = digits
    for sample in webdataset.WebDataset(str(out / "val-000000.tar"), shardshuffle=False):
        ink = opened(sample["png"]) >= INK
        assert ink.shape == (32, 32)
        np.testing.assert_array_equal(opened(sample["ink.png"]), ink)
        labels = json.loads(sample["json"])
        assert labels["thickness"] == pytest.approx(stroke_width(ink) / ENLARGED, abs=1e-4)


def test_the_dataset_is_the_same_every_time(digits: tuple[Path, Manifest], tmp_path: Path) -> None:
    out, _ = digits
    prepared("digits", tmp_path / "again", HERE)
    assert {p.name: sha256_of(p) for p in out.iterdir()} == {
        p.name: sha256_of(p) for p in (tmp_path / "again").iterdir()
    }


@pytest.mark.parametrize("width", [3, 5, 7])
def test_a_bar_is_about_as_thick_as_it_is(width: int) -> None:
    bar = np.zeros((40, 120), bool)
    bar[15 : 15 + width, 5:115] = True
    assert stroke_width(bar) == pytest.approx(width, rel=0.08)
    assert stroke_width(bar.T) == pytest.approx(width, rel=0.08)
    y, x = np.mgrid[:120, :120]
    diagonal = (np.abs(x - y) * np.sqrt(0.5) <= width / 2) & (x > 8) & (x < 112)
    drawn = (2 * int(width / 2 / np.sqrt(0.5)) + 1) * np.sqrt(0.5)  # pixels are whole: wider than asked for
    assert stroke_width(diagonal) == pytest.approx(drawn, rel=0.08)


def test_a_dot_and_an_empty_picture_have_a_width() -> None:
    dot = np.zeros((5, 5), bool)
    dot[2, 2] = True
    assert stroke_width(dot) == 1.0
    assert stroke_width(np.zeros((5, 5), bool)) == 0.0


def test_enlarging_keeps_paper_white_and_full_ink_black() -> None:
    assert (enlarge(np.zeros((8, 8))) == 0).all()
    assert (enlarge(np.full((8, 8), 16.0)) == 255).all()


@pytest.mark.parametrize("library", ["sklearn.datasets", "skimage.morphology"])
def test_a_missing_library_is_named_with_its_remedy(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == library:
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r'pip install "mtl-dist\[demo\]"'):
        prepared("digits", tmp_path / "out", HERE)
    assert list(tmp_path.iterdir()) == []
