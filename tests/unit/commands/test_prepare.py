"""`mtl prepare` as it is typed: idx, cifar, stacks, and the options of every importer."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

import mtl_dist.prepare
from mtl_dist.cli import app
from mtl_dist.commands.prepare import command_of
from mtl_dist.data.manifest import read_manifest
from mtl_dist.errors import UserError
from mtl_dist.importers.importer import Importer
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.options import Help, PackOptions
from mtl_dist.importers.registry import IMPORTERS
from mtl_dist.importers.road import importer_class, make, own_settings
from tests.source_files import fill
from tests.unit.importers.test_arrays import cifar_files, idx_files
from tests.unit.importers.test_field_datasets import celeba
from tests.unit.importers.test_stacks import frames_of, write_stacks


def mtl(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_idx_files_with_names_and_a_share_to_validate_on(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", idx_files())
    said = mtl(
        "prepare", "idx", src, tmp_path / "out", "--task", "digit", "--classes", "a, b,c", "--val", "0.25"
    )
    assert "digit (classification)" in said
    manifest = read_manifest(tmp_path / "out")
    assert manifest.tasks["digit"].classes == ("a", "b", "c")
    assert manifest.splits["val"].num_samples == 10


def test_cifar_records_with_two_heads(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", cifar_files())
    mtl("prepare", "cifar", src, tmp_path / "out", "--heads", "coarse,fine", "--classes", "fine=w,x,y,z")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.tasks["coarse"].classes == ("land", "sea")
    assert manifest.tasks["fine"].classes == ("w", "x", "y", "z")


def test_stacks_with_table_masks_and_splits(tmp_path: Path) -> None:
    src = write_stacks(tmp_path / "src")
    mtl(
        *("prepare", "stacks", src, tmp_path / "out", "--stacks", "stack_*.tif", "--table", "frames.csv"),
        *("--regression", "count=count", "--segmentation", "cell=mask_*.tif", "--split", "val=b;test=c"),
        *(
            "--compute",
            "hours=page * 0.5",
            "--regression",
            "hours=hours",
            "--frames",
            "every:2",
            "--normalise",
            "1,99",
        ),
    )
    manifest = read_manifest(tmp_path / "out")
    assert {name: info.kind for name, info in manifest.tasks.items()} == {
        "count": "regression",
        "hours": "regression",
        "cell": "segmentation",
    }
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {
        "train": 3,
        "val": 3,
        "test": 3,
    }


def test_stacks_in_class_folders_with_a_number_that_depends_on_the_class(tmp_path: Path) -> None:
    for number, name in enumerate(("infected/x", "uninfected/y", "infected/z", "uninfected/w")):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(tmp_path / "src" / f"{name}.tif", frames_of(number))
    mtl(
        *("prepare", "stacks", tmp_path / "src", tmp_path / "out", "--classification", "infected=folder"),
        *("--classes", "infected=uninfected,infected", "--split", "0.5,0.5"),
        *(
            "--compute",
            "hours=page * 0.5 - 1 if folder == 'infected' else None",
            "--regression",
            "hours=hours",
        ),
    )
    manifest = read_manifest(tmp_path / "out")
    assert manifest.tasks["infected"].class_counts == (6, 6)
    assert manifest.tasks["hours"].num_labelled == 6
    assert (manifest.tasks["hours"].minimum, manifest.tasks["hours"].maximum) == (-1.0, 1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--regression", "n=page", "--compute", "page=1"], "expected a new column, found one of this name"),
        (["--regression", "n=n", "--compute", "n=pgae * 2"], "expected one of the columns"),
        (["--regression", "n=page", "--normalise", "99,1"], "--normalise: expected two percentiles"),
        (["--regression", "n=page", "--split", "val="], "--split: expected SPLIT=GROUP,..."),
        (["--regression", "count"], "--regression: expected TASK=COLUMN"),
    ],
)
def test_a_mistake_in_an_option_of_stacks_is_exit_code_2(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((5, 8, 9), np.uint8))
    assert message in refused("prepare", "stacks", tmp_path, tmp_path / "out", *arguments)


def given_for(name: str, kind: str, hint: Any, default: Any) -> tuple[list[str], Any]:
    """What is typed for a setting, and what it must be there: never its default."""
    if kind:
        return ["x=y"], {"x": f"{kind}:y"}
    plain = getattr(hint, "__origin__", hint) if hasattr(hint, "__metadata__") else hint
    several = [each for each in get_args(plain) if each is not type(None)]
    if get_origin(plain) in (Union, UnionType) and len(several) == 1:
        plain = several[0]
    origin = get_origin(plain) or plain
    if origin is Literal:
        word = next(each for each in get_args(plain) if each != default)
        return [word], word
    if name == "labels" and origin is dict:
        return ["regression:x=y"], {"x": "regression:y"}
    if origin is dict:
        return ["x=y"], {"x": "y"}
    if origin is tuple:
        return ["7"], [get_args(plain)[0](7)]
    if plain is bool:
        return [], not default
    if plain in (int, float):
        return ["17"], plain(17)
    return ["7"], "7"


@pytest.mark.parametrize("importer", IMPORTERS)
def test_every_option_in_the_help_of_an_importer_reaches_its_setting(
    importer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def run(*arguments: Any) -> None:
        seen[:] = arguments
        raise UserError("seen")

    monkeypatch.setattr("mtl_dist.importers.run", run)
    command, kind = command_of(importer), importer_class(importer)
    hints = get_type_hints(kind.__init__, include_extras=True)
    shared = get_type_hints(PackOptions, include_extras=True)
    own = own_settings(kind)
    assert not set(own) & set(shared), "a setting of its own is called as a shared one"
    options = [each for each in command.params if each.opts[0].startswith("--") and each.name != "help"]
    assert len({word for each in options for word in each.opts}) == len(options)
    positions = ["src"] * (len(command.params) - len(options) - 1)
    needed = {
        each.name: [each.opts[0], *given_for(each.name, "", hints[each.name], None)[0]]
        for each in options
        if each.name in own and own[each.name].default is inspect.Parameter.empty
    }
    for option in options:
        name = "labels" if option.name.startswith("of_") else option.name
        of_kind = option.name.removeprefix("of_") if option.name.startswith("of_") else ""
        hint = hints[name] if name in own else shared[name]
        default = own[name].default if name in own else getattr(PackOptions(), name)
        typed, meant = given_for(name, of_kind, hint, default)
        if name == "masks_as":
            typed, meant = ["stored"], "stored"
        word = option.secondary_opts[0] if meant is False else option.opts[0]
        others = [word for each, words in needed.items() if each != name for word in words]
        with pytest.raises(UserError, match=r"^seen$"):
            command.main([*positions, *others, "out", word, *typed], standalone_mode=False)
        _, _, settings, packing, _ = seen
        found = settings[name] if name in own else getattr(packing, name)
        assert (list(found) if isinstance(found, tuple) else found) == meant, option.opts


class Tagged(Importer):
    """Its own settings are called as a kind, as labels and as a setting that all share."""

    def __init__(self, labels: str = "", depth: int = 0, seed: int = 0) -> None:
        self.given = labels, depth, seed

    def tasks(self) -> dict[str, TaskSource]:
        return {}

    def records(self) -> list[Record]:
        return []


def test_a_setting_of_an_importers_own_is_never_taken_for_a_shared_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make(Tagged, {"labels": "all", "depth": 3, "seed": 5})
    assert isinstance(made, Tagged)
    assert made.given == ("all", 3, 5)
    seen: list[Any] = []
    monkeypatch.setattr("mtl_dist.prepare.run", lambda *arguments: seen.extend(arguments))
    mtl_dist.prepare.importer(Tagged, "out", labels="all", depth=3, seed=5, val=0.5)
    assert seen[2:] == [{"labels": "all", "depth": 3, "seed": 5}, PackOptions(val=0.5)]


@pytest.mark.parametrize(
    ("options", "kinds"), [([], ["classification"] * 3), (["--as", "one"], ["multilabel"])]
)
def test_celeba_as_its_help_shows_it(tmp_path: Path, options: list[str], kinds: list[str]) -> None:
    mtl("prepare", "celeba", celeba(tmp_path), tmp_path / "out", *options)
    assert [info.kind for info in read_manifest(tmp_path / "out").tasks.values()] == kinds


@pytest.mark.parametrize("name", IMPORTERS)
def test_every_option_of_an_importer_has_a_help(name: str) -> None:
    hints = get_type_hints(importer_class(name).__init__, include_extras=True)
    hints.pop("return")
    for option, hint in hints.items():
        said = [each.text for each in getattr(hint, "__metadata__", ()) if isinstance(each, Help)]
        assert said, option
        assert said[0], option
