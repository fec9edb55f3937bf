"""What somebody else made runs no code, moves no terminal, and asks for no more memory than it is worth."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import mtl_dist
from mtl_dist import commands, results
from mtl_dist.cell_table import CellTable
from mtl_dist.cli import app
from mtl_dist.config import trust
from mtl_dist.config.yaml_text import YamlError, parse
from mtl_dist.data.decode import decode_image, open_picture
from mtl_dist.data.images import MAX_PIXELS, UnreadableImage, examine_image, open_image
from mtl_dist.data.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from mtl_dist.errors import UserError
from mtl_dist.evaluator import Evaluation
from mtl_dist.importers.sources import Source
from mtl_dist.prediction.records import open_records, to_json
from mtl_dist.printable import cell, printable
from mtl_dist.recipe import load_recipe_of
from mtl_dist.run_folder import RunFolder
from mtl_dist.specs import TaskInfo
from tests.tiny_datasets import write_dataset

RECIPE = """
tasks: {digit: {kind: classification, loss: evil_part.Evil}}
data: {train: [{path: data}], image_size: 8}
"""
PART = """
from pathlib import Path
from mtl_dist.tasks.task import Loss
Path("imported").touch()

class Evil(Loss):
    num_outputs = 1
    def numerators(self, output, target): return output[:, 0]
    def denominators(self, target): return target
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder that names a part which leaves a trace when it is imported."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    monkeypatch.delitem(sys.modules, "evil_part", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil_part.py").write_text(PART)
    folder = tmp_path / "runs" / "theirs" / "1"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def imported(run: Path) -> bool:
    return (run.parents[2] / "imported").exists()


# ---------------------------------------------------------------- code
@pytest.mark.parametrize("command", [["predict", "RUN", "evil_part.py"], ["evaluate", "RUN"]])
def test_a_strangers_run_imports_nothing_and_says_how_to_trust_it(run: Path, command: list[str]) -> None:
    result = CliRunner().invoke(app, [str(run) if word == "RUN" else word for word in command])
    assert result.exit_code == 2
    assert "evil_part.Evil" in result.stderr
    assert "add --trust" in result.stderr
    assert not imported(run)


def test_with_trust_its_parts_are_imported(run: Path) -> None:
    with trust.trusted():
        load_recipe_of(run)
    assert imported(run)


def test_the_recipe_of_a_strangers_run_given_to_a_command_imports_nothing_either(run: Path) -> None:
    (run / "data.json").write_text("{}")
    for recipe, is_theirs in ((run / "recipe.yaml", True), (run.parent / "mine.yaml", False)):
        recipe.write_text(RECIPE)
        result = CliRunner().invoke(app, ["train", str(recipe), "--print-config"])
        assert ("add --trust" in result.stderr) == is_theirs
        assert imported(run) != is_theirs


def test_trust_is_taken_at_any_place_of_a_command(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trust.VARIABLE, "0")
    CliRunner().invoke(app, ["evaluate", str(run), "--trust"])
    assert imported(run)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("answer", ["y\n", "n\n", ""])
def test_what_is_answered_in_a_terminal_holds_in_the_processes_that_this_one_starts(
    run: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MTL_TRUSTED_FOLDERS", "")
    monkeypatch.setattr(trust, "_answers", {})
    rank = [sys.executable, "-c", f"from mtl_dist.recipe import *; load_recipe_of(Path({str(run)!r}))"]
    with monkeypatch.context() as terminal, contextlib.suppress(UserError):
        terminal.setattr(sys, "stdin", Terminal(answer))
        terminal.setattr(sys, "stderr", Terminal())
        load_recipe_of(run)
    assert imported(run) == (answer == "y\n")
    found = subprocess.run(rank, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (found.returncode == 0) == (answer == "y\n"), found.stderr


def test_the_users_own_run_needs_no_word_also_moved_until_its_recipe_changes(run: Path) -> None:
    trust.mark(run, "recipe.yaml")
    moved = run.rename(run.parent / "moved")
    load_recipe_of(moved)
    assert imported(run)
    (moved / "recipe.yaml").write_text(RECIPE + "name: other\n")
    assert not trust.is_own(moved, "recipe.yaml")


def test_nobody_elses_mark_counts(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trust.mark(run, "recipe.yaml")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    with pytest.raises(UserError, match="which you did not make, found evil_part"):
        load_recipe_of(run)
    assert not imported(run)


@pytest.mark.parametrize("state", ["/proc/nowhere", "\0"])
def test_without_a_state_folder_nothing_is_marked_and_nothing_breaks(
    run: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setattr(trust, "state_folder", lambda: Path(state))
    trust.mark(run, "recipe.yaml")
    assert not trust.is_own(run, "recipe.yaml")


def dataset(directory: Path, kind: str) -> Manifest:
    directory.mkdir()
    info = TaskInfo(kind=kind, classes=("a", "b"), num_labelled=1)
    return Manifest(channels=1, image_dtype="uint8", tasks={"count": info}, splits={})


def test_a_strangers_dataset_imports_nothing(run: Path, tmp_path: Path) -> None:
    made = dataset(tmp_path / "theirs", "evil_part.Evil")
    write_manifest(tmp_path / "theirs", made)
    (tmp_path / "theirs" / trust.MARK).unlink()
    with pytest.raises(UserError, match=r"tasks\.count\.kind: expected built-in parts alone.*--trust"):
        read_manifest(tmp_path / "theirs")
    assert not imported(run)
    trust.mark(tmp_path / "theirs", MANIFEST_NAME)
    assert read_manifest(tmp_path / "theirs").tasks["count"].kind == "evil_part.Evil"


# ---------------------------------------------------------------- text
HOSTILE = "cat\x1b]0;title\x07\x1b[2J\x9b31m‮"


def test_no_control_character_reaches_a_terminal() -> None:
    assert printable(HOSTILE).isprintable()
    line = to_json({"image": HOSTILE, "breed": {"class_name": HOSTILE}})
    assert line.isprintable()
    assert json.loads(line)["image"] == HOSTILE
    result = CliRunner().invoke(app, ["evaluate", f"runs/{HOSTILE}"])
    assert result.exit_code == 2
    assert printable(HOSTILE) in result.stderr
    assert all(line.isprintable() for line in result.stderr.splitlines())


def test_the_names_of_runs_are_printed_without_their_control_characters(tmp_path: Path) -> None:
    run = tmp_path / "runs" / HOSTILE
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(
        "name: x\ntasks: {a: {kind: classification}}\ndata: {train: [{path: d}]}\n"
    )
    (run / "log.txt").write_text(f"line\t{HOSTILE}\n")
    for command in ("tag", "logs", "status", "cancel"):
        result = CliRunner().invoke(app, [command, str(run)])
        shown = result.stdout + result.stderr
        assert result.exit_code in (0, 2), command
        assert "\\x1b[2J" in "".join(shown.split("\n")), command
        assert all(line.replace("\t", "").isprintable() for line in shown.splitlines()), command


def test_no_command_prints_by_itself() -> None:
    """What it says goes through `say`; a recipe and a log keep their lines."""
    printing = {
        (path.name, ast.unparse(node.args[0]))
        for path in Path(commands.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing == {
        ("runs.py", "printable_lines(to_yaml(loaded))"),
        ("cluster.py", "printable_lines(text)"),
    }


def test_no_spreadsheet_formula_is_written_into_a_table(tmp_path: Path) -> None:
    out = tmp_path / "answers.csv"
    with open_records(out, {"image": "", "=b.class": ""}) as write:
        write({"image": "=HYPERLINK(1)", "=b.class": ["@SUM(1)", "b"]})
        write({"image": "-0.5", "=b.class": "cat"})
    assert out.read_text().splitlines() == ["image,'=b.class", "'=HYPERLINK(1),'@SUM(1);b", "-0.5,cat"]
    assert [cell(text) for text in ("+1", "-x", "\tx")] == ["+1", "'-x", "'\tx"]


def test_no_class_makes_a_formula_in_a_confusion_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "draw_confusion", lambda *arguments: None)
    info = TaskInfo(kind="classification", classes=("=1+1", "@b"))
    found = Evaluation(0.0, {}, {"digit": np.array([[1, 2], [3, 4]])}, 10)
    results.write_evaluation(RunFolder(tmp_path), "test", found, {"digit": info}, print)
    (table,) = tmp_path.rglob("*_confusion.csv")
    assert table.read_text().splitlines() == ["true \\ predicted,'=1+1,'@b", "'=1+1,1,2", "'@b,3,4"]


@pytest.mark.parametrize("name", ["../out", "a/b", "..", ".", "/etc", "a\0b", "a\nb", "", "x" * 300])
def test_a_runs_name_stays_below_runs(run: Path, name: str) -> None:
    (run / "recipe.yaml").write_text(
        f"name: {json.dumps(name)}\ndata: {{train: [{{path: data}}], image_size: 8}}\n"
    )
    with pytest.raises(UserError, match="name: expected a folder's name"):
        load_recipe_of(run)


# ---------------------------------------------------------------- sizes
def png(width: int, height: int, depth: int = 8) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    data = bytearray(file.getvalue())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def made(format: str, width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, format)
    data = bytearray(file.getvalue())
    if format == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    if format == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def npy(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


BOMBS = {
    "jpeg": jpeg(65500, 65500),
    "png": png(100_000, 100_000),
    "deep png": png(100_000, 100_000, depth=16),
    "gif": made("GIF", 65500, 65500),
    "bmp": made("BMP", 1 << 20, 1 << 20),
    "npy": npy((1 << 30, 1 << 30)),
    "npy of many axes": npy((1 << 62, 1 << 62, 3)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_image_that_asks_for_too_much_is_refused_by_its_header(name: str) -> None:
    data = BOMBS[name]
    for read in (
        lambda: decode_image(data, 3),
        lambda: open_picture(memoryview(data), 3),
        lambda: examine_image(data),
    ):
        with pytest.raises(UnreadableImage):
            read()


def test_an_image_of_the_most_pixels_is_not_refused_for_its_size() -> None:
    side = int(MAX_PIXELS**0.5)
    with open_image(png(side, side)) as image:
        assert image.size == (side, side)
    with pytest.raises(UnreadableImage, match="at most 178,956,970 are decoded"):
        decode_image(jpeg(side + 1, side + 1), 3)


def test_a_member_of_a_zip_is_not_unpacked_beyond_its_budget(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("small.txt", bytes(1000))
        archive.writestr("bomb.png", bytes(80 * 1024**2))
    assert Source("small.txt", 0, 0, str(path)).read() == bytes(1000)
    with pytest.raises(UserError, match=r"^[^ ]*/bomb.zip/bomb.png: expected at most 200 times its size"):
        Source("bomb.png", 0, 0, str(path)).read()


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (LAUGHS, "once its aliases are followed"),
        ("[" * 5000, "too many levels"),
        ("a: &a [*a]", "too many levels, or one that holds itself"),
        ("x" * (1 << 20), "characters, where at most"),
        ("a: " + "9" * 5000, "a number that cannot be read"),
    ],
)
def test_yaml_has_a_budget_of_size_depth_and_aliases(text: str, problem: str) -> None:
    with pytest.raises(YamlError, match=problem):
        parse(text)


# ---------------------------------------------------------------- tables
EVIL = "\x1b]0;mine\x07[red]x"


def test_every_table_of_the_terminal_makes_its_cells_in_one_place() -> None:
    package = Path(mtl_dist.__file__).parent
    makers = {path.name for path in package.rglob("*.py") if "rich.table" in path.read_text(encoding="utf-8")}
    assert makers == {"cell_table.py", "doctor.py"}  # the doctor's levels are ours, its cells are escaped
    table = CellTable(EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL, EVIL)
    text = io.StringIO()
    Console(file=text, width=200, force_terminal=True, color_system=None).print(table)
    assert "\x1b]" not in text.getvalue() and "\x07" not in text.getvalue()
    assert text.getvalue().count(r"\x1b]0;mine\x07[red]x") == 4


@pytest.mark.parametrize("command", ["inspect", "status", "runs"])
def test_names_of_a_stranger_do_not_reach_the_terminal_through_a_command(
    tmp_path: Path, command: str
) -> None:
    info = TaskInfo(kind="classification", classes=(EVIL, "b"), num_labelled=0, class_counts=(0, 0))
    write_dataset(tmp_path / "theirs", {"train": 3}, tasks={"digit": info})
    run = tmp_path / "runs" / EVIL
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("tasks: {digit: {}}\ndata: {train: [{path: data}], image_size: 8}\n")
    place = tmp_path / ("theirs" if command == "inspect" else "runs")
    result = CliRunner().invoke(app, [command, str(place)])
    assert result.exit_code == 0, result.output
    assert r"\x1b]0;mine" in result.stdout and "\x1b]" not in result.output and "\x07" not in result.output
