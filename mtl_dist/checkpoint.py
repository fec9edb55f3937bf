"""Checkpoints: the full, engine-independent state of a run, whole or absent.

    checkpoints/
        step_00001234/
            model.safetensors       weights and buffers, balancer included, float32
            optimizer.safetensors   `<slot>/<parameter name>`
            ema.safetensors         the averaged weights, where the recipe asks for them
            metrics.safetensors     what the running epoch's training metrics have counted, within an epoch
            state.json              step, position, monitor, the best one so far, sums of the running epoch
            recipe.yaml
            metrics.jsonl           the run's record up to here
            data.json               what the tasks and images are, and by what the data is known again
            manifest.json           size and SHA-256 of every other file; written last
        best.json                   the step of the best one so far, as the newest state.json has it

A checkpoint is written under a temporary name, every file hashed and fsynced, the manifest last, and renamed.
It is read only if it is whole and every hash matches: one flipped byte in a tensor loads silently otherwise.
Nothing is unpickled.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from mtl_dist.durable import sha256_of, sync_directory, sync_file, unwritable, write_text
from mtl_dist.errors import UserError
from mtl_dist.not_finite import not_finite_in
from mtl_dist.tensor_files import read_tensors, shapes_of, write_tensors

MANIFEST, STATE, BEST = "manifest.json", "state.json", "best.json"
RECIPE, DATA, RECORD = "recipe.yaml", "data.json", "metrics.jsonl"
FORMAT = "mtl_dist checkpoint"
FORMAT_VERSION = 3

_STEP_NAME = re.compile(r"step_(\d{8,})")


@dataclass
class Checkpoint:
    """The state of a run after `step` optimizer steps, on the host.

    `tensors` maps a file's stem ("model", "optimizer", "ema", "metrics") to its named tensors; `state` is
    plain JSON; `recipe`, `data` and `record` are the texts of the run's recipe.yaml, data.json and
    metrics.jsonl.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    recipe: str = field(default="", repr=False)
    data: str = field(default="", repr=False)
    record: str = field(default="", repr=False)


def step_directory(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def write_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` below `directory` and return its folder, which appears complete or not at all.

    Raises:
        OSError: it cannot be written; then nothing of it is left.
    """
    final = step_directory(directory, checkpoint.step)
    if final.exists():
        if not problems_of(final):
            return final
        shutil.rmtree(final)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_files(temporary, checkpoint)
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # what is left of it would fill the disk further
        raise
    sync_directory(directory)
    return final


def _write_files(temporary: Path, checkpoint: Checkpoint) -> None:
    """All files of a checkpoint, the manifest last."""
    for name, tensors in checkpoint.tensors.items():
        write_tensors(tensors, temporary / f"{name}.safetensors")
    (temporary / STATE).write_text(json.dumps(checkpoint.state, indent=1), encoding="utf-8")
    (temporary / RECIPE).write_text(checkpoint.recipe, encoding="utf-8")
    (temporary / DATA).write_text(checkpoint.data, encoding="utf-8")
    (temporary / RECORD).write_text(checkpoint.record, encoding="utf-8")
    files = {}
    for path in sorted(temporary.iterdir()):
        sync_file(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "step": checkpoint.step,
        "files": files,
    }
    write_text(temporary / MANIFEST, json.dumps(manifest, indent=1))


def problems_of(path: Path) -> list[str]:
    """What is wrong with the checkpoint at `path`, one line each; empty when it is whole."""
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        return [f"{path}: expected a {MANIFEST}, found none: the checkpoint is not complete."]
    try:
        files = _files_of(json.loads(manifest_path.read_text(encoding="utf-8")), path)
    except (OSError, ValueError, RecursionError) as error:
        return [f"{manifest_path}: expected a checkpoint's manifest, found a damaged one ({error})."]
    problems = []
    for name, (num_bytes, sha256) in files.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{file}: expected {num_bytes} bytes, found no file.")
        elif file.stat().st_size != num_bytes:
            problems.append(f"{file}: expected {num_bytes} bytes, found {file.stat().st_size}.")
        elif sha256_of(file) != sha256:
            problems.append(f"{file}: its content does not match its SHA-256: the file was damaged.")
    return problems


def faults_of(path: Path) -> list[str]:
    """Why nothing should go on from the checkpoint at `path`: what is damaged, or else not finite."""
    try:
        return problems_of(path) or not_finite_in(path)
    except UserError as error:  # its hashes are right, and its tensors are none
        return str(error).splitlines()
    except OSError as error:
        return [f"{path}: expected to read it, found: {error.strerror or error}."]


def _files_of(manifest: object, path: Path) -> dict[str, tuple[int, str]]:
    """The size and SHA-256 of every file of a checkpoint, as its manifest has them.

    Raises:
        ValueError: it is none, or lacks what it must have.
    """
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError("it does not say what it is")
    version, files = manifest.get("version"), manifest.get("files")
    if version != FORMAT_VERSION or isinstance(version, bool):
        is_newer = isinstance(version, int) and version > FORMAT_VERSION
        advice = "Upgrade mtl_dist" if is_newer else "Use the mtl_dist that wrote it"
        raise ValueError(f"format version {version!r}, expected {FORMAT_VERSION}. {advice}")
    step = manifest.get("step")
    if not isinstance(step, int) or path.name != step_directory(path.parent, step).name:
        raise ValueError(f"it is that of step {step!r}")
    if not isinstance(files, dict) or not {"model.safetensors", STATE, RECIPE, DATA, RECORD} <= files.keys():
        raise ValueError("files are missing in it")
    found = {}
    for name, facts in files.items():
        facts = facts if isinstance(facts, dict) else {}
        num_bytes, sha256 = facts.get("bytes"), facts.get("sha256")
        if Path(name).name != name or not isinstance(num_bytes, int) or not isinstance(sha256, str):
            raise ValueError(f"no name, size and SHA-256 of {name!r}")
        found[name] = num_bytes, sha256
    return found


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, after every size and hash was checked.

    Raises:
        UserError: it is incomplete, damaged, or of a newer format.
    """
    problems = problems_of(path)
    if problems:
        raise UserError("\n".join(problems))
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    tensors = [path / name for name in sorted(manifest["files"]) if name.endswith(".safetensors")]
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError(f"{STATE} holds no object")
        return Checkpoint(
            step=manifest["step"],
            tensors={file.stem: read_tensors(file) for file in tensors},
            state=state,
            recipe=(path / RECIPE).read_text(encoding="utf-8"),
            data=(path / DATA).read_text(encoding="utf-8"),
            record=(path / RECORD).read_text(encoding="utf-8"),
        )
    except (OSError, ValueError, RecursionError) as error:  # changed since, or before it was hashed
        raise UserError(f"{path}: expected a checkpoint, found a damaged file ({error}).") from None


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the model's weights and buffers in the checkpoint at `path`, by name."""
    return shapes_of(path / "model.safetensors")


def steps_in(directory: Path) -> list[int]:
    """The steps that have a checkpoint folder, ascending; not checked."""
    if not directory.is_dir():
        return []
    matches = (_STEP_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match.group(1)) for match in matches if match)


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder.

    Raises:
        UserError: it has another name.
    """
    match = _STEP_NAME.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path}: expected a checkpoint's folder as it was written, step_00001234.")
    return int(match.group(1))


def newest_good(directory: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole and finite; every other one on the way is reported to `say`.

    None where the run has not saved any yet.

    Raises:
        UserError: it has, and none is whole.
    """
    steps = steps_in(directory)
    for step in reversed(steps):
        path = step_directory(directory, step)
        problems = faults_of(path)
        if not problems:
            return path
        for line in problems:
            say(line)
        say(f"{path} is passed over; looking for an older checkpoint.")
    if steps or (directory / BEST).exists():
        raise UserError(
            f"{directory}: expected a whole checkpoint, found {len(steps)} of which none is. Bring one back "
            "from a copy of the run, or begin again in another --run-dir; nothing here was changed."
        )
    return None


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: after which step, and its monitored metric."""

    step: int
    metric: str
    value: float


def write_best(directory: Path, best: Best) -> None:
    """Name the best checkpoint in best.json, for people and scripts."""
    write_text(directory / BEST, json.dumps(asdict(best)))


def known_bests(directory: Path) -> list[Best]:
    """What may be the best checkpoint, newest first: as the checkpoints' states and best.json have it.

    A checkpoint and its being the best appear in one step, with the checkpoint's folder: best.json may be one
    save behind it, or damaged.
    """
    found = {}
    for step in steps_in(directory):
        best = _best_as_of(step_directory(directory, step))
        if best is not None:
            found[best.step] = best
    try:
        pointed = _as_best(json.loads((directory / BEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        pointed = None
    if pointed is not None:
        found.setdefault(pointed.step, pointed)
    return [found[step] for step in sorted(found, reverse=True)]


def _best_as_of(path: Path) -> Best | None:
    """The best one when the checkpoint at `path` was written."""
    state = _read_state(path)
    return None if state is None else _as_best(state.get("best"))


def task_bests_as_of(path: Path) -> dict[str, Best]:
    """By task the best one when the checkpoint at `path` was written; none where these are not kept."""
    state = _read_state(path)
    monitor = None if state is None else state.get("monitor")
    found = monitor.get("task_bests") if isinstance(monitor, dict) else None
    bests = {task: _as_best(best) for task, best in found.items()} if isinstance(found, dict) else {}
    return {task: best for task, best in bests.items() if best is not None}


def _as_best(value: object) -> Best | None:
    """What JSON says of the best one; None where it says nothing, or something odd."""
    if not isinstance(value, dict) or value.keys() != {"step", "metric", "value"}:
        return None
    step, metric, number = value["step"], value["metric"], value["value"]
    if isinstance(step, bool) or not isinstance(step, int) or not isinstance(metric, str):
        return None
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    return Best(step, metric, float(number))


def _read_state(path: Path) -> dict[str, Any] | None:
    """state.json of a checkpoint; None if that file is not what was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if sha256_of(path / STATE) != manifest["files"][STATE]["sha256"]:
            return None
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return state


def best_checkpoint(directory: Path, say: Callable[[str], None]) -> Path | None:
    """The folder of the best checkpoint that is whole; None where there is none.

    Every one passed over is reported to `say`.
    """
    for best in known_bests(directory):
        path = step_directory(directory, best.step)
        problems = faults_of(path)
        if not problems:
            return path
        for line in problems:
            say(line)
        say(f"{path}: the best checkpoint is damaged.")
    return None


def prune(directory: Path, keep_last: int, whole: Callable[[Path], bool], newest: int) -> None:
    """Delete all but the newest `keep_last` checkpoints, the best as of each, and leftovers of torn writes.

    The best are also those of every task, where the run keeps them.

    Counted are those that are `whole`, up to step `newest`, which was written just now: a damaged one, or a
    later one that a resume has passed over, never takes the place of a good one.
    """
    paths = {step: step_directory(directory, step) for step in steps_in(directory) if step <= newest}
    counted = list(islice((step for step in sorted(paths, reverse=True) if whole(paths[step])), keep_last))
    bests = [*known_bests(directory)[:1], *(_best_as_of(paths[step]) for step in counted)]
    kept = {*counted, *(best.step for best in bests if best is not None)}
    kept |= {best.step for step in counted for best in task_bests_as_of(paths[step]).values()}
    for step, path in paths.items():
        if step not in kept:
            # Renamed first: a deletion cut short must not leave a folder that looks like a checkpoint.
            doomed = directory / f".{path.name}.deleted"
            os.rename(path, doomed)
            shutil.rmtree(doomed)
    for leftover in [*directory.glob(".step_*.deleted"), *directory.glob(".step_*.tmp")]:
        shutil.rmtree(leftover, ignore_errors=True)


class CheckpointWriter:
    """Writes checkpoints of rank 0 in the background, one at a time, from host copies.

    A failure is raised at the next `submit` or `finish`, never lost.
    """

    def __init__(self, directory: Path, keep_last: int) -> None:
        self.directory = directory
        self._keep_last = keep_last
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.newest = 0
        """The step of the newest checkpoint that is on disk; 0 before there is one."""
        self._whole: set[Path] = set()
        """Checkpoints that this process has written or checked."""

    def submit(self, checkpoint: Checkpoint, best: Best | None = None) -> None:
        """Queue `checkpoint`; `best` is the best one so far, this one included.

        Waits for the write before it: at most one host copy is kept besides the new one.
        """
        self.finish()
        self._pending = self._pool.submit(self._write, checkpoint, best)

    def _write(self, checkpoint: Checkpoint, best: Best | None) -> None:
        if not self.directory.parent.is_dir():  # not made again: what was in it would be lost unnoticed
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.directory.parent))
        state = checkpoint.state | {"best": None if best is None else asdict(best)}
        self._whole.add(write_checkpoint(self.directory, replace(checkpoint, state=state)))
        self.newest = checkpoint.step
        if best is not None:
            write_best(self.directory, best)
        prune(self.directory, self._keep_last, self._is_whole, checkpoint.step)

    def _is_whole(self, path: Path) -> bool:
        if path not in self._whole and not faults_of(path):
            self._whole.add(path)
        return path in self._whole

    def finish(self) -> None:
        """Wait until the queued checkpoint is on disk.

        Raises:
            UserError: the disk is full, or the run folder cannot be written or is gone.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except OSError as error:
            raise UserError(unwritable(self.directory.parent, error)) from error
