"""What makes less of a run than one might think is known before it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtl_dist.assemble import build_root, facts_of
from mtl_dist.caveats import averaged_tasks, caveats, check_monitor, check_norms
from mtl_dist.data.loader import Data, open_data
from mtl_dist.engine.world import World
from mtl_dist.errors import UserError
from mtl_dist.models.building import build_model
from mtl_dist.models.settings import ModelSettings
from mtl_dist.monitor import MonitorSettings
from mtl_dist.recipe import Recipe, load_recipe
from mtl_dist.specs import HeadSpec
from mtl_dist.step import RootModule
from tests.tiny_datasets import write_dataset
from tests.tiny_runs import write_recipe

WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def parts(directory: Path, lengths: Mapping[str, int], *overrides: str) -> tuple[Recipe, Data, RootModule]:
    recipe = load_recipe(write_recipe(directory, write_dataset(directory / "tiny", dict(lengths))), overrides)
    data = open_data(recipe.data, recipe.tasks)
    return recipe, data, build_root(recipe, facts_of(data), WORLD)


def test_one_value_per_channel_under_batchnorm_is_refused_with_the_layer(tmp_path: Path) -> None:
    """resnet18 ends in maps of 1 x 1 for images of 32 x 32."""
    resnet = ("model.backbone=resnet18", "model.norm=batch", "data.image_size=32", "tasks.shape=null")
    _, data, root = parts(tmp_path, {"train": 4}, *resnet)
    buffers = {name: value.clone() for name, value in root.model.named_buffers()}
    with pytest.raises(
        UserError, match=r"found one in backbone.*layer4.*bn.*, of 1 image at a time"
    ) as caught:
        check_norms(root, data, 1, WORLD)
    assert "model.norm=group" in str(caught.value)
    assert "2 values per channel" in check_norms(root, data, 2, WORLD)
    assert check_norms(root, data, 4, WORLD) == ""
    assert all(torch.equal(value, buffers[name]) for name, value in root.model.named_buffers())
    assert root.model.training


def test_a_layer_of_a_task_that_is_called_as_a_method_of_modules_is_found() -> None:
    settings = ModelSettings.model_validate({"backbone": "resnet18", "sharing": "separate"})
    model = build_model(
        settings, [HeadSpec("type", "vector", 2), HeadSpec("values", "vector", 2)], 3, (32, 32)
    )
    data: Any = SimpleNamespace(image_dtype="uint8", channels=3, image_size=(32, 32))
    root: Any = SimpleNamespace(model=model)
    with pytest.raises(UserError, match=r"found one in backbones\.type\."):
        check_norms(root, data, 1, WORLD)


@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_other_norms_need_no_batch(tmp_path: Path, norm: Any) -> None:
    resnet = ("model.backbone=resnet18", f"model.norm={norm}", "data.image_size=32", "tasks.shape=null")
    _, data, root = parts(tmp_path, {"train": 4}, *resnet)
    assert check_norms(root, data, 1, WORLD) == ""


def test_what_the_monitored_average_is_over_is_said_where_it_leaves_tasks_out(tmp_path: Path) -> None:
    recipe, data, _ = parts(tmp_path, {"train": 8, "val": 1})  # sample 8 has no label of `tags`

    def following(**monitor: Any) -> Recipe:
        return recipe.model_copy(update={"monitor": MonitorSettings(**monitor)})

    over = "which decides what is best, is over"
    assert list(averaged_tasks(recipe, data)) == [
        f"val/loss, {over} digit, value, shape alone (3 of 4 tasks)."
    ]
    (line,) = averaged_tasks(following(metric="val/mean_accuracy"), data)
    assert line == f"val/mean_accuracy, {over} digit alone (1 of 4 tasks)."
    assert list(averaged_tasks(following(metric="val/digit/macro_f1"), data)) == []
    assert list(averaged_tasks(following(metric="train/loss"), data)) == []
    for unmeasured in ({"metric": "val/tags/loss"}, {"mean": {"val/digit/loss": 1, "val/tags/loss": 1}}):
        with pytest.raises(UserError, match="found val/tags/loss: nothing would be the best"):
            check_monitor(following(**unmeasured), data)
    check_monitor(following(metric="train/tags/loss"), data)
    check_monitor(following(metric="val/digit/macro_f1"), data)


def test_nothing_is_said_where_nothing_is_odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, data, root = parts(
        tmp_path, {"train": 30, "val": 10}, "model.mean=[10,0,30]", "model.std=[10,1,40]"
    )
    monkeypatch.setattr("mtl_dist.caveats.odd_normalisation", lambda *about: [])
    lines = list(caveats(recipe, data, root, WORLD))
    assert [line for line in lines if "content hashes" not in line] == []
    monkeypatch.setenv("SLURM_NTASKS", "2")
    unlabelled = replace(
        data, task_infos=data.task_infos | {"value": replace(data.task_infos["value"], num_labelled=0)}
    )
    lines = list(caveats(recipe, unlabelled, root, WORLD))
    assert any("task value has no label in the training data" in line for line in lines)
    assert any("Slurm job has 2 tasks" in line for line in lines)
