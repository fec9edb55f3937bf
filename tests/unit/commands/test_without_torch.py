"""What answers at once: nothing that only reads settings or manifests waits for torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtl_dist.launch.gpus import num_gpus
from tests.tiny_datasets import write_dataset

HEAVY = ("torch", "torchvision", "torchmetrics", "deepspeed", "accelerate", "matplotlib", "scipy", "sklearn")
RECIPE = "{tasks: {digit: {kind: classification}}, data: {train: [{path: data}], image_size: 8}}"
WITHOUT_TASKS = "{data: {train: [{path: data}], image_size: 8}, monitor: {metric: val/mean_accuracy}}"
ONLY_ON_CPUS = pytest.mark.skipif(num_gpus() > 0, reason="torch counts the GPUs")
PROFILE = "{gpus_per_task: 0, cpus_per_task: 1}"
MAIN = """
import sys
from mtl_dist.cli import main
heavy = sys.argv.pop().split()
try:
    main()
finally:
    print("loaded", *(name for name in heavy if name in sys.modules), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a dataset, recipes and a cluster profile."""
    work = tmp_path_factory.mktemp("work")
    write_dataset(work / "data", {"train": 6, "val": 3})
    (work / "recipe.yaml").write_text(RECIPE)
    (work / "open.yaml").write_text(WITHOUT_TASKS)
    (work / "profile.yaml").write_text(PROFILE)
    return work


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["prepare", "--help"], 0),
        (["train", "recipe.yaml", "--print-config"], 0),
        (["train", "recipe.yaml", "--print-config", "balance.method=cagrad"], 0),
        (["train", "open.yaml", "--print-config"], 0),
        (["train", "recipe.yaml", "tasks.digit.loss={kind: focl}", "optim.lr=x", "bathc=3"], 2),
        (["train", "open.yaml", "monitor.metric=val/digit/acuracy"], 2),
        (["train", "recipes.yaml"], 2),
        (["train", "recipe.yaml", "model.backbone=resnet81"], 2),
        (["launch", "recipe.yaml", "optim.lr=x"], 2),
        pytest.param(["launch", "recipe.yaml", "--nproc", "7"], 2, marks=ONLY_ON_CPUS),
        pytest.param(["init", "data"], 0, marks=ONLY_ON_CPUS),
        (["inspect", "data"], 0),
        (["status", "."], 0),
        *(([command, "runs/nowhere"], 2) for command in ("evaluate", "export", "serve", "verify")),
        (["predict", "runs/nowhere", "a.png"], 2),
        (["submit", "recipe.yaml", "--cluster", "profile.yaml", "--dry-run"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_that_only_reads_settings_or_manifests_imports_no_torch(
    arguments: list[str], code: int, work: Path
) -> None:
    package = str(Path(__file__).parents[3])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *arguments, " ".join(HEAVY)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (code, "loaded"), done.stderr
