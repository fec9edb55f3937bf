"""One cluster, one data set and one working directory for all tests on Slurm."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm_cluster import Cluster, mtl, running_cluster

RECIPE = """
name: slurm-test
tasks:
  digit: {kind: classification}
  thickness: {kind: regression, loss: {kind: own_parts.LogCosh, scale: 2.0}}
data: {train: [{path: data/digits}], image_size: 32, workers: 1}
model: {backbone: simple_cnn, norm: group, head: {dropout: 0.0}}
train: {max_steps: 160, global_batch: 16, log_every: 1, checkpoint_every: 10, evaluate_at_end: false}
"""

# Parts of the user's own beside the recipe: the jobs import them from their snapshot of it.
USER_PARTS = """
from dataclasses import dataclass

from torch import nn

from mtl_dist.tasks.task import Loss


@dataclass(frozen=True)
class LogCosh(Loss):
    scale: float = 1.0
    num_outputs = 1

    def numerators(self, output, target):
        return ((output[:, 0] - target) / self.scale).cosh().log()

    def denominators(self, target):
        return (target == target).float()


class Smooth(nn.Sequential):
    def __init__(self, in_channels: int, width: int = 16):
        sizes = [in_channels, width, 2 * width, 4 * width]
        super().__init__(*map(self.level, sizes, sizes[1:]))

    def level(self, before, after):
        return nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(4, after), nn.SiLU())
"""

# With the time limit of two minutes that one disturbance sets, the ranks stop 35 s after their start; Slurm's
# own signal comes up to a minute early, so after them.
PROFILE = """
partition: low
time_limit: 0:30:00
signal_lead_s: 1
save_margin_s: 85
gpus_per_task: 0
cpus_per_task: 1
environment: {OMP_NUM_THREADS: "1"}
"""

# Python imports this in every process of a job: the working directory is on their import path.
DISK = '''
"""A disk, under the writer of checkpoints, that hangs while `disk-hangs` exists, or that always fails."""

import os
import threading
import time

really_sync = os.fsync


def sync(file):
    if threading.current_thread().name.startswith("checkpoint"):
        if "TEST_DISK_FAILS" in os.environ:
            raise RuntimeError("the disk failed")
        while os.path.exists("disk-hangs"):
            time.sleep(0.05)
    really_sync(file)


os.fsync = sync
'''

# What apptainer is to a job: a command that starts another one.
CONTAINER = """#!/bin/sh
echo "$*" >> container.log
shift
exec "$@"
"""


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="package")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with data, recipe and profiles."""
    folder = tmp_path_factory.mktemp("work")
    before = Path.cwd()
    os.chdir(folder)
    mtl("prepare", "digits", "data/digits")
    container = folder / "container"
    container.write_text(CONTAINER)
    container.chmod(0o755)
    files = {
        "recipe.yaml": RECIPE,
        "profile.yaml": PROFILE,
        "contained.yaml": f"{PROFILE}container: {{kind: prefix, command: {container} exec}}\n",
        "broken-disk.yaml": PROFILE.replace('"1"}', '"1", TEST_DISK_FAILS: "1"}'),
        "held.yaml": f"{PROFILE}sbatch: {{hold: true}}\n",
        "sitecustomize.py": DISK,
        "own_parts.py": USER_PARTS,
    }
    for name, text in files.items():
        Path(name).write_text(text)
    try:
        yield folder
    finally:
        os.chdir(before)
