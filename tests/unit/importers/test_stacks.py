"""TIFF stacks: every frame with its values, masks and time; a stack in one split; damage refused by name."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from mtl_dist.data.decode import decode_image, decode_map
from mtl_dist.data.manifest import Manifest, read_manifest
from mtl_dist.data.reader import SplitReader
from mtl_dist.errors import UserError
from mtl_dist.importers.frames import chosen_frames
from mtl_dist.importers.options import PackOptions, groups_by_split
from mtl_dist.importers.sources import Tree
from mtl_dist.importers.tiff import Stack, percentiles, scaled
from tests.source_files import HERE, contents, prepare_stacks

PAGES, HEIGHT, WIDTH = 6, 8, 10


def frames_of(number: int, dtype: str = "u1") -> np.ndarray:
    """Frames whose grey is 20 x stack + page."""
    return np.stack([np.full((HEIGHT, WIDTH), 20 * number + page, dtype) for page in range(PAGES)])


def masks_of() -> np.ndarray:
    masks = np.zeros((PAGES, HEIGHT, WIDTH), np.uint8)
    for page in range(PAGES):
        masks[page, :page] = 1
    return masks


def write_stacks(root: Path, names: tuple[str, ...] = ("a", "b", "c"), dtype: str = "u1") -> Path:
    root.mkdir(parents=True)
    for number, name in enumerate(names):
        tifffile.imwrite(root / f"stack_{name}.tif", frames_of(number, dtype), compression="zlib")
        tifffile.imwrite(root / f"mask_{name}.tif", masks_of())
    rows = ["stack,page,count,part"]
    for number, name in enumerate(names):
        rows += [f"stack_{name}.tif,{page},{number + page / 10},train" for page in range(PAGES)]
    (root / "frames.csv").write_text("\n".join(rows) + "\n")
    return root


def prepared(src: Path, out: Path, **arguments: Any) -> Manifest:
    arguments = {
        "stacks": "stack_*.tif",
        "table": Path("frames.csv"),
        "regression": {"count": "count"},
    } | arguments
    return prepare_stacks(src, out, options=arguments.pop("options", HERE), **arguments)


HOURS: dict[str, Any] = {
    "regression": {"count": "count", "hours": "hours"},
    "compute": {"hours": "page * 0.5"},
}


def samples(
    out: Path, split: str, masks: tuple[str, ...] = ()
) -> dict[str, tuple[np.ndarray, Mapping[str, Any], Any]]:
    """By key: pixels (H, W, C), labels, masks."""
    manifest = read_manifest(out)
    reader = SplitReader(out, manifest, split)
    found = {}
    for row in range(reader.num_samples):
        sample = reader.read(row, masks)
        pixels = decode_image(sample.image, manifest.channels, manifest.image_dtype).permute(1, 2, 0).numpy()
        found[sample.key] = (
            pixels,
            sample.labels,
            {n: decode_map(m) for n, m in sample.masks.items()},
        )
    return found


BY_NAME = {"b": "val", "c": "test"}


def test_every_frame_keeps_its_values_and_its_mask(tmp_path: Path) -> None:
    src = write_stacks(tmp_path / "src")
    manifest = prepared(src, tmp_path / "out", segmentation={"cell": "mask_*.tif"}, split=BY_NAME)
    assert [(n, t.kind, t.classes) for n, t in manifest.tasks.items()] == [
        ("count", "regression", ()),
        ("cell", "segmentation", ("background", "cell")),
    ]
    for number, split in enumerate(("train", "val", "test")):
        found = samples(tmp_path / "out", split, ("cell",))
        assert len(found) == PAGES
        for key, (pixels, labels, masks) in found.items():
            page = int(key.rpartition("_")[2])
            assert (pixels == 20 * number + page).all()
            assert labels == {"count": number + page / 10}
            np.testing.assert_array_equal(masks["cell"], masks_of()[page])


def test_the_same_stacks_give_the_same_bytes_in_any_number_of_processes(tmp_path: Path) -> None:
    src = write_stacks(tmp_path / "src")
    arguments: dict[str, Any] = {"normalise": (1.0, 99.0), "split": BY_NAME}
    prepared(src, tmp_path / "one", **arguments)
    prepared(src, tmp_path / "two", options=PackOptions(workers=2, shard_samples=3), **arguments)
    prepared(src, tmp_path / "three", options=PackOptions(workers=1, shard_samples=3), **arguments)
    assert contents(tmp_path / "two") == contents(tmp_path / "three")
    assert samples(tmp_path / "one", "val").keys() == samples(tmp_path / "two", "val").keys()


# ---------------------------------------------------------------- frames
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("every:3", [0, 3, 6]),
        ("first,last", [0, 6]),
        ("first, 2, last", [0, 2, 6]),
        ("2:5", [2, 3, 4]),
        ("5:", [5, 6]),
        (":2", [0, 1]),
        ("5:90", [5, 6]),
    ],
)
def test_a_frame_policy_takes_these_pages(policy: str, expected: list[int]) -> None:
    assert chosen_frames(policy, 7, "x.tif") == expected


@pytest.mark.parametrize("policy", ["", "some", "every:0", ":", "1;2", "-1"])
def test_another_frame_policy_is_refused(policy: str) -> None:
    with pytest.raises(UserError, match=r"--frames: expected all, every:N, A:B or pages"):
        chosen_frames(policy, 7, "x.tif")


@pytest.mark.parametrize("policy", ["7", "9:12"])
def test_a_page_that_a_stack_lacks_is_refused(policy: str) -> None:
    with pytest.raises(UserError, match=r"x.tif: expected the frames .*, found 7 pages \(0 to 6\)"):
        chosen_frames(policy, 7, "x.tif")


def test_the_values_are_those_of_the_pages_that_are_taken(tmp_path: Path) -> None:
    src = write_stacks(tmp_path / "src")
    prepared(src, tmp_path / "out", frames="every:4", split=BY_NAME, **HOURS)
    found = samples(tmp_path / "out", "val")
    assert {key: labels for key, (_, labels, _) in found.items()} == {
        "stack_b_00000": {"count": 1.0, "hours": 0.0},
        "stack_b_00004": {"count": 1.4, "hours": 2.0},
    }


# ---------------------------------------------------------------- time and class
def wells(root: Path) -> Path:
    """Stacks in class folders, and the onset of each in a table."""
    for name, number in (("infected/x", 0), ("infected/y", 1), ("uninfected/z", 2)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(root / f"{name}.tif", frames_of(number))
    (root / "onsets.csv").write_text("file,infection_onset_hour\nx.tif,1\ny.tif,1.5\n")
    return root


def times(out: Path) -> dict[str, float | None]:
    return {key: labels.get("hours") for key, (_, labels, _) in samples(out, "train").items()}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("page * 0.5", {"x_00004": 2.0, "y_00004": 2.0, "z_00004": 2.0}),
        ("page * 0.5 - (1 if folder == 'infected' else 0)", {"x_00004": 1.0, "y_00004": 1.0, "z_00004": 2.0}),
        ("page * 0.5 - infection_onset_hour", {"x_00004": 1.0, "y_00004": 0.5, "z_00004": None}),
        (
            "page * 0.5 - 1 if folder == 'infected' else None",
            {"x_00004": 1.0, "y_00004": 1.0, "z_00004": None},
        ),
    ],
    ids=["of the page", "of the class", "of a column", "missing for a class"],
)
def test_a_column_is_computed_from_others(
    tmp_path: Path, expression: str, expected: dict[str, float | None]
) -> None:
    manifest = prepare_stacks(
        wells(tmp_path / "src"),
        tmp_path / "out",
        table=Path("onsets.csv"),
        classification={"infected": "folder"},
        classes={"infected": ["uninfected", "infected"]},
        compute={"hours": expression},
        regression={"hours": "hours"},
        units={"hours": "hours"},
        split={},
        options=HERE,
    )
    found = times(tmp_path / "out")
    assert {key: found[key] for key in expected} == expected
    assert manifest.tasks["hours"].unit == "hours"
    labels = {key: labels["infected"] for key, (_, labels, _) in samples(tmp_path / "out", "train").items()}
    assert labels["x_00000"] == 1 and labels["z_00000"] == 0


# ---------------------------------------------------------------- splits
def test_frames_of_one_stack_are_never_in_two_splits(tmp_path: Path) -> None:
    src = write_stacks(tmp_path / "src", tuple("abcdefghij"))
    manifest = prepared(src, tmp_path / "out", split=(0.6, 0.2, 0.2))
    stacks = {
        split: {key.rpartition("_")[0] for key in samples(tmp_path / "out", split)}
        for split in manifest.splits
    }
    assert {split: len(names) for split, names in stacks.items()} == {"train": 6, "val": 2, "test": 2}
    assert len(set.union(*stacks.values())) == 10


def test_a_stack_that_a_column_puts_into_two_splits_is_refused(tmp_path: Path) -> None:
    src = write_stacks(tmp_path / "src")
    table = src / "frames.csv"
    table.write_text(table.read_text().replace("stack_b.tif,4,1.4,train", "stack_b.tif,4,1.4,val"))
    with pytest.raises(UserError, match=r"group b: expected all of it in one split, found train .* and val"):
        prepared(src, tmp_path / "out", split="part")
    assert not (tmp_path / "out").exists()


def test_splits_can_be_folders(tmp_path: Path) -> None:
    for split, name in (("train", "a"), ("valid", "b")):
        write_stacks(tmp_path / "src" / split, (name,))
    manifest = prepare_stacks(
        tmp_path / "src",
        tmp_path / "out",
        stacks="stack_*.tif",
        compute={"t": "page"},
        regression={"t": "t"},
        options=HERE,
    )
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 6, "val": 6}


def test_the_same_frame_in_two_splits_is_reported(tmp_path: Path) -> None:
    src = write_stacks(tmp_path / "src")
    tifffile.imwrite(src / "stack_b.tif", frames_of(0))
    manifest = prepared(src, tmp_path / "out", split=BY_NAME)
    assert any("the same image in train and val: 6" in note for note in manifest.notes)


def test_splits_of_stacks_are_stated_in_a_list(tmp_path: Path) -> None:
    src = write_stacks(tmp_path / "src")
    names = [path.stem for path in sorted(src.glob("stack_*.tif"))]
    listed = tmp_path / "splits.csv"
    listed.write_text("".join(f"{name.removeprefix('stack_')},val\n" for name in names[:1]))
    manifest = prepared(src, tmp_path / "out", split=str(listed))
    assert manifest.splits["val"].num_samples == 6
    listed.write_text(listed.read_text() + f"{names[1].removeprefix('stack_')},train\n")
    if len(names) > 2:
        with pytest.raises(
            UserError, match="expected a split for every group, since those of train are named"
        ):
            prepared(src, tmp_path / "again", split=str(listed))


def test_an_option_for_splits_is_read(tmp_path: Path) -> None:
    assert groups_by_split("val=sw,nw; test=ne") == {"sw": "val", "nw": "val", "ne": "test"}
    assert groups_by_split("part") is None
    for text in ("stack,split\nsw,val\nne,test\n", "# by hand\nsw val\n\nne test", "sw;val\nne;test"):
        (tmp_path / "splits.csv").write_text(text)
        assert groups_by_split(str(tmp_path / "splits.csv")) == {"sw": "val", "ne": "test"}
    (tmp_path / "splits.txt").write_text("sw val\nsw test\n")
    with pytest.raises(UserError, match=r"splits\.txt:2: expected each group in one split, found sw in two"):
        groups_by_split(str(tmp_path / "splits.txt"))
    (tmp_path / "splits.txt").write_text("sw\n")
    with pytest.raises(UserError, match=r"splits\.txt:1: expected a group and its split, found 'sw'"):
        groups_by_split(str(tmp_path / "splits.txt"))
    with pytest.raises(UserError, match=r"none\.csv, found: No such file"):
        groups_by_split("none.csv")
    with pytest.raises(UserError, match="expected each group in one split, found a in two"):
        groups_by_split("val=a;test=a")
    with pytest.raises(UserError, match="expected SPLIT=GROUP"):
        groups_by_split("val=")


# ---------------------------------------------------------------- kinds of TIFF
def opened(tmp_path: Path, array: np.ndarray, **options: Any) -> Stack:
    tifffile.imwrite(tmp_path / "x.tif", array, **options)
    return Stack(Tree(tmp_path).source("x.tif"))


KINDS: dict[str, tuple[tuple[int, ...], str, dict[str, Any], tuple[int, ...]]] = {
    "plain 8 bits": ((5, 8, 9), "u1", {}, (0, 1, 2)),
    "plain 16 bits": ((5, 8, 9), "u2", {}, (0, 1, 2)),
    "deflate with a predictor": ((5, 8, 9), "u2", {"compression": "zlib", "predictor": True}, (0, 1, 2)),
    "big-endian": ((5, 8, 9), "u2", {"byteorder": ">"}, (0, 1, 2)),
    "RGB": ((5, 8, 9, 3), "u1", {"photometric": "rgb"}, (0, 1, 2, 3)),
    "16-bit RGB": ((5, 8, 9, 3), "u2", {"photometric": "rgb"}, (0, 1, 2, 3)),
    "channels as planes": (
        (5, 3, 8, 9),
        "u1",
        {"photometric": "minisblack", "planarconfig": "separate"},
        (0, 2, 3, 1),
    ),
    "ImageJ with two channels": (
        (5, 2, 8, 9),
        "u2",
        {"imagej": True, "metadata": {"axes": "TCYX"}},
        (0, 2, 3, 1),
    ),
    "OME with four channels": ((5, 4, 8, 9), "u2", {"ome": True, "metadata": {"axes": "TCYX"}}, (0, 2, 3, 1)),
    "OME, channels first": ((4, 5, 8, 9), "u2", {"ome": True, "metadata": {"axes": "CTYX"}}, (1, 2, 3, 0)),
    "one page": ((8, 9), "u1", {}, ()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_and_channels_are_found_in(tmp_path: Path, kind: str) -> None:
    shape, dtype, options, order = KINDS[kind]
    array = np.random.default_rng(0).integers(0, 2 ** (8 * np.dtype(dtype).itemsize), shape).astype(dtype)
    stack = opened(tmp_path, array, **options)
    expected = array.transpose(order) if order else array[None]
    expected = expected if expected.ndim == 4 else expected[..., None]
    assert stack.num_frames == len(expected)
    for number in range(stack.num_frames):
        frame = stack.frame(number)
        assert frame.dtype.newbyteorder("=") == np.dtype(dtype)
        np.testing.assert_array_equal(frame, expected[number])


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (
            np.zeros((3, 4, 8, 9), "u1"),
            {"ome": True, "metadata": {"axes": "TZYX"}},
            "expected one axis of frames",
        ),
        (np.zeros((5, 8, 9), "f4"), {}, "expected 8 or 16 bits without sign per value, found float32"),
        (np.zeros((5, 8, 9), "i2"), {}, "found int16"),
        (
            np.zeros((3, 8, 9), "u1"),
            {"photometric": "palette", "colormap": np.zeros((3, 256), "u2")},
            "found a palette",
        ),
    ],
    ids=["two axes of frames", "floats", "signed", "palette"],
)
def test_another_kind_of_tiff_is_refused_by_name(
    tmp_path: Path, array: np.ndarray, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        opened(tmp_path, array, **options)


def test_pages_of_several_sizes_are_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "x.tif") as file:
        file.write(np.zeros((5, 8, 9), np.uint8))
        file.write(np.zeros((5, 8, 12), np.uint8))
    with pytest.raises(UserError, match="expected pages of one size and kind, found several: 5x8x9 uint8"):
        Stack(Tree(tmp_path).source("x.tif"))


def test_frames_of_stacks_with_long_names_keep_keys_of_their_own(tmp_path: Path) -> None:
    names = ("x" * 70 + "a", "x" * 70 + "b")
    src = write_stacks(tmp_path / "src", names)
    prepared(src, tmp_path / "out", split={})
    assert len(samples(tmp_path / "out", "train")) == 2 * PAGES


def test_stacks_may_lie_in_a_zip(tmp_path: Path) -> None:
    src = write_stacks(tmp_path / "src")
    with zipfile.ZipFile(tmp_path / "src.zip", "w") as archive:
        for path in src.iterdir():
            archive.write(path, path.name)
    prepared(src, tmp_path / "one", split=BY_NAME)
    prepared(tmp_path / "src.zip", tmp_path / "two", split=BY_NAME, table=src / "frames.csv")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.pop("dataset.json") != two.pop("dataset.json")  # here the table is not among the stacks
    assert one == two


def test_channels_of_16_bits_come_through_the_dataset(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    array = np.random.default_rng(0).integers(0, 65536, (5, 2, 8, 9)).astype("u2")
    tifffile.imwrite(tmp_path / "src" / "x.tif", array, imagej=True, metadata={"axes": "TCYX"})
    manifest = prepare_stacks(
        tmp_path / "src",
        tmp_path / "out",
        compute={"t": "page"},
        regression={"t": "t"},
        split={},
        options=HERE,
    )
    assert (manifest.channels, manifest.image_dtype) == (2, "uint16")
    for key, (pixels, _, _) in samples(tmp_path / "out", "train").items():
        np.testing.assert_array_equal(pixels, array[int(key[-5:])].transpose(1, 2, 0))


# ---------------------------------------------------------------- normalisation
def test_percentiles_are_those_of_all_frames_of_a_stack(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(100, 40_000, (5, 2, 16, 16)).astype("u2")
    tifffile.imwrite(tmp_path / "x.tif", array, imagej=True, metadata={"axes": "TCYX"})
    found = percentiles(Tree(tmp_path).source("x.tif"), [0, 1, 2, 3, 4], 2, 98)
    for channel, bounds in enumerate(found):
        expected = np.percentile(array[:, channel], (2, 98), method="inverted_cdf")
        np.testing.assert_allclose(bounds, expected)
    bright = scaled(np.array([[[found[0][1] + 9, found[1][0] - 9]]]), found)
    assert bright.dtype == np.uint8
    assert bright.tolist() == [[[255, 0]]]


def test_normalised_stacks_have_8_bits_and_use_them(tmp_path: Path) -> None:
    src = write_stacks(tmp_path / "src", dtype="u2")
    manifest = prepared(src, tmp_path / "out", normalise=(0.0, 100.0), split=BY_NAME)
    assert manifest.image_dtype == "uint8"
    found = samples(tmp_path / "out", "test")
    assert [int(found[f"stack_c_{page:05d}"][0][0, 0, 0]) for page in range(PAGES)] == [
        0,
        51,
        102,
        153,
        204,
        255,
    ]


def test_a_stack_of_one_value_is_normalised_to_black(tmp_path: Path) -> None:
    stack = tmp_path / "x.tif"
    tifffile.imwrite(stack, np.full((5, 8, 9), 7, "u2"))
    bounds = percentiles(Tree(tmp_path).source("x.tif"), [0, 1, 2], 1, 99)
    assert (scaled(np.full((8, 9, 1), 7, "u2"), bounds) == 0).all()


# ---------------------------------------------------------------- mistakes
def rewritten(name: str, array: np.ndarray) -> Any:
    return lambda src: tifffile.imwrite(src / name, array)


def cut(name: str, keep: float) -> Any:
    def damage(src: Path) -> None:
        data = (src / name).read_bytes()
        (src / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def in_table(before: str, after: str) -> Any:
    return lambda src: (src / "frames.csv").write_text(
        (src / "frames.csv").read_text().replace(before, after)
    )


MASKS = {"segmentation": {"cell": "mask_*.tif"}}
MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a row for a page that is not there": (
        in_table("stack_b.tif,5,", "stack_b.tif,6,"),
        {},
        r"frames.csv line 13: expected a page from 0 to 5 of stack_b.tif, found 6",
    ),
    "a row for a stack that is not there": (
        in_table("stack_b.tif,5,", "stack_d.tif,5,"),
        {},
        r"line 13: expected one of the stacks stack_a.tif; .*, found 'stack_d.tif'",
    ),
    "two rows for one page": (
        in_table("stack_b.tif,5,", "stack_b.tif,4,"),
        {},
        r"line 13: expected one row for each page \(4\) of stack_b.tif, found another in .*line 12",
    ),
    "a page that is no number": (
        in_table("stack_b.tif,5,", "stack_b.tif,x,"),
        {},
        "expected a page from 0 on",
    ),
    "a value that is no number": (in_table("1.5", "many"), {}, "expected a number or nothing, found 'many'"),
    "a column that is not there": (None, {"regression": {"count": "counts"}}, "Did you mean 'count'"),
    "no column of stacks": (in_table("stack,page", "name,page"), {}, "expected a column stack or file"),
    "a column without a table": (
        None,
        {"table": None},
        "without --table: expected a column 'count'",
    ),
    "a mask of fewer pages": (
        rewritten("mask_b.tif", masks_of()[:5]),
        MASKS,
        "mask_b.tif: expected 6 pages, as .*stack_b.tif has, found 5",
    ),
    "a mask of another size": (
        rewritten("mask_b.tif", masks_of()[:, :5]),
        MASKS,
        r"mask_b.tif page \d: expected the size of its image, 10x8, found 10x5",
    ),
    "a mask of instance numbers": (
        rewritten("mask_b.tif", masks_of().astype("u2") * 300),
        MASKS,
        r"expected a mask of one channel with values up to 255, found 1 channel\(s\) and values up to",
    ),
    "a mask with a value that is no class": (rewritten("mask_b.tif", masks_of() * 9), MASKS, "task 'cell'"),
    "masks of other names": (None, {"segmentation": {"cell": "mask_a*.tif"}}, "What stands for"),
    "no such stacks": (None, {"stacks": "movie_*.tif"}, "expected files like 'movie_"),
    "a pattern without a star": (None, {"stacks": "stack.tif"}, r"expected one \* in the pattern"),
    "a stack cut off": (cut("stack_b.tif", 0.5), {}, r"stack_b.tif.*: expected a (?:readable|whole) TIFF"),
    "a stack cut off before its end": (
        cut("stack_b.tif", 0.97),
        {},
        r"stack_b.tif.*: expected a (?:readable|whole)",
    ),
    "an empty file": (cut("stack_b.tif", 0.0), {}, "stack_b.tif: expected a readable TIFF"),
    "a file that is no TIFF": (
        lambda src: (src / "stack_b.tif").write_bytes(b"\x89PNG" + bytes(60)),
        {},
        "stack_b.tif: expected a readable TIFF",
    ),
    "an unknown stack in the split": (
        None,
        {"split": {"z": "val"}},
        r"--split: expected one of the groups a; b; c",
    ),
    "percentiles in the wrong order": (
        None,
        {"normalise": (99.0, 1.0)},
        "expected two percentiles from 0 to 100",
    ),
    "no task": (None, {"regression": {}}, "expected at least one task"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_clear_line_and_leaves_nothing(tmp_path: Path, what: str) -> None:
    damage, arguments, message = MISTAKES[what]
    src = write_stacks(tmp_path / "src")
    if damage is not None:
        damage(src)
    with pytest.raises(UserError, match=message) as caught:
        prepared(src, tmp_path / "out", **arguments)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
