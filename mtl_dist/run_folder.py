"""The run folder: where everything a run leaves behind lies.

runs/<name>/<run id>/
    recipe.yaml             resolved; reproduces the run
    environment.json        one entry per start: versions, git commit, devices, ranks
    data.json               what the tasks and images are, so that the run can be used without its data
    class_names.json        class names by index, per task
    log.txt  metrics.jsonl  history.json  skipped_steps.jsonl  learning_curves.png  tensorboard/
    tracking.json           the run's id in dashboards, kept by resumes
    tags.json               words by which `mtl status` and `mtl runs` find it
    checkpoints/            see checkpoint.py
    evaluation/             metrics.json, thresholds.json, confusion matrices, conflicts.png
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from mtl_dist.config.trust import parts_of, refusal
from mtl_dist.data.manifest import ImageDtype, PixelScale
from mtl_dist.durable import Locked, locked, write_text
from mtl_dist.errors import UserError
from mtl_dist.specs import TaskInfo

RECORDED_PACKAGES = (
    "mtl-dist",
    "torch",
    "torchvision",
    "accelerate",
    "deepspeed",
    "torchmetrics",
    "webdataset",
)


def new_run_directory(name: str, root: Path = Path("runs")) -> Path:
    """A run folder nobody has: sorted by time, and unique when two start in one second."""
    return root / name / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


@dataclass(frozen=True)
class DataFacts:
    """What a trained model must know of its data: the tasks, and the images' channels, dtype and (H, W).

    `pixels` is what its training images were like, where that was measured.
    """

    task_infos: dict[str, TaskInfo]
    channels: int
    image_dtype: ImageDtype
    image_size: tuple[int, int]
    pixels: PixelScale | None = None


class RunFolder:
    """The paths of one run, and the small files in it."""

    FILES: ClassVar[dict[str, str]] = {
        "recipe.yaml": "the resolved recipe; reproduces the run",
        "checkpoints/": "the newest ones and the best",
        "evaluation/": "metrics.json, thresholds.json, confusion matrices, conflicts of tasks",
        "hang/": "what each rank was doing when the run hung",
        "skipped_steps.jsonl": "steps that were not finite, with their samples",
        "metrics.jsonl": "every logged step and evaluation",
        "history.json": "losses and metrics by epoch",
        "learning_curves.png": "the same as a picture",
        "tensorboard/": "the same for TensorBoard",
        "class_names.json": "class names by index",
        "environment.json": "versions, git commit, devices and peak memory of every start",
        "tracking.json": "the run's id in dashboards",
        "tags.json": "words by which mtl status and mtl runs find it",
        "log.txt": "what the terminal said",
    }

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.recipe_path = directory / "recipe.yaml"
        self.checkpoints = directory / "checkpoints"
        self.evaluation = directory / "evaluation"

    @classmethod
    def open(cls, directory: Path) -> RunFolder:
        """The folder of a run that was started.

        Raises:
            UserError: it is not one.
        """
        folder = cls(directory)
        if not folder.recipe_path.is_file():
            what = "no recipe.yaml in it" if directory.is_dir() else "no such directory"
            raise UserError(f"{directory}: expected a run folder, found {what}.")
        return folder

    def pictures(self) -> list[Path]:
        """The learning curves, and what the evaluations drew."""
        return sorted([*self.directory.glob("*.png"), *self.evaluation.glob("*.png")])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process trains in this folder at a time.

        Raises:
            UserError: another one does.
        """
        try:
            with locked(self.directory / ".lock", wait=False):
                yield
        except Locked:
            raise UserError(
                f"{self.directory}: another process trains in this folder. "
                "Wait for it, or choose another --run-dir."
            ) from None

    def read_tags(self) -> list[str]:
        """The run's tags, in the order of the alphabet."""
        try:
            return list(json.loads((self.directory / "tags.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return []

    def change_tags(self, added: Sequence[str], removed: Sequence[str] = ()) -> list[str]:
        """Add tags and take some away; returns those that the run has then.

        Raises:
            UserError: a tag is no word.
        """
        before = self.read_tags()
        tags = sorted({*before, *checked_tags(added)} - set(removed))
        if tags != before:
            write_text(self.directory / "tags.json", json.dumps(tags, ensure_ascii=False))
        return tags

    def write_data(self, facts: DataFacts) -> None:
        task_infos = facts.task_infos
        write_text(self.directory / "data.json", json.dumps(asdict(facts), indent=1))
        names = {task: list(info.classes) for task, info in task_infos.items() if info.classes}
        write_text(self.directory / "class_names.json", json.dumps(names, indent=1, ensure_ascii=False))

    def read_data(self) -> DataFacts:
        facts = json.loads((self.directory / "data.json").read_text(encoding="utf-8"))
        for info in facts["task_infos"].values():
            with parts_of(self.directory, "data.json"):
                refused = refusal(info["kind"]) if "." in info["kind"] else ""
            if refused:
                raise UserError(f"{self.directory / 'data.json'}: {refused}")
        task_infos: dict[str, TaskInfo] = {}
        for name, raw in facts["task_infos"].items():
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
            task_infos[name] = TaskInfo(**values)
        height, width = facts["image_size"]
        pixels = facts["pixels"] and PixelScale(*(tuple(facts["pixels"][name]) for name in ("mean", "std")))
        return DataFacts(task_infos, facts["channels"], facts["image_dtype"], (height, width), pixels)

    def write_environment(self, world_size: int, device: str, decoder: str) -> str | None:
        """Add this start to environment.json; the decoder of the start before, if it was another one.

        Decoders differ by a few grey levels, so pictures are part of what a run may depend on.
        """
        path = self.directory / "environment.json"
        starts: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
        before = starts[-1]["decoder"] if starts else decoder
        packages = {name: version(name) for name in RECORDED_PACKAGES}
        starts.append(
            {
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "command": sys.argv,
                "host": platform.node(),
                "python": platform.python_version(),
                "packages": packages,
                "git_commit": git_commit(),
                "ranks": world_size,
                "device": device,
                "cpus": len(os.sched_getaffinity(0)),
                "decoder": decoder,
            }
        )
        write_text(path, json.dumps(starts, indent=1))
        return before if before != decoder else None

    def write_peak_memory(self, num_bytes: int) -> None:
        """Add to the newest start in environment.json the most memory that one of its processes held."""
        path = self.directory / "environment.json"
        starts: list[dict[str, Any]] = json.loads(path.read_text())
        starts[-1]["peak_memory_bytes"] = num_bytes
        write_text(path, json.dumps(starts, indent=1))

    def read_metrics(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """evaluation/metrics.json; empty where nothing was evaluated."""
        path = self.evaluation / "metrics.json"
        found: dict[str, dict[str, dict[str, float | None]]] = {}
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
        return found

    def read_thresholds(self) -> dict[str, dict[str, float]]:
        """The thresholds that were chosen on the validation split, by task and label; empty before that."""
        path = self.evaluation / "thresholds.json"
        found: dict[str, dict[str, float]] = {}
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
        return found

    def write_thresholds(self, thresholds: Mapping[str, Mapping[str, float]]) -> None:
        """Keep the chosen thresholds, by which the run's weights decide from now on."""
        self.evaluation.mkdir(exist_ok=True)
        write_text(self.evaluation / "thresholds.json", json.dumps(thresholds, indent=1, ensure_ascii=False))

    def write_metrics(self, split: str, tasks: Mapping[str, Mapping[str, float]]) -> None:
        """Put one split into evaluation/metrics.json: `{split: {task: {metric: value}}}`."""
        self.evaluation.mkdir(exist_ok=True)
        metrics = self.read_metrics()
        metrics[split] = {
            task: {name: None if value != value else value for name, value in values.items()}
            for task, values in tasks.items()
        }
        write_text(self.evaluation / "metrics.json", json.dumps(metrics, indent=1))


def checked_tags(tags: Sequence[str]) -> list[str]:
    """The tags, each one word.

    Raises:
        UserError: one is empty, or has spaces or commas in it.
    """
    for tag in tags:
        if not tag or re.search(r"[\s,]", tag):
            raise UserError(f"--tag: expected one word, found {tag!r}. Give --tag once for each.")
    return list(tags)


def git_commit() -> str | None:
    """The commit of the working directory, with "+changes" if it has any; None outside a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
