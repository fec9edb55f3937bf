"""What one machine can say about itself: versions, GPUs, memory, files, CPUs, disks."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtl_dist.errors import UserError
from mtl_dist.plural import first_few, plural

Level = Literal["ok", "warning", "failure"]

GB = 10**9
PROBE_BYTES = 64 << 20
"""What is written to measure a disk."""

SPIN_S = 0.5
MOST_SPINNERS = 16
MOST_DATASETS = 20
_CHANNELS = 4


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, what was found, and, unless all is well, what to do."""

    name: str
    level: Level
    found: str
    advice: str = ""


def local_checks(folders: dict[str, Path]) -> list[Check]:
    """All checks of this machine; `folders` are those that runs write to or read from, by what they hold."""
    checks = [
        python(),
        *packages(),
        *gpus(),
        torchvision_ops(),
        shared_memory(),
        open_files(),
    ]
    checks.append(cpus())
    for name, folder in folders.items():
        checks += disk(name, folder)
    if "data" in folders:
        checks += datasets(folders["data"])
    return checks


# -- datasets ---------------------------------------------------------------------------------------------


def datasets(folder: Path) -> Iterator[Check]:
    """What the pixels of each dataset below `folder` are like, by which images may be normalised."""
    from mtl_dist.data.manifest import MANIFEST_NAME, read_manifest

    for path in sorted(folder.glob(f"*/{MANIFEST_NAME}"))[:MOST_DATASETS]:
        name = f"{path.parent}: pixels"
        try:
            manifest = read_manifest(path.parent)
        except UserError as error:
            yield Check(name, "warning", str(error), "Prepare it again.")
            continue
        about = f"{plural(manifest.channels, 'channel')} of {manifest.image_dtype}"
        if manifest.pixels is None:
            advice = "Prepare it again: images that are not 8-bit RGB are normalised by what is measured."
            yield Check(name, "warning", f"{about}, not measured", advice)
            continue
        pixels = manifest.pixels
        columns = (pixels.mean, pixels.std, pixels.minimum, pixels.maximum)
        each = [
            f"{mean:.4g} +- {std:.4g} ({low:.4g} to {high:.4g})"
            for mean, std, low, high in zip(*columns, strict=True)
        ]
        found = f"{about}, mean +- deviation (range): {first_few(each, _CHANNELS)}"
        constant = [channel for channel, std in enumerate(pixels.std) if std == 0]
        if constant:
            yield Check(name, "warning", found, f"Channel {constant[0]} has one value: look at the images.")
        else:
            yield Check(name, "ok", found)


# -- software ---------------------------------------------------------------------------------------------


def python() -> Check:
    return Check("Python", "ok", f"{platform.python_version()} at {sys.executable}")


def packages() -> Iterator[Check]:
    """This package and whatever it requires, against the lower bounds it states."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("mtl-dist") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Check("mtl-dist", "warning", "not installed", "Install it: pip install -e . in its folder.")
        return
    found = {"mtl-dist": importlib.metadata.version("mtl-dist")}
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(requirement.name, "failure", "missing", f"pip install '{requirement}'")
            continue
        found[requirement.name] = version
        if not requirement.specifier.contains(version, prereleases=True):
            yield Check(requirement.name, "failure", version, f"pip install '{requirement}'")
    shown = ("mtl-dist", "torch", "torchvision", "accelerate", "deepspeed", "submitit")
    yield Check("packages", "ok", ", ".join(f"{name} {found[name]}" for name in shown if name in found))


def torchvision_ops() -> Check:
    """Whether torchvision's compiled operators fit the installed torch: they fail only when first used."""
    import torch
    import torchvision

    try:
        torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    except (RuntimeError, NotImplementedError) as error:
        advice = "Install torch and torchvision from the same place, in one command."
        return Check("torchvision's operators", "failure", str(error).splitlines()[0], advice)
    return Check("torchvision's operators", "ok", "fit this torch")


def gpus() -> Iterator[Check]:
    """The GPUs that torch can use, and GPUs of the machine that it can't."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found = f"{torch.cuda.get_device_name(index)}, {free / GB:.0f} of {total / GB:.0f} GB free"
            if free < total / 2:
                yield Check(f"GPU {index}", "warning", found, "Somebody uses it: see nvidia-smi.")
            else:
                yield Check(f"GPU {index}", "ok", found)
    elif shutil.which("nvidia-smi"):
        found = f"nvidia-smi is here, but torch {torch.__version__} finds no GPU"
        yield Check(
            "GPUs", "warning", found, "Compare the driver with torch's CUDA; look at CUDA_VISIBLE_DEVICES."
        )
    else:
        yield Check("GPUs", "ok", "none: training runs on CPUs, over gloo")


# -- limits -----------------------------------------------------------------------------------------------


def shared_memory(path: Path = Path("/dev/shm")) -> Check:
    """Room for the batches that data workers hand over."""
    if not path.is_dir():
        return Check("shared memory", "ok", "not a separate file system here")
    free = shutil.disk_usage(path).free
    found = f"{free / GB:.1f} GB free in {path}"
    if free < GB:
        advice = "Give the container more (docker --shm-size=8g), or set data.workers=0."
        return Check("shared memory", "failure" if free < GB / 10 else "warning", found, advice)
    return Check("shared memory", "ok", found)


def open_files() -> Check:
    """Whether many shards and workers may be open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 4096:
        limit = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
        advice = f"ulimit -n 65536 (in a profile's setup lines); the hard limit is {limit}."
        return Check("open files", "warning", f"at most {soft}", advice)
    return Check("open files", "ok", "unlimited" if soft == resource.RLIM_INFINITY else f"at most {soft}")


def cpus() -> Check:
    """The CPUs that this process can really use, against those that it may and those that Slurm promised."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    promised = os.environ.get("SLURM_CPUS_PER_TASK")
    spinners = min(allowed, MOST_SPINNERS)
    measured = usable_cpus(spinners)
    found = f"{measured:.1f} of {spinners} busy at once, {allowed} allowed"
    if promised is not None:
        found += f", {promised} promised by Slurm"
        if allowed < int(promised):
            advice = "srun gives one CPU unless asked otherwise: mtl submit passes cpus_per_task on."
            return Check("CPUs", "failure", found, advice)
    if measured < 0.7 * spinners:
        return Check(
            "CPUs", "warning", found, "A quota or a neighbour takes the rest; use fewer data workers."
        )
    return Check("CPUs", "ok", found)


def usable_cpus(num_processes: int) -> float:
    """How many CPUs that many busy processes get, measured."""
    reader, writer = os.pipe()
    children = []
    for _ in range(num_processes):
        child = os.fork()
        if child == 0:
            _spin(writer)
        children.append(child)
    os.close(writer)
    for child in children:
        os.waitpid(child, 0)
    with os.fdopen(reader) as shares:
        return sum(float(line) for line in shares)


def _spin(writer: int) -> None:
    """A forked child: keeps one CPU busy, reports what fraction of it there was, and ends at once."""
    start, used = time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - start) < SPIN_S:
        math.factorial(200)
    os.write(writer, f"{(time.process_time() - used) / elapsed}\n".encode())
    os._exit(0)


# -- disks ------------------------------------------------------------------------------------------------


def disk(name: str, folder: Path) -> Iterator[Check]:
    """Free space and write speed where `folder` is, or would be; a full disk is not written to."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    found = f"{free / GB:.0f} GB free in {place}"
    if free < 10 * GB:
        level: Level = "failure" if free < GB else "warning"
        yield Check(f"{name}: space", level, found, "Make room, or choose another folder.")
    else:
        yield Check(f"{name}: space", "ok", found)
    if free > 2 * PROBE_BYTES:
        yield disk_writing(name, place)


def disk_writing(name: str, folder: Path) -> Check:
    """The speed with which checkpoints reach the disk."""
    try:
        speed = write_speed(folder)
    except OSError as error:
        return Check(f"{name}: writing", "failure", str(error), "Choose a folder that you may write to.")
    found = f"{speed / 1e6:.0f} MB/s, synced"
    if speed < 50e6:
        advice = "Checkpoints will be slow: choose a faster disk, or fewer of them (train.checkpoint_every)."
        return Check(f"{name}: writing", "warning", found, advice)
    return Check(f"{name}: writing", "ok", found)


def write_speed(folder: Path) -> float:
    """Bytes per second that reach the disk, by one file of zeros and a sync."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".mtl-doctor-") as file:
        block = os.urandom(1 << 20)
        start = time.perf_counter()
        for _ in range(PROBE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return PROBE_BYTES / (time.perf_counter() - start)
