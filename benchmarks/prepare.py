"""Preparing photographs, verified and not, beside another version of the package where one is given.

What is measured is the whole of `mtl prepare folders` in one process but for its imports: a small folder is
prepared first. It is processor time, user and system; versions and ways take turns, each in a process of its
own.
"""

from __future__ import annotations

import os
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from rich.console import Console

from benchmarks.loader import jpegs_in
from benchmarks.tables import Findings, Row
from mtl_dist.errors import UserError

_FEW = 16
_CLASSES = 10
_WAYS = {"every JPEG verified": "--verify", "not verified": "--no-verify"}
_PREPARE = """
import contextlib, io, sys, time
from mtl_dist.cli import app

def prepare(source, out):
    try:
        app(["prepare", "folders", source, out, "--task", "it", "--workers", "1", sys.argv[1]], "mtl")
    except SystemExit as end:
        assert not end.code, end.code

with contextlib.redirect_stdout(io.StringIO()):
    prepare(sys.argv[2] + "/few", sys.argv[3] + "/few")
    began = time.process_time()
    prepare(sys.argv[2] + "/many", sys.argv[3] + "/many")
    took = time.process_time() - began
print(took)
"""


def bench_prepare(images: Path, num_images: int, beside: Path | None, repeats: int) -> None:
    """Measure, and print a table.

    Args:
        images: a folder or a .zip file of JPEGs, repeated to `num_images`, each with a comment of its own.
        beside: another checkout of the package.

    Raises:
        UserError: there are no JPEGs, or no package in `beside`.
    """
    photos = list(jpegs_in(images))
    if not photos:
        raise UserError(f"{images}: expected JPEGs, found none.")
    if beside is not None and not (beside / "mtl_dist" / "cli.py").is_file():
        raise UserError(f"--beside: expected a checkout of mtl_dist, found none in {beside}.")
    here = Path(__file__).resolve().parents[1]
    checkouts = {"this version": here} | ({} if beside is None else {beside.name: beside.resolve()})
    seconds: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="mtl-bench-") as folder:
        _write_photos(Path(folder) / "few", photos, _FEW)
        _write_photos(Path(folder) / "many", photos, num_images)
        for _, way, version in product(range(repeats), _WAYS, checkouts):
            took = seconds_of(checkouts[version], _WAYS[way], Path(folder))
            seconds.setdefault((way, version), []).append(took)
    rows: list[Row] = [_row(way, version, num_images, seconds) for way, version in product(_WAYS, checkouts)]
    average = sum(map(len, photos)) / len(photos) / 1000
    title = f"preparing {num_images:,} JPEGs of {average:.0f} kB; medians of {repeats}"
    Findings(title, rows).show(Console())


def _row(way: str, version: str, number: int, seconds: dict[tuple[str, str], list[float]]) -> Row:
    took = seconds[way, version]
    reference = seconds[way, "this version"]
    speeds = [number / each for each in took]
    return {
        "": way,
        "version": version,
        "CPU us/image": 1e6 * statistics.median(took) / number,
        "images/s of a core": statistics.median(speeds),
        "fastest": max(speeds),
        "CPU time, of this version's": statistics.median(
            own / other for own, other in zip(took, reference, strict=True)
        ),
    }


def _write_photos(directory: Path, photos: Sequence[bytes], number: int) -> None:
    """So many JPEGs, no two of the same bytes, in the folders of some classes."""
    for count in range(number):
        photo, comment = photos[count % len(photos)], f"{count:08d}".encode()
        path = directory / f"class{count % _CLASSES}" / f"{count:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(comment)) + comment + photo[2:])


def seconds_of(checkout: Path, way: str, photos: Path) -> float:
    """What one preparation takes of a processor."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir=photos, prefix="out-") as out:
        arguments = [sys.executable, "-c", _PREPARE, way, str(photos), out]
        ended = subprocess.run(arguments, cwd=checkout, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"preparing failed in {checkout}:\n{ended.stderr}")
    return float(ended.stdout)
