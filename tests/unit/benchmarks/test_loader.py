"""The benchmark of loaders measures every loader that is installed, on the images given."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.loader import bench_loader
from benchmarks.peer_loaders import PHOTOS
from mtl_dist.errors import UserError


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (60, 70, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("zipped", [False, True])
def test_every_installed_loader_has_its_row(
    zipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / ("images.zip" if zipped else "images")
    if zipped:
        with zipfile.ZipFile(images, "w") as archive:
            archive.writestr("folder/a.jpg", jpeg(0))
            archive.writestr("folder/notes.txt", "no image")
    else:
        images.mkdir()
        for number in range(3):
            (images / f"{number}.jpg").write_bytes(jpeg(number))
    bench_loader(images, num_images=10, num_small=12, workers=[0], repeats=1)
    shown = capsys.readouterr().out
    assert ("1 JPEGs" if zipped else "3 JPEGs") in shown
    for contender in PHOTOS:
        if contender.is_installed and "region" not in contender.name:
            assert contender.name in shown
    assert "28x28 png" in shown
    assert "28x28 npy" in shown


def test_a_folder_without_jpegs_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected JPEGs, found none"):
        bench_loader(tmp_path, num_images=10, num_small=12, workers=[0], repeats=1)
