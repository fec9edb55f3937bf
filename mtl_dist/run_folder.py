"""The run folder: where everything a run leaves behind lies.

runs/<name>/<run id>/
    recipe.yaml             resolved; reproduces the run
    environment.json        one entry per start: versions, git commit, devices, ranks
    data.json               what the tasks and images are, and by what the data is known again
    class_names.json        class names by index, per task
    log.txt  metrics.jsonl  history.json  skipped_steps.jsonl  learning_curves.png  tensorboard/
    tracking.json           the run's id in dashboards, kept by resumes
    callbacks.json          up to which step callbacks were called
    tags.json               words by which `mtl status` and `mtl runs` find it
    checkpoints/            see checkpoint.py
    evaluation/             metrics.json, baselines.json, thresholds.json, temperatures.json,
                            calibration.json, SPLIT_predictions.csv (and .parquet), confusion matrices,
                            conflicts.png
    report.html             what `mtl report` makes of all that
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

from mtl_dist.config.trust import parts_of, refusal
from mtl_dist.config.user_modules import imported_hashes
from mtl_dist.data.facts import DataFacts
from mtl_dist.durable import Locked, is_about, locked, unwritable, write_text
from mtl_dist.errors import UserError
from mtl_dist.json_files import DamagedFile, read_json
from mtl_dist.status import read_status
from mtl_dist.tasks.metrics import PER_CLASS

_Value: TypeAlias = float | dict[str, dict[str, float | None]] | None
"""Of metrics.json: a metric, or those of each class."""
T = TypeVar("T")

DATA, ENVIRONMENT = "data.json", "environment.json"

RECORDED_PACKAGES = (
    "mtl-dist",
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "deepspeed",
    "torchmetrics",
    "webdataset",
)


def new_run_directory(name: str) -> Path:
    """A run folder nobody has: sorted by time, and unique when two start in one second."""
    return Path("runs") / name / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


class RunFolder:
    """The paths of one run, and the small files in it."""

    FILES: ClassVar[dict[str, str]] = {
        "recipe.yaml": "the resolved recipe; reproduces the run",
        "checkpoints/": "the newest ones and the best",
        "evaluation/": "metrics, baselines, predictions of every sample, confusion matrices",
        "hang/": "what each rank was doing when the run hung",
        "skipped_steps.jsonl": "steps that were not finite, with their samples",
        "metrics.jsonl": "every logged step and evaluation",
        "history.json": "losses and metrics by epoch",
        "learning_curves.png": "the same as a picture",
        "tensorboard/": "the same for TensorBoard",
        "class_names.json": "class names by index",
        "environment.json": "versions, git commit, devices and peak memory of every start",
        "tracking.json": "the run's id in dashboards",
        "callbacks.json": "up to which step callbacks were called",
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
            what = (
                "no recipe.yaml in it"
                if directory.is_dir()
                else "a file"
                if directory.is_file()
                else "no such directory"
            )
            raise UserError(f"{directory}: expected a run folder, found {what}.")
        return folder

    @property
    def has_begun(self) -> bool:
        """Whether it is a run's, of which something can be told."""
        return self.recipe_path.is_file() and (self.directory / DATA).is_file()

    def pictures(self) -> list[Path]:
        """The learning curves, and what the evaluations drew."""
        return sorted([*self.directory.glob("*.png"), *self.evaluation.glob("*.png")])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process trains in this folder at a time. A start that is refused leaves no lock file.

        Within a process that holds the lock already nothing more is locked.

        Raises:
            UserError: another one does, or the folder cannot be written.
        """
        path = self.directory / ".lock"
        if path.resolve() in _held:
            yield
            return
        is_new = not path.exists()
        try:
            with locked(path, wait=False), _holding(path.resolve()):
                try:
                    yield
                except UserError:
                    if is_new:
                        path.unlink(missing_ok=True)
                    raise
        except Locked:
            raise UserError(
                f"{self.directory}: another process trains in this folder. "
                "Wait for it, or choose another --run-dir."
            ) from None

    def read_tags(self) -> list[str]:
        """The run's tags, in the order of the alphabet."""
        path = self.directory / "tags.json"
        try:
            return read_json(list[str], path) or []
        except DamagedFile as error:
            raise UserError(
                f"{path}: expected a list of tags, found a damaged file ({error}). Remove it and tag the "
                "run again."
            ) from None

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

    def write_start(
        self, recipe: str, facts: DataFacts, world_size: int, device: str, decoder: str
    ) -> list[str]:
        """Begin or go on: the resolved recipe, what the data is, and this start in environment.json.

        Returns a line for all that is another than at the start before and may show in the numbers.
        """
        write_text(self.recipe_path, recipe)
        write_text(self.directory / DATA, facts.to_json())
        names = {task: list(info.classes) for task, info in facts.task_infos.items() if info.classes}
        write_text(self.directory / "class_names.json", json.dumps(names, indent=1, ensure_ascii=False))
        starts, lines = self._starts()
        now = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            "host": platform.node(),
            "python": platform.python_version(),
            "packages": installed(RECORDED_PACKAGES),
            "git_commit": git_commit(),
            "ranks": world_size,
            "device": device,
            "cpus": len(os.sched_getaffinity(0)),
            "decoder": decoder,
            "modules": imported_hashes(),
        }
        if starts:
            lines += _other_environment(starts[-1], now)
        write_text(self.directory / ENVIRONMENT, json.dumps([*starts, now], indent=1))
        return lines

    def read_data(self) -> DataFacts | None:
        """What the data of the run is; None before its first start.

        Raises:
            UserError: data.json is damaged, or names code of a stranger.
        """
        path = self.directory / DATA
        try:
            facts = read_json(DataFacts, path)
            return facts if facts is None else self.checked(facts)
        except DamagedFile as error:
            raise UserError(
                f"{path}: expected what the run wrote, found a damaged file ({error}). Copy the one of "
                "a checkpoint of the run."
            ) from None

    def checked(self, facts: DataFacts) -> DataFacts:
        """The facts of this run, whose kinds of tasks may be imported.

        Raises:
            UserError: one is code of somebody else, whom the user does not trust.
        """
        with parts_of(self.directory, self.recipe_path.name):
            for info in facts.task_infos.values():
                refused = refusal(info.kind) if "." in info.kind else ""
                if refused:
                    raise UserError(f"{self.directory / DATA}: {refused}")
        return facts

    def starts(self) -> list[dict[str, Any]]:
        """The starts in environment.json; none where it is damaged or missing."""
        return self._starts()[0]

    def _starts(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The starts in environment.json, and a line if it is damaged: then it starts empty."""
        path = self.directory / ENVIRONMENT
        try:
            return read_json(list[dict[str, Any]], path) or [], []
        except DamagedFile as error:
            return [], [f"{path}: it was damaged ({error}) and starts empty"]

    def write_peak_memory(self, num_bytes: int) -> None:
        """Add to the newest start in environment.json the most memory that one of its processes held."""
        starts = self.starts()
        if starts:
            starts[-1]["peak_memory_bytes"] = num_bytes
            write_text(self.directory / ENVIRONMENT, json.dumps(starts, indent=1))

    def has_ended_at(self, step: int) -> bool:
        """Whether a start trained to its end at this step, and measured the best weights."""
        status = read_status(self.directory)
        measured = (self.evaluation / "metrics.json").is_file()
        return measured and status is not None and status.state == "done" and status.step == step

    def read_metrics(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """evaluation/metrics.json; empty where nothing was evaluated.

        Raises:
            UserError: it is damaged.
        """
        return {
            split: {
                task: {name: value for name, value in values.items() if not isinstance(value, dict)}
                for task, values in tasks.items()
            }
            for split, tasks in self._read_all_metrics().items()
        }

    def read_per_class(self) -> dict[str, dict[str, dict[str, dict[str, float | None]]]]:
        """The metrics of each class, `{split: {task: {class: {metric: value}}}}`; no task without classes.

        Raises:
            UserError: evaluation/metrics.json is damaged.
        """
        return {
            split: {
                task: classes
                for task, values in tasks.items()
                if isinstance(classes := values.get(PER_CLASS), dict)
            }
            for split, tasks in self._read_all_metrics().items()
        }

    def _read_all_metrics(self) -> dict[str, dict[str, dict[str, _Value]]]:
        return self._read_by_split("metrics", dict[str, dict[str, dict[str, _Value]]])

    def read_baselines(self) -> dict[str, dict[str, dict[str, Any]]]:
        """evaluation/baselines.json: `{split: {task: {"name": ..., "metrics": {...}}}}`, or empty.

        Raises:
            UserError: it is damaged.
        """
        return self._read_by_split("baselines", dict[str, dict[str, dict[str, Any]]])

    def _read_by_split(self, what: str, form: type[T]) -> T:
        path = self.evaluation / f"{what}.json"
        try:
            return read_json(form, path) or form()
        except DamagedFile as error:
            raise UserError(
                f"{path}: expected {what} by split and task, found a damaged file ({error}). Remove it and "
                "evaluate again: mtl evaluate RUN --split SPLIT."
            ) from None

    def write_baselines(self, split: str, tasks: Mapping[str, tuple[str, Mapping[str, float]]]) -> None:
        """Put one split into evaluation/baselines.json: by task the answer's name and its metrics."""
        baselines = self.read_baselines()
        baselines[split] = {
            task: {"name": name, "metrics": _with_null(metrics)} for task, (name, metrics) in tasks.items()
        }
        write_text(self.evaluation / "baselines.json", json.dumps(baselines, indent=1))

    def predictions_path(self, split: str) -> Path:
        """The table with a row per sample; the same as .parquet is beside it where pyarrow is installed."""
        return self.evaluation / f"{split}_predictions.csv"

    def read_thresholds(self) -> dict[str, dict[str, float]]:
        """The thresholds that were chosen on the validation split, by task and label; empty before that."""
        path = self.evaluation / "thresholds.json"
        try:
            return read_json(dict[str, dict[str, float]], path) or {}
        except DamagedFile as error:
            raise UserError(
                f"{path}: expected thresholds by task and label, found a damaged file ({error}). Remove it "
                "and choose them again: mtl evaluate RUN --split val."
            ) from None

    def write_thresholds(self, thresholds: Mapping[str, Mapping[str, float]]) -> None:
        """Keep the chosen thresholds, by which the run's weights decide from now on."""
        self.evaluation.mkdir(exist_ok=True)
        write_text(self.evaluation / "thresholds.json", json.dumps(thresholds, indent=1, ensure_ascii=False))

    def read_temperatures(self, checkpoint: str) -> dict[str, float]:
        """The temperatures that were fitted on the validation split for the weights of a checkpoint, by task.

        Raises:
            UserError: none were, or the file is damaged.
        """
        path = self.evaluation / "temperatures.json"
        try:
            found = (read_json(dict[str, dict[str, float]], path) or {}).get(checkpoint)
        except DamagedFile as error:
            raise UserError(
                f"{path}: expected temperatures by checkpoint and task, found a damaged file ({error}). "
                "Remove it and fit them again: mtl evaluate RUN --temperature."
            ) from None
        if not found:
            raise UserError(
                f"{self.directory}: expected temperatures for {checkpoint}, found none. Fit them: "
                f"mtl evaluate {self.directory} --temperature."
            )
        return found

    def write_temperatures(self, checkpoint: str, temperatures: Mapping[str, float]) -> None:
        """Keep temperatures that were fitted for the best weights, those of a checkpoint."""
        self.evaluation.mkdir(exist_ok=True)
        write_text(
            self.evaluation / "temperatures.json", json.dumps({checkpoint: dict(temperatures)}, indent=1)
        )

    def write_calibration(self, split: str, tasks: Mapping[str, Mapping[str, Any]]) -> None:
        """Put one split into evaluation/calibration.json: by task its temperature, and `ece`, `nll` and
        `brier` before and after."""
        found = self._read_by_split("calibration", dict[str, dict[str, Any]])
        found[split] = {
            task: _with_null({"temperature": row["temperature"]})
            | {when: _with_null(row[when]) for when in ("before", "after")}
            for task, row in tasks.items()
        }
        write_text(self.evaluation / "calibration.json", json.dumps(found, indent=1))

    def write_metrics(
        self,
        split: str,
        tasks: Mapping[str, Mapping[str, float]],
        per_class: Mapping[str, Mapping[str, Mapping[str, float]]],
    ) -> None:
        """Put one split into evaluation/metrics.json: `{split: {task: {metric: value}}}`; tasks of classes
        have the metrics of each under `per_class`."""
        self.evaluation.mkdir(exist_ok=True)
        metrics = self._read_all_metrics()
        metrics[split] = {task: {**_with_null(values)} for task, values in tasks.items()}
        for task, classes in per_class.items():
            metrics[split][task][PER_CLASS] = {name: _with_null(values) for name, values in classes.items()}
        write_text(self.evaluation / "metrics.json", json.dumps(metrics, indent=1))


_held: set[Path] = set()
"""The locks that this process holds."""


@contextmanager
def _holding(path: Path) -> Iterator[None]:
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)


def _with_null(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The metrics as JSON has them: null where one is undefined."""
    return {name: None if value != value else value for name, value in metrics.items()}


@contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """Around all that writes to the run folder `directory`.

    Raises:
        UserError: it cannot be written, or is gone.
    """
    try:
        yield
    except OSError as error:
        if not is_about(error, directory):
            raise
        raise UserError(unwritable(directory, error)) from error


def checked_tags(tags: Sequence[str]) -> list[str]:
    """The tags, each one word.

    Raises:
        UserError: one is empty, or has spaces or commas in it.
    """
    for tag in tags:
        if not tag or re.search(r"[\s,]", tag):
            raise UserError(f"--tag: expected one word, found {tag!r}. Give --tag once for each.")
    return list(tags)


def _other_environment(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of the environment changes numbers: ranks, devices, decoders, packages, the user's modules.

    Decoders differ by a few grey levels; BatchNorm and dropout see other micro-batches on other ranks.
    """
    lines = []
    for name, what in (("ranks", "ranks"), ("device", "device"), ("decoder", "decoder of images")):
        if before.get(name) not in (None, now[name]):
            lines.append(f"{what}: {before[name]} before, {now[name]} from here on")
    packages = before.get("packages")
    numbers: Mapping[str, Any] = packages if isinstance(packages, Mapping) else {}
    for name, number in now["packages"].items():
        if numbers.get(name) not in (None, number):
            lines.append(f"{name}: {numbers[name]} before, {number} from here on")
    sources = before.get("modules")
    hashes: Mapping[str, str] = sources if isinstance(sources, Mapping) else {}
    for name, digest in now["modules"].items():
        if hashes.get(name) not in (None, digest):
            lines.append(
                f"module {name}: another source from here on ({hashes[name][:8]} before, {digest[:8]})"
            )
    return lines


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed: some are extras."""
    versions = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def git_commit() -> str | None:
    """The commit of the working directory, with "+changes" if it has any; None outside a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
