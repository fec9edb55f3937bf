"""Whatever lies in a source is a sample or left out for a reason: samples + left out = found."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtl_dist.data.manifest import read_manifest
from mtl_dist.data.reader import SplitReader
from mtl_dist.errors import UserError
from mtl_dist.importers.folders import Folders
from mtl_dist.importers.jobs import Record
from mtl_dist.importers.table import TableImporter
from mtl_dist.kinds.vocabulary import plain
from tests.source_files import fill, index_tars, labels, picture, prepare
from tests.tiny_datasets import png

FEW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


# ---------------------------------------------------------------- folders
CLASSES = ("ant", "Ant", "caf\u00e9", "cafe\u0301", "\ufb01sh", "bee.x", "n" * 255, "日本", " blank", "a'b")
NAMES = (
    *("0.png", "0.PNG", "1.jpg", "caf\u00e9.png", "cafe\u0301.png", "x.png.txt", "noext", ".hidden.png"),
    *("._0.png", "Thumbs.db", "." + "n" * 250, "n" * 251 + ".png", "a b.png", "\udcff.png", "dir.png/"),
)
LINKS = ("to a file", "to a folder", "to itself", "to above", "to nothing", "fifo")


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Files of classes, and links of each sort."""
    found = [("ant/first.png", ""), ("bee.x/first.png", "")]
    names = st.lists(st.sampled_from(NAMES), max_size=6, unique=True)
    links = st.lists(st.sampled_from(LINKS), max_size=3)
    for folder in draw(st.lists(st.sampled_from(CLASSES), max_size=5, unique=True)):
        found += [(f"{folder}/{name}", "") for name in draw(names)]
        found += [(f"{folder}/link{n}", link) for n, link in enumerate(draw(links))]
    return found


def plant(root: Path, tree: list[tuple[str, str]]) -> None:
    (root / "aside").mkdir()
    (root / "aside" / "0.png").write_bytes(b"0")
    for name, link in tree:
        path = root / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        targets = {"to a file": root / "aside" / "0.png", "to a folder": root / "aside"}
        targets |= {"to above": root / "in", "to nothing": root / "gone", "to itself": path}
        target = targets.get(link)
        if target is not None:
            os.symlink(target, f"{path}.png")
        elif link:
            os.mkfifo(path)
        elif name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(b"x")


def entries(folder: Path, above: frozenset[str] = frozenset()) -> list[str]:
    """The files and ends of links below a folder, counted without the package."""
    found = []
    for name in os.listdir(folder):
        path = folder / name
        real = os.path.realpath(path)
        if path.is_dir() and real not in above | {os.path.realpath(folder)}:
            found += entries(path, above | {os.path.realpath(folder)})
        else:
            found.append(str(path))
    return found


@FEW
@given(trees())
def test_every_file_of_class_folders_is_an_image_or_left_out(
    tree: list[tuple[str, str]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plant(Path(folder), tree)
        there = entries(Path(folder) / "in")
        try:
            importer = Folders(Path(folder) / "in", levels=("t", "-"))
        except UserError as error:
            assert "expected images of a class, found none" in str(error)  # an empty folder is refused
            return
        samples = list(importer.records())
        fates = importer.account.totals()["files"]
        assert sum(fates.values()) == len(there)
        assert fates["image"] == len(samples) == len({str(sample.image) for sample in samples})
        names = importer.tasks()["t"].classes
        for sample in samples:
            assert isinstance(sample.image.path, str)  # type: ignore[union-attr]
            inside = Path(sample.image.path).relative_to(Path(folder) / "in")  # type: ignore[union-attr]
            assert names[sample.labels["t"]] == plain(inside.parts[0])


# ---------------------------------------------------------------- tables
ROWS = {
    "a.png,x,1": "sample",
    "b.png,y,2": "sample",
    "c.png,,": "sample",
    "d.png,x": "sample",
    "./a.png,x,1": "left out: it repeats another",
    "gone.png,x,1": "left out: its image is not there",
    ",,": "left out: blank",
    " , ,": "left out: blank",
    ",code,years": "left out: a legend, which names no image",
    "Legend": "left out: a legend, which names no image",
    "x = an ant,1": "left out: a legend, which names no image",
}


@FEW
@given(st.lists(st.sampled_from(list(ROWS)), max_size=10), st.sampled_from([",", ";", "\t", "|"]))
def test_every_row_of_a_table_is_a_sample_or_left_out_for_a_reason(rows: list[str], separator: str) -> None:
    rows = ["a.png,x,1", "b.png,y,2", *rows]
    expected, seen = Counter[str](), set[str]()
    for row in rows:
        fate = "left out: it repeats another" if ROWS[row] == "sample" and row in seen else ROWS[row]
        expected[fate] += 1
        seen.add(row)
    with tempfile.TemporaryDirectory() as folder:
        table = "".join(f"{row}\n".replace(",", separator) for row in ("file,dx,age", *rows))
        files = {name: b"x" for name in ("a.png", "b.png", "c.png", "d.png")}
        root = fill(Path(folder), {"t.csv": table, **files})
        asked = {"dx": "classification:dx", "age": "regression:age"}
        importer = TableImporter(root / "t.csv", labels=asked)
        importer.tasks()
        found = list(importer.records())
    assert importer.account.totals()["rows"] == dict(expected)
    assert sum(isinstance(each, Record) for each in found) == expected["sample"]


@pytest.mark.parametrize(
    ("expression", "classes"),
    [
        ("dx", ("01", "1E50", "900000000000207008")),
        ("dx if dx != '01' else 'one'", ("1E50", "900000000000207008", "one")),
        ("'x' + text(dx)", ("x01", "x1E50", "x900000000000207008")),
        ("lower(dx)", ("01", "1e50", "900000000000207008")),
        ("'few' if dx == '01' or dx == '1E50' else dx", ("900000000000207008", "few")),
    ],
)
def test_a_computed_class_is_a_text_to_the_letter(
    tmp_path: Path, expression: str, classes: tuple[str, ...]
) -> None:
    codes = ("01", "1E50", "900000000000207008")
    table = "file,dx\n" + "".join(f"{n}.png,{code}\n" for n, code in enumerate(codes))
    src = fill(tmp_path / "in", {"t.csv": table, **{f"{n}.png": picture(n) for n in range(3)}}) / "t.csv"
    named: dict[str, Any] = {"compute": {"c": expression}, "classification": {"c": "c"}}
    manifest = prepare(src, tmp_path / "out", split="0.6,0.4", **named)
    assert sorted(manifest.tasks["c"].classes) == sorted(classes)
    assert len(labels(tmp_path / "out")) == 3


# ---------------------------------------------------------------- tars
FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
PREFIXES = ("", "./", "a/b.v1/", "/absolute/", "deep/" * 25, "caf\u00e9/", "c\udcff/")
KINDS = {
    "folder": tarfile.DIRTYPE,
    "symlink": tarfile.SYMTYPE,
    "hardlink": tarfile.LNKTYPE,
    "fifo": tarfile.FIFOTYPE,
    "device": tarfile.CHRTYPE,
    "contiguous": tarfile.CONTTYPE,
    "text": tarfile.REGTYPE,
}
ODD = (*KINDS, "sparse", "hidden", "mac", "bare")


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, "000.cls" if kind != tarfile.REGTYPE else ""
    info.mtime = 1.5 if tar.format == tarfile.PAX_FORMAT else 1  # type: ignore[assignment]
    tar.addfile(info, io.BytesIO(data))


def sparse(name: str) -> bytes:
    """A member in GNU's old form of sparse files: of 1,000 bytes the last 8 are stored."""
    header = bytearray(512)
    header[: len(name)] = name.encode()
    fields = {100: b"0000644", 108: b"0000000", 116: b"0000000", 124: b"%011o" % 8, 136: b"%011o" % 0}
    fields |= {386: b"%011o" % 992, 398: b"%011o" % 8, 483: b"%011o" % 1000}
    for at, text in fields.items():
        header[at : at + len(text)] = text
    header[156:157], header[257:265], header[148:156] = b"S", b"ustar  \0", b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + b"x" * 8 + bytes(504)


@FEW
@given(st.sampled_from(list(FORMS)), st.sampled_from(PREFIXES), st.lists(st.sampled_from(ODD), max_size=6))
def test_every_member_of_a_tar_is_used_or_left_out(form: str, prefix: str, odd: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        pictures = [png(np.full((4, 4, 3), n, np.uint8)) for n in range(4)]
        with open(path, "wb") as file:
            for number in range(4):
                with tarfile.open(fileobj=file, mode="w", format=FORMS[form]) as tar:
                    add(tar, f"{prefix}{number:03d}.png", pictures[number])
                    add(tar, f"{prefix}{number:03d}.cls", str(number % 2).encode())
                    for n, what in enumerate(odd):
                        name = f"{prefix}{number:03d}.{what}{n}"
                        if what == "sparse" and form == "gnu" and len(prefix) < 10 and prefix.isascii():
                            tar.fileobj.write(sparse(f"{prefix}{number:03d}.sparse{n}"))  # type: ignore[union-attr]
                            tar.offset += 1024  # type: ignore[attr-defined]
                        elif what in ("hidden", "mac"):
                            add(tar, f"{prefix}{'.' if what == 'hidden' else '._'}{number:03d}.png", b"x")
                        elif what == "bare":
                            add(tar, f"{prefix}bare{number}{n}", b"x")
                        else:
                            kind = KINDS.get(what, tarfile.REGTYPE)
                            add(tar, name, b"x" if kind in (tarfile.REGTYPE, tarfile.CONTTYPE) else b"", kind)
                    if number < 3:
                        tar.closed = True  # the next ones are of the same archive
        with tarfile.open(path) as tar:
            there = len(tar.getmembers())
        manifest = index_tars([str(path)], Path(folder) / "out", {"classification": {"y": "cls"}})
        members = manifest.account["members"]
        assert sum(members.values()) == there == 4 * (2 + len(odd))
        assert (members["image"], members["label"]) == (4, 4)
        reader = SplitReader(Path(folder) / "out", read_manifest(Path(folder) / "out"), "train")
        assert [bytes(reader.read(row).image) for row in range(4)] == pictures
        reader.close()
