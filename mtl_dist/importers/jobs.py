"""One job per shard: read, check and write its records, in this process or in several.

A job depends on nothing but its records, so the bytes do not depend on who runs it. Its result is kept in
a small file beside the shard until the dataset is complete: an interrupted preparation goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict, dataclass, field
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mtl_dist.data.content_hashes import HASH_SIZE, content_hash
from mtl_dist.data.manifest import FORMAT_VERSION, ShardInfo
from mtl_dist.data.shards import TarShard, scan_shard, shard_name
from mtl_dist.durable import write_text
from mtl_dist.errors import UserError
from mtl_dist.importers.conversion import AS_IT_IS, Conversion
from mtl_dist.importers.shard_counts import ImageCounts, MapCounts, PlacedLabels, Unreadable
from mtl_dist.importers.sources import Readable
from mtl_dist.kinds.kind import Label
from mtl_dist.kinds.registry import kind_of, map_kind
from mtl_dist.plural import plural
from mtl_dist.specs import TaskInfo

Job = TypeVar("Job")
Result = TypeVar("Result")

FINISHED = ".finished"
"""The folder, beside the shards being written, that holds the results of the finished ones."""


@dataclass(frozen=True, slots=True)
class TaskSource:
    """What an importer knows of a task: its kind, class names, unit, and the value of each mask class.

    `facts` is what else its kind has to know.
    """

    kind: str
    classes: tuple[str, ...] = ()
    unit: str = ""
    mask_values: Mapping[int, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def info(self) -> TaskInfo:
        """The task before its labels are counted."""
        return TaskInfo(self.kind, self.classes, unit=self.unit, facts=self.facts)


@dataclass(frozen=True, slots=True)
class Record:
    """One sample before it is packed; `labels` and `masks` hold only the tasks that it has a label for.

    Of the rest a record may say what it knows. Without a `key` it gets one from its `path`, what it is called
    in the source. `split` is the one that the data puts it into; samples of one `group` are never divided
    between splits. `columns` are what `--group` and `--split` may name.
    """

    key: str
    image: Readable | bytes
    labels: Mapping[str, Label]
    masks: Mapping[str, Readable | bytes] = field(default_factory=dict)
    split: str = ""
    group: str = ""
    path: str = ""
    columns: Mapping[str, str | list[str]] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """What messages call it."""
        return self.path or self.key


@dataclass(frozen=True, eq=False)
class ShardJob:
    """The records of one shard, and how to treat them; of some splits the pixels are `measured`."""

    directory: Path
    split: str
    number: int
    records: Sequence[Record]
    tasks: Mapping[str, TaskSource]
    verify: bool
    max_skipped: int
    measured: bool = False
    conversion: Conversion = AS_IT_IS
    masks_as: str = ""

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each task, as the shard's writer wants it."""
        return {name: task.kind for name, task in self.tasks.items()}

    def map_counts(self) -> MapCounts:
        """What is found of the shard's maps, before the first."""
        kinds = {name: map_kind(kind) for name, kind in self.kinds.items() if kind_of(kind).is_map}
        task_infos = {name: self.tasks[name].info for name in kinds}
        values = {name: self.tasks[name].mask_values for name in kinds}
        return MapCounts(kinds, task_infos, values, self.masks_as)

    @property
    def shard(self) -> Path:
        """The tar that the job writes."""
        return self.directory / shard_name(self.split, self.number)

    @property
    def result(self) -> Path:
        """The file that says the job is done."""
        return self.directory / FINISHED / f"{self.shard.name}.json"


@dataclass
class ShardResult:
    """What a job found: index rows, the content hash of each stored image, and counts.

    `content_hashes` is one hexadecimal string, image after image. `skipped` holds the position of each
    record that was left out, and why. `image_kinds` maps "channels dtype" to an example and a number of
    images; `conventions` maps, per task of maps, how values were read to an example, and `tallies` is what is
    counted of them. `unlabelled` are, by task, the positions of records whose map has no labelled pixel;
    `fits` counts the maps of images turned by EXIF by the reading that their size allows. `pixels` are the
    states of PixelCounts. `placed` are, by task whose labels have a place in the image, those of all records
    as they are stored, and `noted` what is to be said of them.
    """

    info: ShardInfo
    rows: np.ndarray
    content_hashes: str
    skipped: dict[int, str] = field(default_factory=dict)
    image_kinds: dict[str, tuple[str, int]] = field(default_factory=dict)
    oddities: dict[str, int] = field(default_factory=dict)
    tallies: dict[str, list[float]] = field(default_factory=dict)
    conventions: dict[str, dict[str, str]] = field(default_factory=dict)
    unlabelled: dict[str, list[int]] = field(default_factory=dict)
    fits: dict[str, dict[str, tuple[str, int]]] = field(default_factory=dict)
    pixels: list[dict[str, Any]] = field(default_factory=list)
    placed: dict[str, list[Label | None]] = field(default_factory=dict)
    noted: dict[str, dict[str, int]] = field(default_factory=dict)


def pack_shard(job: ShardJob, tick: Callable[[], None]) -> ShardResult:
    """Write the shard of `job`, calling `tick` after each record.

    Raises:
        UserError: more unreadable files than may be skipped, a mask of another size than its image, or one
            with a value that is no class.
        OSError: the shard could not be written.
    """
    shard = TarShard(job.shard, job.kinds)
    images = ImageCounts(job.verify, job.measured, job.conversion)
    maps = job.map_counts()
    placed = PlacedLabels({name: task.info for name, task in job.tasks.items()}, job.masks_as)
    hashes: list[str] = []
    skipped: dict[int, str] = {}
    try:
        for position, record in enumerate(job.records):
            where = record.key if isinstance(record.image, bytes) else str(record.image)
            try:
                image, facts = images.read(position, where, record.image)
                masks = maps.read(position, record.key, record.masks, facts)
            except Unreadable as error:
                skipped[position] = str(error)
                check_skipped(list(skipped.values()), job.max_skipped)
                placed.leave_out()
                tick()
                continue
            labels = placed.beside(str(record.place), record.labels, facts)
            shard.write(record.key, image, facts.extension, labels, masks)
            hashes.append(content_hash(image).hex())
            images.add(str(record.place), facts)
            tick()
        info, rows = shard.close()
    except BaseException:
        shard.discard()
        raise
    result = ShardResult(
        info=info,
        rows=rows,
        content_hashes="".join(hashes),
        skipped=skipped,
        image_kinds=images.kinds,
        oddities=dict(images.oddities),
        tallies=maps.tallies(),
        conventions=maps.conventions,
        unlabelled=maps.unlabelled,
        fits=maps.fits | placed.fits,
        pixels=images.pixels(),
        placed=placed.labels,
        noted={name: dict(counts) for name, counts in placed.noted.items()},
    )
    _save_result(job, result)
    return result


def check_skipped(reasons: Sequence[str], max_skipped: int) -> None:
    """Stop once more files were left out than allowed.

    Raises:
        UserError: the first reason where nothing may be skipped, else the count and the last reason.
    """
    if len(reasons) <= max_skipped:
        return
    if max_skipped == 0:
        raise UserError(f"{reasons[0]} Fix or remove it, or allow some to be skipped (--max-skipped N).")
    raise UserError(
        f"{plural(len(reasons), 'unreadable file')}, where at most {max_skipped} may be skipped; "
        f"{reasons[-1]}"
    )


def _fingerprint(job: ShardJob) -> str:
    """What the bytes of a shard depend on."""
    how: list[object] = [FORMAT_VERSION, HASH_SIZE, job.split, job.number, job.verify]
    how += [job.measured, job.conversion, job.masks_as]
    fingerprint = hashlib.sha256(repr(how).encode())
    fingerprint.update(
        repr(
            [
                (name, task.kind, task.classes, dict(task.mask_values), dict(task.facts))
                for name, task in job.tasks.items()
            ]
        ).encode()
    )
    for record in job.records:
        fingerprint.update(
            repr((record.key, record.image, record.labels, record.masks)).encode("utf-8", "surrogateescape")
        )
    return fingerprint.hexdigest()


def _save_result(job: ShardJob, result: ShardResult) -> None:
    fields = {name: value for name, value in vars(result).items() if name != "rows"}
    write_text(
        job.result, json.dumps({"fingerprint": _fingerprint(job), **fields, "info": asdict(result.info)})
    )


def finished_result(job: ShardJob) -> ShardResult | None:
    """The result of a job that an earlier, interrupted preparation finished; None where none is whole."""
    if not job.result.is_file() or not job.shard.is_file():
        return None
    try:
        fields = json.loads(job.result.read_text(encoding="utf-8"))
        info = ShardInfo(**fields.pop("info"))
        skipped = {int(position): reason for position, reason in fields.pop("skipped").items()}
        is_of_this_job = fields.pop("fingerprint") == _fingerprint(job)
        if not is_of_this_job or job.shard.stat().st_size != info.num_bytes:
            return None
        return ShardResult(info=info, rows=scan_shard(job.shard, job.kinds), skipped=skipped, **fields)
    except (ValueError, KeyError, TypeError, AttributeError):  # a damaged file: the shard is written again
        return None


_ticks: Synchronized[int] | None = None


def _start_worker(ticks: Synchronized[int]) -> None:
    global _ticks
    _ticks = ticks
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process: only the caller's speaks
    threading.Thread(target=_end_with_the_caller, daemon=True).start()


def _end_with_the_caller() -> None:
    """End this process when the caller is killed: it would write on, beside the next run."""
    caller = multiprocessing.parent_process()
    assert caller is not None
    multiprocessing.connection.wait([caller.sentinel])
    os._exit(1)


def _tick() -> None:
    assert _ticks is not None
    with _ticks.get_lock():
        _ticks.value += 1


def _run_in_worker(work: Callable[[Job, Callable[[], None]], Result], job: Job) -> Result:
    return work(job, _tick)


def run_jobs(
    work: Callable[[Job, Callable[[], None]], Result],
    jobs: Sequence[Job],
    workers: int,
    progress: Callable[[int], None],
) -> Iterator[Result]:
    """The results of `work(job, tick)` for all jobs, in order; `progress` hears how many ticks so far."""
    if workers <= 1 or len(jobs) <= 1:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            progress(done)

        for job in jobs:
            yield work(job, tick)
        return

    # Not plain fork, which copies the caller's threads (progress bars, torch) in the midst of their work.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ticks = context.Value("Q", 0)
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (ticks,)) as pool:
        futures = [pool.submit(_run_in_worker, work, job) for job in jobs]
        try:
            for future in futures:
                yield _await(future, lambda: progress(ticks.value))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _await(future: Future[Result], report: Callable[[], None]) -> Result:
    while True:
        try:
            result = future.result(timeout=0.2)
        except FutureTimeoutError:
            report()
        else:
            report()
            return result
