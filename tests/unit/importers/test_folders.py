"""Class folders become a dataset, whole and repeatable, or one clear line."""

from __future__ import annotations

import json
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtl_dist.data.manifest import read_manifest
from mtl_dist.errors import UserError
from mtl_dist.importers.options import PackOptions
from mtl_dist.importers.splitting import split_by_fractions, unique_keys
from mtl_dist.kinds.vocabulary import class_order
from tests.source_files import HERE, contents, encoded, fill, picture, prepare_folders, read_back


def cats(train: int = 6, val: int = 2) -> dict[str, bytes]:
    seed = iter(range(10_000))
    return {
        f"{split}/{breed}/{number}.jpg": picture(next(seed))
        for split, count in (("train", train), ("val", val))
        for breed in ("Bengal", "Sphynx", "happy cat")
        for number in range(count)
    }


def refused(tmp_path: Path, src: Path, match: str, **arguments: object) -> None:
    """The preparation stops with one line that says `match`, and leaves nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=match) as caught:
        prepare_folders(src, tmp_path / "out", "breed", **{"options": HERE, **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_folders_become_shards_that_webdataset_reads(tmp_path: Path) -> None:
    files = cats()
    manifest = prepare_folders(fill(tmp_path / "src", files), tmp_path / "out", "breed", options=HERE)
    assert manifest == read_manifest(tmp_path / "out")
    assert manifest.name == "src"
    assert manifest.tasks["breed"].classes == ("Bengal", "Sphynx", "happy cat")
    assert manifest.tasks["breed"].class_counts == (6, 6, 6)
    assert (manifest.channels, manifest.image_dtype, manifest.notes) == (3, "uint8", ())
    for split, count in (("train", 18), ("val", 6)):
        read = read_back(tmp_path / "out", split)
        assert len(read) == count == manifest.splits[split].num_samples
        by_bytes = {data: name for name, data in files.items()}
        for sample in read:
            folder = by_bytes[sample["jpg"]].split("/")
            label = json.loads(sample["json"])["breed"]
            assert (folder[0], folder[1]) == (split, manifest.tasks["breed"].classes[label])


def test_samples_are_not_stored_class_by_class(tmp_path: Path) -> None:
    prepare_folders(fill(tmp_path / "src", cats(train=20)), tmp_path / "out", "breed", options=HERE)
    labels = [json.loads(sample["json"])["breed"] for sample in read_back(tmp_path / "out", "train")]
    assert len(set(labels[:10])) == 3


def test_workers_and_places_do_not_change_a_byte(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", cats())
    fill(src, {"train/Bengal/broken.jpg": b"broken"})
    for workers, out in ((1, "one"), (2, "two")):
        options = PackOptions(workers=workers, shard_samples=5, max_skipped=1)
        prepare_folders(src, tmp_path / out, "breed", options=options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(list((tmp_path / "one").glob("*.tar"))) == 6


def test_a_zip_gives_what_its_directory_gives(tmp_path: Path) -> None:
    src = fill(tmp_path / "pets", cats())
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for path in sorted(src.rglob("*.jpg")):
            archive.write(path, f"pets/{path.relative_to(src)}")  # one folder around all, as zips have
        archive.writestr("__MACOSX/pets/train/Bengal/._0.jpg", b"not an image")
    prepare_folders(src, tmp_path / "one", "breed", options=HERE)
    prepare_folders(tmp_path / "pets.zip", tmp_path / "two", "breed", options=HERE)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.pop("dataset.json") != two.pop("dataset.json")  # the zip has a file more to account for
    assert one == two


def test_classes_are_split_evenly_by_fractions_and_always_the_same_way(tmp_path: Path) -> None:
    files = {f"{breed}/{i}.jpg": picture(ord(breed) * 100 + i) for breed in "abc" for i in range(20)}
    src = fill(tmp_path / "src", files)
    manifest = prepare_folders(src, tmp_path / "one", "breed", (0.6, 0.2, 0.2), HERE)
    assert {name: split.labels["breed"].class_counts for name, split in manifest.splits.items()} == {
        "train": (12, 12, 12),
        "val": (4, 4, 4),
        "test": (4, 4, 4),
    }
    prepare_folders(src, tmp_path / "two", "breed", (0.6, 0.2, 0.2), HERE)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    other = PackOptions(workers=1, seed=1)
    prepare_folders(src, tmp_path / "three", "breed", (0.6, 0.2, 0.2), other)
    assert contents(tmp_path / "one") != contents(tmp_path / "three")


def test_an_added_file_moves_no_other_file_to_another_split() -> None:
    keys = [f"k{number}" for number in range(40)]
    before = split_by_fractions(keys, [0] * 40, (0.5, 0.5), seed=0)
    order_before = [key for key, split in zip(keys, before, strict=True) if split == "train"]
    after = split_by_fractions([*keys, "new"], [0] * 41, (0.5, 0.5), seed=0)
    order_after = [key for key, split in zip([*keys, "new"], after, strict=True) if split == "train"]
    assert len(set(order_before) ^ set(order_after)) <= 2  # the new one, and one at the border


def test_every_class_has_a_training_sample_however_small_it_is() -> None:
    strata = ["big"] * 50 + ["one"] + ["two"] * 2
    splits = split_by_fractions([f"k{i}" for i in range(53)], strata, (0.34, 0.33, 0.33), seed=3)
    assert {stratum for stratum, split in zip(strata, splits, strict=True) if split == "train"} == set(strata)


@pytest.mark.parametrize("size", [3, 4, 5, 6, 7])
def test_small_classes_share_out_every_split(size: int) -> None:
    strata = [number % 40 for number in range(40 * size)]
    splits = Counter(split_by_fractions([f"k{i}" for i in range(40 * size)], strata, (0.8, 0.1, 0.1), seed=0))
    assert splits["train"] == pytest.approx(0.8 * 40 * size, abs=4 * size)
    assert splits["val"] >= 2 * size and splits["test"] >= 2 * size


@pytest.mark.parametrize("size", [3, 4, 5, 6, 7])
def test_a_few_pictures_are_for_training_and_validation(size: int) -> None:
    splits = split_by_fractions([f"k{i}" for i in range(size)], [0] * size, (0.8, 0.1, 0.1), seed=0)
    assert Counter(splits) == {"train": size - 1, "val": 1}


def test_where_nothing_can_be_held_out_the_note_says_so(tmp_path: Path) -> None:
    files = {f"train/{breed}/0.jpg": picture(number) for number, breed in enumerate("abc")}
    manifest = prepare_folders(fill(tmp_path / "src", files), tmp_path / "out", "breed", None, HERE, val=0.2)
    assert list(manifest.splits) == ["train"]
    assert manifest.notes == (
        "nothing of train held out as val: too few samples of each breed for 0.2 of them",
    )


def test_split_names_have_their_usual_spelling(tmp_path: Path) -> None:
    files = {name.replace("val/", "Valid/"): data for name, data in cats().items()}
    manifest = prepare_folders(fill(tmp_path / "src", files), tmp_path / "out", "breed", options=HERE)
    assert list(manifest.splits) == ["train", "val"]


def test_classes_that_are_numbers_are_ordered_as_numbers() -> None:
    assert class_order(["10", "9", "1", "9"]) == ["1", "9", "10"]
    assert class_order(["b", "a", "B"]) == ["B", "a", "b"]


def test_keys_are_plain_unique_and_follow_the_names() -> None:
    paths = ["a/x 1.jpg", "b/Größe.v2.jpg", "c/日本.png", "c/猫.png", "d/" + "long" * 40 + ".jpg"]
    keys = unique_keys(paths)
    assert keys[:2] == ["a_x_1", "b_Groe_v2"] or keys[:2] == ["a_x_1", "b_Grosse_v2"]
    assert len(set(keys)) == len(paths)
    assert all(len(key) <= 60 and key.isascii() and "." not in key and "/" not in key for key in keys)
    assert unique_keys(paths) == keys
    assert unique_keys(["train/cat_1.jpg", "val/cat_2.jpg"]) == ["cat_1", "cat_2"]


def test_names_with_spaces_and_other_letters_keep_their_class(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "Größe é")
    files = {f"train/{decomposed}/ein Bild.jpg": picture(1), "train/猫/写真 1.jpg": picture(2)}
    manifest = prepare_folders(fill(tmp_path / "src", files), tmp_path / "out", "breed", options=HERE)
    assert manifest.tasks["breed"].classes == ("Größe é", "猫")


def test_files_that_are_no_images_by_name_are_left_out_and_counted(tmp_path: Path) -> None:
    junk = {
        "train/Bengal/.DS_Store": b"",
        "train/Bengal/Thumbs.db": b"",
        "train/Bengal/notes.txt": b"",
        "README": b"",
    }
    manifest = prepare_folders(
        fill(tmp_path / "src", {**cats(), **junk}), tmp_path / "out", "breed", options=HERE
    )
    assert manifest.notes == ("files that are no images by name, left out: 2",)  # the others are never seen


def test_the_content_decides_on_the_extension(tmp_path: Path) -> None:
    files = cats() | {"train/Bengal/0.jpg": picture(0, format="PNG")}
    prepare_folders(fill(tmp_path / "src", files), tmp_path / "out", "breed", options=HERE)
    extensions = Counter(
        next(e for e in ("jpg", "png") if e in s) for s in read_back(tmp_path / "out", "train")
    )
    assert extensions == {"jpg": 17, "png": 1}


def test_grey_among_colour_and_other_oddities_are_taken_and_noted(tmp_path: Path) -> None:
    files = cats() | {
        "train/Bengal/0.jpg": picture(0, "L"),
        "train/Bengal/1.jpg": picture(1, "CMYK"),
        "train/Bengal/2.png": picture(2, "RGBA", "PNG"),
    }
    manifest = prepare_folders(fill(tmp_path / "src", files), tmp_path / "out", "breed", options=HERE)
    assert manifest.channels == 3
    assert manifest.notes == (
        "images with an alpha channel, which is dropped when they are read: 1",
        "images in CMYK, read as RGB: 1",
    )


def test_the_same_image_in_two_splits_is_reported_and_kept(tmp_path: Path) -> None:
    files = cats()
    files["val/Bengal/0.jpg"] = files["train/Sphynx/3.jpg"]
    manifest = prepare_folders(fill(tmp_path / "src", files), tmp_path / "out", "breed", options=HERE)
    assert manifest.notes == ("the same image in train and val: 1 (train_Sphynx_3 = val_Bengal_0)",)
    assert manifest.splits["val"].num_samples == 6


def test_unreadable_images_are_skipped_up_to_a_bound_and_counted(tmp_path: Path) -> None:
    files = cats() | {"train/Bengal/0.jpg": b"", "val/Sphynx/1.jpg": picture(7)[:200]}
    src = fill(tmp_path / "src", files)
    too_few = PackOptions(workers=1, max_skipped=1)
    refused(tmp_path, src, "2 unreadable files, where at most 1 may be skipped", options=too_few)
    manifest = prepare_folders(src, tmp_path / "out", "breed", options=PackOptions(workers=1, max_skipped=2))
    assert manifest.splits["train"].labels["breed"].class_counts == (5, 6, 6)
    assert manifest.splits["val"].num_samples == 5
    assert manifest.notes[0].startswith("unreadable, left out: 2 (")
    assert str(src / "train/Bengal/0.jpg") in manifest.notes[0]


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", cats() | {"train/Bengal/3.jpg": picture(3)[:200]})
    refused(
        tmp_path,
        src,
        r"train/Bengal/3\.jpg: expected a readable image, found a damaged image .*(?i:truncated)",
    )
    refused(tmp_path, src, r"train/Bengal/3\.jpg", options=PackOptions(workers=2))


def test_without_verification_only_headers_are_read(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", cats() | {"train/Bengal/3.jpg": picture(3)[:-20]})
    refused(tmp_path, src, "damaged")
    options = PackOptions(workers=1, verify=False)
    assert prepare_folders(src, tmp_path / "out", "breed", options=options).splits["train"].num_samples == 18


def test_images_of_several_kinds_are_refused(tmp_path: Path) -> None:
    deep = encoded(Image.fromarray(np.zeros((4, 4), np.uint16)))
    src = fill(tmp_path / "src", cats() | {"val/Bengal/0.png": deep})
    refused(tmp_path, src, r"expected one type for all, found 24 .*1 with .*uint16 \(as val/Bengal/0\.png\)")


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"train/Lion/0.jpg": None}, "expected images of a class, found none"),
        (
            {"val/Lion/0.jpg": picture(5)},
            r"expected the classes of train in every split, found 'Lion' in val",
        ),
        ({"train/cover.jpg": picture(5)}, "inside class folders, found one beside them"),
        ({"models/a/0.jpg": picture(5)}, "found 'models' with them"),
        ({"validation/Bengal/0.jpg": picture(5)}, "expected one name for val, found val and validation"),
    ],
)
def test_a_layout_that_cannot_be_meant_is_refused(tmp_path: Path, files: dict, match: str) -> None:
    src = fill(tmp_path / "src", cats() | {name: data for name, data in files.items() if data})
    for name, data in files.items():
        if data is None:
            (src / name).parent.mkdir(parents=True)
    refused(tmp_path, src, match)


def test_sources_that_hold_no_classes_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path / "nothing", "found nothing there")
    refused(tmp_path, fill(tmp_path / "empty", {"notes.txt": b""}), "per class, found none with")
    refused(
        tmp_path, fill(tmp_path / "one", {"a/1.jpg": picture(1)}), "inside class folders|found 1 with images"
    )
    refused(tmp_path, fill(tmp_path / "val", {"val/a/1.jpg": picture(1)}), "expected a train folder")
    file = fill(tmp_path / "file", {"x.txt": b"x"}) / "x.txt"
    refused(tmp_path, file, "a directory or a zip archive, found another kind of file")


def test_fractions_must_be_fractions_and_have_something_to_split(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", cats())
    refused(tmp_path, src, "found train, val. They are used as they are: drop --split", split=(0.8, 0.2))
    flat = fill(tmp_path / "flat", {"a/1.jpg": picture(1), "b/2.jpg": picture(2)})
    for fractions in ((0.8, 0.3), (1.0,), (1.2, -0.2), (0.25,) * 4):
        refused(tmp_path, flat, "each above 0 and with the sum 1", split=fractions)


def test_a_task_name_that_a_shard_cannot_hold_is_refused_at_once(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", cats())
    with pytest.raises(UserError, match="expected a name"):
        prepare_folders(src, tmp_path / "out", "my task", options=HERE)
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken_is_refused_and_left_alone(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", cats())
    fill(tmp_path / "out", {"precious.txt": b"mine"})
    with pytest.raises(UserError, match="found a directory that is not empty"):
        prepare_folders(src, tmp_path / "out", "breed", options=HERE)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]
    with pytest.raises(UserError, match="found a file"):
        prepare_folders(src, tmp_path / "out/precious.txt", "breed", options=HERE)
    (tmp_path / "empty").mkdir()
    prepare_folders(src, tmp_path / "empty", "breed", options=HERE)
    assert (tmp_path / "empty/dataset.json").is_file()


def test_folders_called_as_a_word_for_no_label_are_unlabelled(tmp_path: Path) -> None:
    files = {
        f"{kind}/{n}.png": picture(n, format="PNG") for n, kind in enumerate(("a", "b", "NA", "none") * 2)
    }
    src = fill(tmp_path / "in", files)
    manifest = prepare_folders(src, tmp_path / "one", "t", split=(0.5, 0.5))
    assert manifest.tasks["t"].classes == ("a", "b", "none")
    assert sum(split.labels["t"].missing for split in manifest.splits.values()) == 2
    assert "t: read as no label: 'NA' (2)" in manifest.notes
    manifest = prepare_folders(src, tmp_path / "two", "t", split=(0.5, 0.5), missing=["none"])
    assert manifest.tasks["t"].classes == ("NA", "a", "b")


def test_two_unicode_forms_of_a_class_are_refused_under_strict(tmp_path: Path) -> None:
    names = ("caf\u00e9", "cafe\u0301", "tea")
    src = fill(tmp_path / "in", {f"{kind}/{n}.png": picture(n) for n, kind in enumerate(names * 2)})
    with pytest.raises(UserError, match=r"expected one folder for each class, found 'cafe.u0301' and 'caf"):
        prepare_folders(src, tmp_path / "out", "t", strict=True)
    manifest = prepare_folders(src, tmp_path / "out", "t", split=(0.5, 0.5))
    assert r"t: texts that are one class, 'café': 'cafe\u0301' (2), 'caf\xe9' (2)" in manifest.notes


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_a_name_twice_or_made_on_windows_loses_nothing_unsaid(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, number in (("a/0.jpg", 0), ("a/0.jpg", 1), ("a/1.jpg", 2), ("b\\2.jpg", 3), ("b/3.jpg", 4)):
            archive.writestr(name, picture(number))
    manifest = prepare_folders(tmp_path / "x.zip", tmp_path / "out", "t", split=(0.5, 0.5))
    assert manifest.tasks["t"].classes == ("a", "b")
    assert manifest.account["files"] == {"image": 4, "left out: the archive holds it again, later": 1}
