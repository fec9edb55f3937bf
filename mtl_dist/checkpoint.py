"""Checkpoints: the full, engine-independent state of a run, whole or absent.

    checkpoints/
        step_00001234/
            model.safetensors       weights and buffers, balancer included, float32
            optimizer.safetensors   `<slot>/<parameter name>`
            ema.safetensors         the averaged weights, where the recipe asks for them
            state.json              step, position, monitor, sums of the running epoch
            recipe.yaml
            manifest.json           size and SHA-256 of every other file; written last
        best.json                   the step of the best one so far

A checkpoint is written under a temporary name, every file hashed and fsynced, the manifest last, and renamed.
It is read only if it is whole and every hash matches: one flipped byte in a tensor loads silently otherwise.
Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mtl_dist.durable import sha256_of, sync_directory, sync_file, write_text
from mtl_dist.errors import UserError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1

_STEP_NAME = re.compile(r"step_(\d{8,})")


@dataclass
class Checkpoint:
    """The state of a run after `step` optimizer steps, on the host.

    `tensors` maps a file's stem ("model", "optimizer", "ema") to its named tensors; `state` is plain JSON.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    recipe: str = field(default="", repr=False)


def step_directory(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def write_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` below `directory` and return its folder, which appears complete or not at all."""
    from safetensors.torch import save_file

    final = step_directory(directory, checkpoint.step)
    if final.exists():
        if not problems_of(final):
            return final
        shutil.rmtree(final)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, tensors in checkpoint.tensors.items():
        save_file(tensors, temporary / f"{name}.safetensors")
    (temporary / "state.json").write_text(json.dumps(checkpoint.state, indent=1), encoding="utf-8")
    (temporary / "recipe.yaml").write_text(checkpoint.recipe, encoding="utf-8")
    files = {}
    for path in sorted(temporary.iterdir()):
        sync_file(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = {
        "format": "mtl_dist checkpoint",
        "version": FORMAT_VERSION,
        "step": checkpoint.step,
        "files": files,
    }
    write_text(temporary / MANIFEST, json.dumps(manifest, indent=1))
    os.rename(temporary, final)
    sync_directory(directory)
    return final


def problems_of(path: Path) -> list[str]:
    """What is wrong with the checkpoint at `path`, one line each; empty when it is whole."""
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        return [f"{path}: expected a {MANIFEST}, found none: the checkpoint is not complete."]
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        version, files = manifest["version"], manifest["files"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        return [f"{manifest_path}: not a checkpoint manifest ({error})."]
    if version > FORMAT_VERSION:
        return [f"{path}: expected format version <= {FORMAT_VERSION}, found {version}. Upgrade mtl_dist."]
    problems = []
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{file}: expected {facts['bytes']} bytes, found no file.")
        elif file.stat().st_size != facts["bytes"]:
            problems.append(f"{file}: expected {facts['bytes']} bytes, found {file.stat().st_size}.")
        elif sha256_of(file) != facts["sha256"]:
            problems.append(f"{file}: its content does not match its SHA-256: the file was damaged.")
    return problems


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, after every size and hash was checked.

    Raises:
        UserError: it is incomplete, damaged, or of a newer format.
    """
    from safetensors.torch import load_file

    problems = problems_of(path)
    if problems:
        raise UserError("\n".join(problems))
    return Checkpoint(
        step=json.loads((path / MANIFEST).read_text(encoding="utf-8"))["step"],
        tensors={file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))},
        state=json.loads((path / "state.json").read_text(encoding="utf-8")),
        recipe=(path / "recipe.yaml").read_text(encoding="utf-8"),
    )


def steps_in(directory: Path) -> list[int]:
    """The steps that have a checkpoint folder, ascending; not checked."""
    if not directory.is_dir():
        return []
    matches = (_STEP_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match.group(1)) for match in matches if match)


def newest_good(directory: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; every damaged one passed over on the way is reported to `say`."""
    for step in reversed(steps_in(directory)):
        path = step_directory(directory, step)
        problems = problems_of(path)
        if not problems:
            return path
        for line in problems:
            say(line)
        say(f"{path} is passed over; looking for an older checkpoint.")
    return None


def write_best(directory: Path, step: int, metric: str, value: float) -> None:
    write_text(directory / "best.json", json.dumps({"step": step, "metric": metric, "value": value}))


def best_checkpoint(directory: Path) -> Path | None:
    """The folder of the best checkpoint, or None where no metric was monitored yet."""
    pointer = directory / "best.json"
    if not pointer.is_file():
        return None
    return step_directory(directory, json.loads(pointer.read_text(encoding="utf-8"))["step"])


def prune(directory: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and the best one, and leftovers of torn writes."""
    best = best_checkpoint(directory)
    for step in steps_in(directory)[:-keep_last]:
        path = step_directory(directory, step)
        if path != best:
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

    def submit(self, checkpoint: Checkpoint, best: tuple[str, float] | None = None) -> None:
        """Queue `checkpoint`; `best` = (metric, value) points best.json at it once it is whole.

        Waits for the write before it: at most one host copy is kept besides the new one.
        """
        self.finish()
        self._pending = self._pool.submit(self._write, checkpoint, best)

    def _write(self, checkpoint: Checkpoint, best: tuple[str, float] | None) -> None:
        write_checkpoint(self.directory, checkpoint)
        if best is not None:
            write_best(self.directory, checkpoint.step, *best)
        prune(self.directory, self._keep_last)

    def finish(self) -> None:
        """Wait until the queued checkpoint is on disk.

        Raises:
            UserError: the disk is full.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except OSError as error:
            raise UserError(
                f"{self.directory}: could not write a checkpoint ({error.strerror}). "
                "The older checkpoints are whole; free some space and start the run again."
            ) from error
