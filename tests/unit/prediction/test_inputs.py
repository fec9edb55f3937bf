"""What is given to be predicted: every image of it, in order, nothing left out silently."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from mtl_dist.data.decode import decode_image
from mtl_dist.errors import UserError
from mtl_dist.prediction.inputs import Input, check_given, inputs_of
from tests.tiny_datasets import image_of, png, write_dataset


def given(*arguments: object, split: str | None = None, stdin: bytes = b"") -> tuple[list[Input], list[str]]:
    notes: list[str] = []
    found = inputs_of([str(one) for one in arguments], split, io.BytesIO(stdin), notes.append)
    return list(found), notes


def names(found: Sequence[Input], below: Path) -> list[str]:
    return [one.name.removeprefix(f"{below}/") for one in found]


def test_a_folder_gives_its_images_and_says_what_else_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "a.PNG", "deep/c.png", ".hidden.png"):
        (tmp_path / name).write_bytes(png(image_of(1)))
    (tmp_path / "notes.txt").write_text("none")
    found, notes = given(tmp_path)
    assert names(found, tmp_path) == ["a.PNG", "b.png", "deep/c.png"]
    assert notes == [f"{tmp_path}: 1 of 4 files are no images by their names."]


def test_a_pattern_and_a_file_whose_name_looks_like_one(tmp_path: Path) -> None:
    for name in ("a1.png", "a2.png", "b[1].png"):
        (tmp_path / name).write_bytes(png(image_of(1)))
    assert names(given(tmp_path / "a*.png")[0], tmp_path) == ["a1.png", "a2.png"]
    assert names(given(tmp_path / "b[1].png")[0], tmp_path) == ["b[1].png"]


def test_what_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        check_given([str(tmp_path / "x.png"), str(tmp_path), str(tmp_path / "*.jpg"), "-"])
    assert len(str(refused.value).splitlines()) == 2
    assert "x.png: expected an image, a folder" in str(refused.value)


def test_archives_give_their_images_and_tars_no_masks(tmp_path: Path) -> None:
    picture, mask = png(image_of(1)), png(np.zeros((8, 10), np.uint8))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/x.png", picture)
        archive.writestr("__MACOSX/in/._x.png", picture)
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name, data in (
            ("in/._0.png", b"mac"),
            ("in/0.png", picture),
            ("in/0.shape.png", mask),
            ("in/0.json", b"{}"),
            ("in/photo.v2.png", picture),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found, _ = given(tmp_path / "a.zip", tmp_path / "b.tar")
    assert names(found, tmp_path) == ["a.zip/in/x.png", "b.tar/in/0.png", "b.tar/in/photo.v2.png"]
    assert all(one.data == picture for one in found)


def test_a_cut_off_archive_is_an_error_and_the_rest_goes_on(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 cut off")
    (tmp_path / "b.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "c.png").write_bytes(png(image_of(1)))
    found, _ = given(tmp_path / "a.zip", tmp_path / "b.tar", tmp_path / "c.png")
    assert [bool(one.error) for one in found] == [True, True, False]


@pytest.mark.parametrize(
    ("shape", "options", "num_pages", "channels"),
    [
        ((3, 6, 5), {"photometric": "minisblack"}, 3, 1),
        ((6, 5, 3), {"photometric": "rgb"}, 1, 3),
        ((4, 6, 5), {"photometric": "minisblack", "planarconfig": "separate"}, 1, 4),
    ],
)
def test_a_page_of_a_stack_is_an_image_and_a_plane_of_a_page_a_channel(
    shape: tuple[int, ...], options: dict[str, str], num_pages: int, channels: int, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    tifffile.imwrite(tmp_path / "s.tif", values, **options)
    found, _ = given(tmp_path / "s.tif")
    expected = ["s.tif"] if num_pages == 1 else [f"s.tif#{page}" for page in range(num_pages)]
    assert names(found, tmp_path) == expected
    planes = np.concatenate([decode_image(one.data, channels).numpy() for one in found])
    assert np.array_equal(planes, values.transpose(2, 0, 1) if shape[-1] == 3 else values)


def test_a_frame_of_an_animation_is_an_image(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b.gif")
    found, _ = given(tmp_path / "a.gif", tmp_path / "b.gif")
    assert names(found, tmp_path) == ["a.gif#0", "a.gif#1", "a.gif#2", "b.gif"]
    assert decode_image(found[2].data, 3)[:, 0, 0].tolist() == [0, 0, 255]


def test_a_damaged_stack_is_one_error(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "s.tif", np.zeros((3, 60, 50), np.uint8), photometric="minisblack")
    whole = (tmp_path / "s.tif").read_bytes()
    (tmp_path / "s.tif").write_bytes(whole[:4000])
    found, _ = given(tmp_path / "s.tif")
    assert found
    assert all(one.error for one in found)


def test_a_prepared_dataset_gives_the_images_of_its_splits_or_of_one(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "tiny", {"train": 6, "val": 2})
    found, _ = given(data)
    assert len(found) == 8
    found, _ = given(data, split="val")
    assert names(found, tmp_path) == ["tiny/val/sample00006", "tiny/val/sample00007"]
    assert np.array_equal(decode_image(found[1].data, 3).numpy().transpose(1, 2, 0), image_of(7))
    with pytest.raises(UserError, match="expected a split 'vall'"):
        given(data, split="vall")


def test_standard_input_is_an_image_or_paths_one_a_line(tmp_path: Path) -> None:
    picture = png(image_of(1))
    assert given("-", stdin=picture)[0] == [Input("-", picture)]
    (tmp_path / "ä b.png").write_bytes(picture)
    lines = os.fsencode(f"{tmp_path}/ä b.png\n\n{tmp_path}/absent.png\r\n{tmp_path}/ä b.png")
    found, _ = given("-", stdin=lines)
    assert names(found, tmp_path) == ["ä b.png", "absent.png", "ä b.png"]
    assert [bool(one.error) for one in found] == [False, True, False]
    assert names(given("-", stdin=b"a\nb\nc\nd")[0], tmp_path) == ["a", "b", "c", "d"]
    assert given("-", stdin=b"")[0] == []
