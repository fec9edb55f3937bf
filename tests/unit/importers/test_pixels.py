"""Pixels on their way into a dataset: read whole, measured, converted, turned, or refused with the cause."""

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from mtl_dist.data.decode import decode_image
from mtl_dist.data.images import UnreadableImage, examine_image, upright
from mtl_dist.data.manifest import Manifest, read_manifest
from mtl_dist.data.reader import SplitReader
from mtl_dist.errors import UserError
from mtl_dist.importers.conversion import Conversion, stored_image
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.options import PackOptions
from mtl_dist.importers.packing import pack
from mtl_dist.importers.pixel_counts import PixelCounts, pixel_facts

RANDOM = np.random.default_rng(0)
TASKS = {"y": TaskSource("classification", ("no", "yes"))}
MASKED = {"m": TaskSource("segmentation", ("background", "m"))}


def tiff(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)  # type: ignore[arg-type]
    return file.getvalue()


def encoded(image: Image.Image, form: str = "PNG", orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, form, exif=exif)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def packed(out: Path, images: list[bytes], options: PackOptions = PackOptions()) -> Manifest:  # noqa: B008
    records = [Record(f"s{i}", image, {"y": i % 2}) for i, image in enumerate(images)]
    return pack({"train": records}, out, TASKS, "x", options=options)


def masked(
    out: Path,
    images: list[bytes],
    masks: list[np.ndarray],
    options: PackOptions = PackOptions(),  # noqa: B008
) -> Manifest:
    records = [
        Record(f"s{i}", image, {}, {"m": encoded(Image.fromarray(mask))})
        for i, (image, mask) in enumerate(zip(images, masks, strict=True))
    ]
    return pack({"train": records}, out, MASKED, "x", options=options)


def stored_of(out: Path) -> list[np.ndarray]:
    manifest = read_manifest(out)
    reader = SplitReader(out, manifest, "train")
    rows = sorted((reader.read(row) for row in range(reader.num_samples)), key=lambda sample: sample.key)
    return [
        decode_image(bytes(row.image), manifest.channels, manifest.image_dtype).permute(1, 2, 0).numpy()
        for row in rows
    ]


# ---------------------------------------------------------------- read whole
LAYOUTS = {
    "four planes": ((4, 9, 7), np.uint8, {"planarconfig": "separate", "photometric": "minisblack"}),
    "four samples": ((9, 7, 4), np.uint8, {"planarconfig": "contig", "photometric": "minisblack"}),
    "colour and another": (
        (9, 7, 4),
        np.uint8,
        {"photometric": "rgb", "planarconfig": "contig", "extrasamples": ["unspecified"]},
    ),
    "two deep planes": ((2, 9, 7), np.uint16, {"planarconfig": "separate", "photometric": "minisblack"}),
    "deep colour": ((9, 7, 3), np.uint16, {"photometric": "rgb"}),
    "pages that are channels": ((5, 9, 7), np.uint8, {"imagej": True, "metadata": {"axes": "CYX"}}),
    "planes of floats": ((3, 9, 7), np.float32, {"planarconfig": "separate", "photometric": "minisblack"}),
    "signed numbers": ((9, 7), np.int16, {}),
    "signed numbers of 8 bits": ((9, 7), np.int8, {}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_channel_of_a_tiff_is_stored(name: str, tmp_path: Path) -> None:
    shape, dtype, options = LAYOUTS[name]
    arrays = [
        (RANDOM.normal(0, 60, shape) if dtype != np.uint8 else RANDOM.integers(0, 255, shape)) for _ in "ab"
    ]
    arrays = [np.abs(a).astype(dtype) if dtype == np.uint16 else a.astype(dtype) for a in arrays]
    manifest = packed(tmp_path / "d", [tiff(a, **options) for a in arrays])
    expected = [
        np.moveaxis(a, 0, 2) if a.ndim == 3 and a.shape[0] < 7 else a.reshape(9, 7, -1) for a in arrays
    ]
    assert manifest.channels == expected[0].shape[2]
    for stored, wanted in zip(stored_of(tmp_path / "d"), expected, strict=True):
        np.testing.assert_array_equal(stored, wanted)
    assert any("stored as arrays: 2" in note for note in manifest.notes)


def test_pages_without_a_meaning_are_refused_with_their_axes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"axes QYX \(7x8x8\).*mtl prepare stacks"):
        packed(tmp_path / "d", [tiff(np.zeros((7, 8, 8), np.uint8))])


def test_a_decoder_refuses_what_it_would_read_in_part() -> None:
    planes = tiff(
        np.zeros((4, 8, 8), np.uint8),
        planarconfig="separate",
        photometric="minisblack",
        compression="zlib",
    )
    # Pillow before 11 does not know such a file at all.
    no_part = "4 channels in a TIFF|no known image format"
    for data, found in ((planes, no_part), (tiff(np.zeros((7, 8, 8), np.uint8)), "7 frames")):
        with pytest.raises(UnreadableImage, match=found):
            decode_image(data, 1)
        with pytest.raises(UnreadableImage, match=found):
            examine_image(data)


@pytest.mark.parametrize("form", [npy, tiff])
def test_floats_that_are_no_numbers_are_refused_and_counted(form: object, tmp_path: Path) -> None:
    good, bad = np.ones((8, 8), np.float32), np.ones((8, 8), np.float32)
    bad[3, 4:6] = np.nan, np.inf
    images = [form(array) for array in (good, bad, good)]  # type: ignore[operator]
    with pytest.raises(UserError, match=r"2 of 64 values infinite or undefined"):
        packed(tmp_path / "d", images, PackOptions(verify=False))
    manifest = packed(tmp_path / "e", images, PackOptions(max_skipped=1))
    assert manifest.splits["train"].num_samples == 2
    assert any("unreadable, left out: 1" in note for note in manifest.notes)


# ---------------------------------------------------------------- converted
def test_mixed_depths_are_refused_with_counts_and_converted(tmp_path: Path) -> None:
    flat = RANDOM.integers(0, 255, (8, 8), dtype=np.uint8)
    deep = RANDOM.integers(0, 65535, (8, 8), dtype=np.uint16)
    images = [encoded(Image.fromarray(a)) for a in (flat, flat, deep)]
    with pytest.raises(
        UserError, match=r"one type.*2 with 1 channel.*uint8.*1 with 1 channel.*uint16.*--bits"
    ):
        packed(tmp_path / "d", images)
    manifest = packed(tmp_path / "e", images, PackOptions(bits=8))
    assert [note for note in manifest.notes if "of another depth" in note and note.endswith(": 1")]
    np.testing.assert_array_equal(stored_of(tmp_path / "e")[2][:, :, 0], np.rint(deep / 257))
    packed(tmp_path / "f", images, PackOptions(bits=16))
    np.testing.assert_array_equal(stored_of(tmp_path / "f")[0][:, :, 0], flat.astype(np.uint16) * 257)


def test_channels_are_chosen(tmp_path: Path) -> None:
    planes = RANDOM.integers(0, 255, (4, 9, 7), dtype=np.uint8)
    data = tiff(planes, planarconfig="separate", photometric="minisblack")
    manifest = packed(tmp_path / "d", [data], PackOptions(channels=(2, 0)))
    assert manifest.channels == 2
    np.testing.assert_array_equal(stored_of(tmp_path / "d")[0], np.moveaxis(planes[[2, 0]], 0, 2))
    with pytest.raises(UserError, match=r"channels from 0 to 3.*found 4"):
        packed(tmp_path / "e", [data], PackOptions(channels=(4,)))


def test_conversions_that_cannot_be_are_refused() -> None:
    for options in ({"bits": 12}, {"channels": (-1,)}):
        with pytest.raises(UserError, match="expected"):
            PackOptions(**options).conversion  # type: ignore[arg-type]  # noqa: B018
    with pytest.raises(UserError, match="no depth"):
        stored_image(npy(np.ones((4, 4), np.float32)), True, Conversion(bits=8))


# ---------------------------------------------------------------- measured
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_small_images_are_measured_exactly(dtype: type, tmp_path: Path) -> None:
    arrays = [(RANDOM.normal(90, 20, (16, 12, 2)) + 40 * i).clip(0, 255).astype(dtype) for i in range(6)]
    manifest = packed(tmp_path / "d", [npy(a) for a in arrays], PackOptions(shard_samples=2))
    facts, pixels = manifest.pixels, np.stack(arrays).reshape(-1, 2).astype(np.float64)
    assert facts is not None and facts.num_images == 6
    np.testing.assert_allclose(facts.mean, pixels.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(facts.std, pixels.std(axis=0), rtol=1e-6)
    np.testing.assert_allclose(facts.minimum, pixels.min(axis=0), rtol=1e-6)
    np.testing.assert_allclose(facts.maximum, pixels.max(axis=0), rtol=1e-6)
    wanted = np.percentile(pixels, (1, 50, 99), axis=0, method="inverted_cdf")
    np.testing.assert_allclose(facts.percentiles, wanted, rtol=1e-6)
    assert read_manifest(tmp_path / "d") == manifest


def test_large_images_are_measured_on_a_part_of_their_pixels() -> None:
    counts = PixelCounts(1, "uint8")
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (1024, 256, 1)).copy()
    counts.add(ramp)
    facts = pixel_facts([counts.state()], 1)
    assert facts is not None
    assert facts.mean[0] == pytest.approx(127.5, abs=2)
    assert facts.std[0] == pytest.approx(73.9, abs=2)


def test_grey_among_colour_counts_in_every_channel(tmp_path: Path) -> None:
    grey, colour = np.full((8, 8), 10, np.uint8), np.full((8, 8, 3), 30, np.uint8)
    manifest = packed(tmp_path / "d", [encoded(Image.fromarray(a)) for a in (grey, colour)])
    assert manifest.pixels is not None
    assert manifest.pixels.mean == (20.0, 20.0, 20.0)


# ---------------------------------------------------------------- masks of turned images
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(12, 16), (16, 16)])
def test_masks_are_turned_as_pillow_turns_their_images(
    orientation: int, size: tuple[int, int], tmp_path: Path
) -> None:
    mask = RANDOM.integers(0, 2, size, dtype=np.uint8)
    photograph = encoded(
        Image.fromarray(RANDOM.integers(0, 255, (*size, 3), dtype=np.uint8)), "PNG", orientation
    )
    with Image.open(io.BytesIO(encoded(Image.fromarray(mask), "PNG", orientation))) as image:
        displayed = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(upright(mask, orientation), displayed)
    masked(tmp_path / "s", [photograph], [mask], PackOptions(masks_as="stored"))
    masked(tmp_path / "d", [photograph], [displayed], PackOptions(masks_as="displayed"))
    for name in "sd":
        reader = SplitReader(tmp_path / name, read_manifest(tmp_path / name), "train")
        with Image.open(io.BytesIO(bytes(reader.read(0, ("m",)).masks["m"]))) as found:
            np.testing.assert_array_equal(np.asarray(found), displayed)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_what_no_size_tells_is_asked(orientation: int, tmp_path: Path) -> None:
    photograph = encoded(Image.new("RGB", (16, 16)), "JPEG", orientation)
    with pytest.raises(UserError, match=r"--masks-as displayed or --masks-as stored"):
        masked(tmp_path / "d", [photograph], [np.eye(16, dtype=np.uint8)])


def test_masks_that_fit_one_reading_alone_say_which(tmp_path: Path) -> None:
    photograph = encoded(Image.new("RGB", (16, 12)), "JPEG", 6)
    tall, wide = np.ones((16, 12), np.uint8), np.ones((12, 16), np.uint8)
    with pytest.raises(UserError, match=r"EXIF orientation 6.*--masks-as stored"):
        masked(tmp_path / "d", [photograph], [wide])
    manifest = masked(tmp_path / "e", [photograph], [tall])
    assert any("taken as drawn on the displayed pixels: 1" in note for note in manifest.notes)
    with pytest.raises(UserError, match="fits --masks-as displayed alone"):
        masked(tmp_path / "f", [photograph], [tall], PackOptions(masks_as="stored"))
    with pytest.raises(UserError, match="expected displayed or stored"):
        PackOptions(masks_as="upright")


def test_a_mask_without_a_labelled_pixel_is_no_label(tmp_path: Path) -> None:
    image, empty, full = encoded(Image.new("RGB", (8, 8))), np.full((8, 8), 255, np.uint8), np.eye(8)
    empty_as_class = {"m": TaskSource("segmentation", ("a", "b", "c"))}
    records = [
        Record(f"s{i}", image, {}, {"m": encoded(Image.fromarray(mask.astype(np.uint8)))})
        for i, mask in enumerate((empty, full, empty))
    ]
    manifest = pack({"train": records}, tmp_path / "d", empty_as_class, "x")
    counts = manifest.splits["train"].labels["m"]
    assert (counts.present, counts.missing) == (1, 2)
    assert "m: masks that are 255 throughout, taken as no label: 2" in manifest.notes
