"""Labels are texts: no number renames them, and what is read as one class, or as none, is said."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_dist.errors import UserError
from mtl_dist.importers.options import PackOptions
from mtl_dist.importers.table_files import read_table
from mtl_dist.kinds.cells import Parsed, parse_cells
from mtl_dist.kinds.registry import scalar_kind
from mtl_dist.kinds.vocabulary import Declared
from tests.source_files import index_tars, mask, picture

ONE = PackOptions(workers=1)


def read(cells: Sequence[str | list[str]], kind: str = "classification", **declared: object) -> Parsed:
    return parse_cells(scalar_kind(kind), cells, "row {}".format, Declared(**declared))  # type: ignore[arg-type]


def tar(path: Path, members: Sequence[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.mark.parametrize(
    "names",
    [
        ("900000000000207008", "900000000000207009"),
        ("1E50", "1E51"),
        ("01", "1"),
        ("1.0", "2.0"),
        ("1_0", "10"),
        ("Na", "Sb"),
        ("inf", "infinity"),
    ],
)
def test_class_names_are_kept_to_the_letter(names: tuple[str, str]) -> None:
    parsed = read([*names, *names])
    assert set(parsed.classes) == set(names)
    assert [parsed.classes[label] for label in parsed.labels] == [*names, *names]  # type: ignore[index]


@given(st.lists(st.decimals(allow_nan=False, allow_infinity=False).map(str) | st.integers().map(str)))
def test_no_number_is_renamed_and_every_cell_has_its_class(cells: list[str]) -> None:
    parsed = read(cells)
    assert set(parsed.classes) <= set(cells)
    assert None not in parsed.labels


def test_texts_of_one_class_are_said_with_their_counts_and_refused_where_strict() -> None:
    parsed = read(["1", "1.0", "1.0", "2"])
    assert parsed == Parsed(("1", "2"), [0, 0, 0, 1], ("texts that are one class, '1': '1' (1), '1.0' (2)",))
    assert read(["True", "TRUE", "TRUE", "false"]).classes == ("TRUE", "false")
    assert read(["caf\u00e9", "cafe\u0301"]).notes == (
        "texts that are one class, 'caf\u00e9': 'cafe\\u0301' (1), 'caf\\xe9' (1)",
    )
    with pytest.raises(UserError, match=r"expected one text for each class, found '1' and '1.0' for one"):
        read(["1", "1.0"], strict=True)
    assert read(["Cat", "cat"]).notes == ("classes that differ only in case: Cat / cat",)


def test_declared_classes_are_found_by_name_before_index() -> None:
    assert read(["1.0", "2", "true"], classes=["1", "2", "TRUE"]).labels == [0, 1, 2]
    assert read(["1.0", "0", " dog\ufeff"], classes=["cat", "dog"]).labels == [1, 0, 1]


@pytest.mark.parametrize("kind", ["classification", "regression", "multilabel"])
def test_the_same_words_mean_no_label_for_every_kind(kind: str) -> None:
    parsed = read(["3", "NA", "nan", "", "n/a", "NA"], kind)
    assert [label is None for label in parsed.labels] == [False, True, True, True, True, True]
    empty = "empty cells, missing labels and not 'none of the classes', which is '|' alone: 1"
    assert parsed.notes == (
        "read as no label: 'NA' (2), 'n/a' (1), 'nan' (1)",
        *([empty] if kind == "multilabel" else []),
    )


def test_the_words_for_no_label_can_be_changed() -> None:
    assert read(["NA", "unknown"], missing=["unknown"]).classes == ("NA",)
    assert read(["NA", "b"], classes=["NA", "b"]).labels == [0, 1]
    with pytest.raises(UserError, match=r"row 0: expected a number or nothing, found 'nan'.*--missing"):
        read(["nan"], "regression", missing=["NA"])


def test_a_decimal_comma_is_read_where_all_agree() -> None:
    assert read(["1,5", "2", "-,25"], "regression") == Parsed(
        (), [1.5, 2.0, -0.25], ("numbers have a decimal comma",)
    )
    with pytest.raises(UserError, match=r"one decimal sign in all cells, found '1,5' and, in row 1, '2.5'"):
        read(["1,5", "2.5"], "regression")
    with pytest.raises(UserError, match=r"may stand before decimals or between thousands"):
        read(["1,500", "2"], "regression")


def test_json_keeps_the_letters_of_its_numbers(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('[{"file": "a", "y": 1E50, "z": 0.10, "t": true, "n": NaN}]')
    assert read_table(tmp_path / "t.json", None).rows[0].cells == {
        "file": "a",
        "y": "1E50",
        "z": "0.10",
        "t": "true",
        "n": "NaN",
    }


def test_labels_in_tars_are_texts_without_marks_and_companion_files_are_left_out(tmp_path: Path) -> None:
    members = []
    for i, name in enumerate(("cat", "dog", "cat")):
        text = ("\ufeff" if i == 0 else "") + name
        long = json.dumps({"code": 900000000000207008 + i, "power": 0.5})
        long = long.replace("0.5", f"1E5{i % 2}")
        members += [
            (f"x/._{i}.png", b"\0\5\26\7" + bytes(40)),
            (f"x/{i}.png", picture(i, format="PNG")),
            (f"x/._{i}.txt", b"\0\5\26\7"),
            (f"x/{i}.txt", text.encode()),
            (f"x/{i}.json", ("\ufeff" + long).encode()),
        ]
    fields = {"label": "txt", "code": "json:code", "power": "json:power"}
    manifest = index_tars(
        [tar(tmp_path / "a.tar", members)], tmp_path / "out", dict(classification=fields), options=ONE
    )
    assert manifest.splits["train"].num_samples == 3
    assert manifest.tasks["label"].classes == ("cat", "dog")
    assert manifest.tasks["code"].classes == tuple(str(900000000000207008 + i) for i in range(3))
    assert manifest.tasks["power"].classes == ("1E50", "1E51")
    assert any(
        note.startswith("members left out, hidden or left behind by an operating system: 6 (x/._0.png")
        for note in manifest.notes
    )


def test_masks_in_tars_mean_what_classes_by_value_say(tmp_path: Path) -> None:
    members = [("0.png", picture(0, format="PNG")), ("0.seg.png", mask(1))]
    path = tar(tmp_path / "a.tar", members)

    def index(out: str, classes: dict[int, str]) -> tuple[int, ...]:
        mapping = dict(image=["png"], segmentation={"m": "seg.png"}, classes={"m": classes})
        return index_tars([path], tmp_path / out, mapping, options=ONE).tasks["m"].class_counts

    assert index("right", {0: "background", 1: "cell"}) == (90, 30)
    assert index("turned", {1: "cell", 0: "background"}) == (30, 90)
