"""The recipes, presets and profiles that travel in the package, and `mtl init`."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mtl_dist.cli import main
from mtl_dist.errors import UserError
from mtl_dist.recipe import load_recipe
from mtl_dist.shipped import SHELVES, copy_of, headline, shipped_files

CHECKOUT = Path(__file__).resolve().parents[2]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mtl", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_every_file_of_the_three_folders_is_listed_under_a_name_of_its_own() -> None:
    files = [
        path.name for folder in ("configs", "launch", "slurm") for path in (CHECKOUT / folder).glob("*.yaml")
    ]
    assert sorted(path.name for path in shipped_files().values()) == sorted(files)
    assert sum(len(shelf.files()) for shelf in SHELVES) == len(shipped_files())


def test_every_file_begins_with_a_line_that_says_what_it_is() -> None:
    for name, path in shipped_files().items():
        assert 10 < len(headline(path)) < 130, name


def test_the_list_names_every_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "init") == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in shipped_files())


def test_a_copy_is_the_file_and_never_overwrites_one(tmp_path: Path) -> None:
    place = copy_of("skin", tmp_path)
    assert place == tmp_path / "skin.yaml"
    assert place.read_text() == (CHECKOUT / "configs" / "skin.yaml").read_text()
    place.write_text("mine")
    with pytest.raises(UserError, match="expected a new file, found one"):
        copy_of("skin", tmp_path)
    assert place.read_text() == "mine"
    assert copy_of("skin", tmp_path / "other.yaml") == tmp_path / "other.yaml"


def test_a_recipe_that_is_not_here_but_comes_with_the_package_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"digits\.yaml: expected a recipe, .*`mtl init digits`"):
        load_recipe(tmp_path / "configs" / "digits.yaml")


def test_a_misspelt_name_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "init", "skim") == 2
    assert "Did you mean skin?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_wheel_holds_them(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--quiet",
        "--wheel-dir",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for shelf, folder in zip(SHELVES, ("recipes", "presets", "profiles"), strict=True):
        assert {f"mtl_dist/{folder}/{name}.yaml" for name in shelf.files()} <= names
