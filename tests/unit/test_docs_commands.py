"""What README, docs and the heads of recipes tell people to type is understood: every command line is parsed,
every recipe and override read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from mtl_dist.cli import app
from mtl_dist.commands.prepare import command_of
from mtl_dist.config.loading import load_settings
from mtl_dist.data.manifest import LabelCounts, Manifest, ShardInfo, SplitInfo, write_manifest
from mtl_dist.data.settings import DataSettings
from mtl_dist.launch.profile import ClusterProfile
from mtl_dist.recipe import Recipe, load_recipe
from mtl_dist.specs import TaskInfo

ROOT = Path(__file__).parents[2]
USAGE_ERROR: Any = typer.BadParameter.__base__
DOCS = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if path.name != "extend.md"  # test_extend runs it
]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
TASKS = {
    "digit": TaskInfo("classification", tuple("0123456789"), num_labelled=1),
    "diagnosis": TaskInfo("classification", ("a", "b"), num_labelled=1),
    "lesion": TaskInfo("segmentation", ("background", "lesion"), num_labelled=1),
    "mask": TaskInfo("segmentation", ("background", "mask"), num_labelled=1),
    "age": TaskInfo("regression", num_labelled=1),
    "depth": TaskInfo("depth", num_labelled=1),
    "height": TaskInfo("depth", num_labelled=1),
}


# ---------------------------------------------------------------- the commands
def commands_in(path: Path) -> Iterator[str]:
    """The lines that are an `mtl` command, those that go on put together, several in one apart."""
    text = re.sub(r"^# ?(COMMAND)?", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = re.sub(r"\\\n\s*", " ", text)
    for line in text.splitlines():
        found = re.match(r"\s*(?:\$ |# )?((?:mtl|python -m mtl_dist) .*)", line)
        if found:
            yield from (part.strip() for part in found[1].split(" && ") if part.strip().startswith("mtl "))


LINES = sorted(
    {
        (path.relative_to(ROOT).as_posix(), line)
        for path in (*DOCS, *RECIPES)
        for line in commands_in(path)
        if "my_project" not in line and "..." not in line and "mtl <" not in line
    }
)


def words_of(line: str) -> list[str]:
    """Its words, without what the shell does with its output."""
    words = shlex.split(re.sub(r"\$\(.*?\)", "RUN", line), comments=True)[1:]
    ends = [at for at, word in enumerate(words) if word in (">", ">>", "|", "<")]
    return words[: min(ends, default=len(words))]


def parsed(words: list[str]) -> dict[str, Any]:
    """The values of a command's parameters; files need not be there."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("mtl", [], resilient_parsing=True)
    while hasattr(command, "get_command"):
        name = words.pop(0)
        command = command.get_command(context, name)
        assert command is not None, f"no command {name}"
        if name == "index":  # which hands everything on
            command = command_of("tars")
        context = type(context)(command, info_name=name, parent=context)
    values, left, _ = command.make_parser(context).parse_args(words)
    assert left == []
    for parameter in command.get_params(context):
        given = values.get(parameter.name)
        if given is None:
            assert not parameter.required or parameter.param_type_name == "option", parameter.name
        elif not parameter.is_eager and "Path" not in str(
            getattr(parameter, "bare_type", None) or parameter.type
        ):
            parameter.process_value(context, given)
    return values


def test_there_are_commands() -> None:
    assert len(LINES) > 80


@pytest.mark.parametrize(
    "words",
    [
        ["train", "configs/digits.yaml", "--debugs"],
        ["prepare", "folders", "photos/", "data/x", "--task"],
        ["launch", "configs/digits.yaml", "--nproc", "two"],
        ["verify", "a", "b"],
    ],
)
def test_a_command_with_a_mistake_is_not(words: list[str]) -> None:
    with pytest.raises((USAGE_ERROR, AssertionError)):
        parsed(words)


@pytest.mark.parametrize(("where", "line"), LINES)
def test_a_command_of_the_docs_is_parsed(where: str, line: str) -> None:
    values = parsed(words_of(line))
    recipe = str(values.get("recipe") or "")
    if (ROOT / recipe).is_file() and not values.get("sweep") and " sweep " not in line:
        text = yaml.safe_load((ROOT / recipe).read_text(encoding="utf-8"))
        if "tasks" in text:  # else only its data says what they are
            load_settings(Recipe, ROOT / recipe, values.get("overrides") or ())


# ---------------------------------------------------------------- the recipes
def blocks_in(path: Path) -> Iterator[str]:
    """The yaml blocks; one that states a key several times shows choices, which stand alone."""
    for block in re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        tops = re.findall(r"^(\w+):", block, re.MULTILINE)
        if len(tops) == len(set(tops)):
            yield block
        else:
            yield from (line for line in block.splitlines() if "..." not in line)


BLOCKS = [(path.relative_to(ROOT).as_posix(), block) for path in DOCS for block in blocks_in(path)]


@pytest.mark.parametrize(
    ("where", "block"), BLOCKS, ids=[f"{path}-{i}" for i, (path, _) in enumerate(BLOCKS)]
)
def test_a_recipe_of_the_docs_is_read_on_a_made_dataset(
    where: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = yaml.safe_load(block)
    if "my_project" in block:  # what the docs call a module of the user's
        package = tmp_path / "my_project"
        package.mkdir()
        package.joinpath("__init__.py").write_text("")
        package.joinpath("labels.py").write_text("def risk(label):\n    return 'low'\n")
        monkeypatch.syspath_prepend(tmp_path)
    if set(stated) <= set(DataSettings.model_fields):  # a part of `data`
        stated = {"data": stated}
    if not set(stated) <= set(Recipe.model_fields):
        load_settings(ClusterProfile, stated)
        return
    data = stated.get("data", {})
    data = {"image_size": 8, **data}
    if "my_project" in block or any("fields" in source for source in data.get("train", ())):
        load_settings(DataSettings, {"train": [{"path": "data/x"}], **data})  # what it names is not there
        return
    counts = {name: LabelCounts(1, 0, (1,) * len(info.classes)) for name, info in TASKS.items()}
    tmp_path.joinpath("made").mkdir()
    shard = ShardInfo("train-000000.tar", 1, 0, "0" * 64)
    manifest = Manifest(3, "uint8", TASKS, {"train": SplitInfo(1, (shard,), counts)}, "made")
    write_manifest(tmp_path / "made", manifest)
    recipe = load_recipe({**stated, "data": {**data, "train": [{"path": str(tmp_path / "made")}]}})
    assert recipe.tasks
