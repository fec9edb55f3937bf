"""The one road from source records to a prepared dataset, whatever the importer.

    records of each split -> plan of shards -> one job per shard, in parallel -> index, manifest, rename

Everything is written into `.<name>.partial` beside the dataset's place, and renamed when the manifest
stands: a directory under the final name is complete. A bad input removes the partial directory. A full disk
or an interruption leaves it, and the next run over the same records goes on from its finished shards. The
bytes depend on the records alone, not on the number of workers or on interruptions.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mtl_dist.data.columns import label_columns, labels_path
from mtl_dist.data.content_hashes import content_hashes_path
from mtl_dist.data.manifest import Manifest, SplitInfo, write_manifest
from mtl_dist.data.shards import (
    check_task_names,
    index_path,
    save_index,
)
from mtl_dist.durable import Locked, locked, sync_directory
from mtl_dist.errors import UserError
from mtl_dist.importers.account import SAMPLE, UNREADABLE, Account
from mtl_dist.importers.jobs import (
    FINISHED,
    Record,
    ShardJob,
    ShardResult,
    TaskSource,
    check_skipped,
    finished_result,
    pack_shard,
    run_jobs,
)
from mtl_dist.importers.options import STANDARD, PackOptions
from mtl_dist.importers.orientation import check_readings
from mtl_dist.importers.pixel_counts import pixel_facts
from mtl_dist.importers.splitting import SPLIT_NAMES, shuffled
from mtl_dist.importers.summary import (
    PackedSplit,
    check_conventions,
    duplicate_notes,
    image_format,
    image_notes,
    label_counts,
    label_notes,
    placed_notes,
    task_info,
    unlabelled_notes,
)
from mtl_dist.kinds.kind import Label
from mtl_dist.plural import plural

_WORTH_A_WORKER = 64 * 2**20
SPOOL = ".spool"
"""The file, beside the shards being written, of images that an importer gave as bytes."""

Progress = Callable[[int, int], None]
"""Called with the samples done and the samples there are."""


def silent(done: int, total: int) -> None:
    """The progress callback that shows nothing."""


def refuse_existing(out: Path) -> None:
    """Refuse a place that is taken, before any work is done.

    Raises:
        UserError: `out` is a file, or a directory with something in it.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        what = "a directory that is not empty" if out.is_dir() else "a file"
        raise UserError(
            f"{out}: expected a new or empty directory, found {what}. Remove it or choose another."
        )


def pack(
    splits: Mapping[str, Sequence[Record]],
    out: Path,
    tasks: Mapping[str, TaskSource],
    name: str,
    notes: Sequence[str] = (),
    options: PackOptions = STANDARD,
    progress: Progress = silent,
) -> Manifest:
    """Write the records of each split as the dataset `out` called `name`, and return its manifest.

    Raises:
        UserError: `out` is taken, a task has no labels at all, a file is unreadable or does not fit its
            task, or the disk is full. Nothing is left under the final name.
    """
    refuse_existing(out)
    with partial_directory(out) as partial:
        return pack_into(partial, splits, tasks, name, notes, options, progress, Account())


def pack_into(
    partial: Partial,
    splits: Mapping[str, Sequence[Record]],
    tasks: Mapping[str, TaskSource],
    name: str,
    notes: Sequence[str],
    options: PackOptions,
    progress: Progress,
    account: Account,
) -> Manifest:
    """`pack` in a partial directory that is held already; `account` is what was found so far."""
    partial.packing = True
    _check(splits, tasks)
    jobs = _plan(splits, partial.directory, tasks, options)
    results = _run(jobs, options, progress)
    manifest = _finish(
        splits, jobs, results, partial.directory, tasks, notes, name, account, options.masks_as
    )
    shutil.rmtree(partial.directory / FINISHED)
    (partial.directory / SPOOL).unlink(missing_ok=True)
    sync_directory(partial.directory)
    os.rename(partial.directory, partial.out)  # also over an empty directory
    sync_directory(partial.out.parent)
    return manifest


def _check(splits: Mapping[str, Sequence[Record]], tasks: Mapping[str, TaskSource]) -> None:
    check_task_names(tasks)
    for split, records in splits.items():
        if not records:
            raise UserError(f"split {split!r}: expected samples, found none. Leave the split out or fill it.")
    records = [record for split in splits.values() for record in split]
    for name in tasks:
        if not any(name in record.labels or name in record.masks for record in records):
            raise UserError(
                f"task {name!r}: expected labels, found none in {plural(len(records), 'sample')}."
            )


@dataclass
class Partial:
    """The directory that becomes `out`; once `packing` began, a bad input removes it."""

    out: Path
    directory: Path
    packing: bool = False


@contextmanager
def partial_directory(out: Path) -> Iterator[Partial]:
    """The directory to write into: locked, removed after a bad input, kept after a full disk.

    An input that is bad before packing began leaves the shards that an interrupted preparation finished.
    """
    partial = out.parent / f".{out.name}.partial"
    with ExitStack() as stack:
        try:
            (partial / FINISHED).mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(partial, wait=False))
        except Locked:
            raise UserError(f"{out}: another `mtl prepare` is writing it. Wait for it to end.") from None
        except OSError as error:
            raise UserError(
                f"{out}: expected a place that can be written, found: {error.strerror}."
            ) from None
        held = Partial(out, partial)
        try:
            yield held
        except UserError:
            if held.packing or not any((partial / FINISHED).iterdir()):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk is full" if full else f"writing failed ({error.strerror or error})"
            raise UserError(f"{out}: {reason}. {_to_go_on(partial)}") from None
        except BrokenProcessPool:
            raise UserError(
                f"{out}: a worker process was killed, perhaps for want of memory. {_to_go_on(partial)}"
            ) from None


def _to_go_on(partial: Path) -> str:
    return f"Finished shards are kept in {partial}: run again to go on, or remove that directory."


def _plan(
    splits: Mapping[str, Sequence[Record]],
    partial: Path,
    tasks: Mapping[str, TaskSource],
    options: PackOptions,
) -> list[ShardJob]:
    """Cut the records of each split, in stored order, into shards by number and by source bytes."""
    jobs: list[ShardJob] = []
    training = _training_split(splits)
    for split in _usual_order(splits):
        records = splits[split]
        number, chunk, size = 0, list[Record](), 0
        for position in shuffled([record.key for record in records], options.seed):
            chunk.append(records[position])
            size += _record_size(chunk[-1])
            if len(chunk) >= options.shard_samples or size >= options.shard_bytes:
                jobs.append(_job(partial, split, number, chunk, tasks, options, split == training))
                number, chunk, size = number + 1, [], 0
        if chunk:
            jobs.append(_job(partial, split, number, chunk, tasks, options, split == training))
    return jobs


def _job(
    partial: Path,
    split: str,
    number: int,
    records: list[Record],
    tasks: Mapping[str, TaskSource],
    options: PackOptions,
    measured: bool,
) -> ShardJob:
    return ShardJob(
        partial,
        split,
        number,
        records,
        tasks,
        options.verify,
        options.max_skipped,
        measured,
        options.conversion,
        options.masks_as,
    )


def _record_size(record: Record) -> int:
    sources = (record.image, *record.masks.values())
    return sum(len(source) if isinstance(source, bytes) else source.size for source in sources)


def _usual_order(splits: Mapping[str, object]) -> list[str]:
    usual = [name for name in SPLIT_NAMES if name in splits]
    return usual + sorted(set(splits) - set(usual))


def _training_split(splits: Mapping[str, object]) -> str:
    """The split whose labels and pixels are described."""
    return "train" if "train" in splits else _usual_order(splits)[0]


def _run(jobs: Sequence[ShardJob], options: PackOptions, progress: Progress) -> list[ShardResult]:
    """The result of every job, in order; those that an interrupted run finished are taken over."""
    results = {job: result for job in jobs if (result := finished_result(job)) is not None}
    total = sum(len(job.records) for job in jobs)
    before = sum(len(job.records) for job in results)
    progress(before, total)
    _remove_all_but(jobs[0].directory, results)
    todo = [job for job in jobs if job not in results]
    skipped = [reason for result in results.values() for reason in result.skipped.values()]
    workers = options.workers or _workers_for(todo)
    new_results = run_jobs(pack_shard, todo, workers, lambda done: progress(before + done, total))
    for job, result in zip(todo, new_results, strict=True):
        results[job] = result
        skipped += result.skipped.values()
        check_skipped(skipped, options.max_skipped)
    return [results[job] for job in jobs]


def _workers_for(jobs: Sequence[ShardJob]) -> int:
    """One process per core, but none for less than 64 MiB: each takes seconds to start."""
    size = sum(_record_size(record) for job in jobs for record in job.records)
    return min(len(os.sched_getaffinity(0)), 1 + size // _WORTH_A_WORKER)


def _remove_all_but(directory: Path, finished: Collection[ShardJob]) -> None:
    """Remove what an interrupted run left that is no finished shard of this one."""
    keep = (
        {directory / FINISHED, directory / SPOOL}
        | {job.shard for job in finished}
        | {job.result for job in finished}
    )
    for path in [*directory.iterdir(), *(directory / FINISHED).iterdir()]:
        if path not in keep:
            path.unlink()


def _finish(
    splits: Mapping[str, Sequence[Record]],
    jobs: Sequence[ShardJob],
    results: Sequence[ShardResult],
    directory: Path,
    tasks: Mapping[str, TaskSource],
    notes: Sequence[str],
    name: str,
    account: Account,
    masks_as: str,
) -> Manifest:
    """Write indexes and manifest from the results of all jobs."""
    packed = {split: _packed_split(split, jobs, results) for split in _usual_order(splits)}
    for task, source in tasks.items():
        check_conventions(task, source, results)
    readings = [check_readings(task, [r.fits.get(task, {}) for r in results], masks_as) for task in tasks]
    labels = {
        split: {task: label_counts(task, source, content) for task, source in tasks.items()}
        for split, content in packed.items()
    }
    training = _training_split(packed)
    channels, dtype = image_format([result.image_kinds for result in results])
    skipped = [reason for result in results for reason in result.skipped.values()]
    hashes = {split: content.content_hashes for split, content in packed.items()}
    keys = {split: [record.key for record in content.records] for split, content in packed.items()}
    account.count("images", SAMPLE, sum(len(content.records) for content in packed.values()))
    if skipped:
        account.count("images", UNREADABLE, len(skipped))
    manifest = Manifest(
        name=name,
        channels=channels,
        image_dtype=dtype,
        tasks={
            task: task_info(task, source, packed[training], labels[training][task])
            for task, source in tasks.items()
        },
        splits={
            split: SplitInfo(
                num_samples=len(content.records),
                shards=tuple(result.info for result in content.results),
                labels=labels[split],
            )
            for split, content in packed.items()
        },
        notes=(
            *notes,
            *image_notes([result.oddities for result in results], skipped),
            *(reading for reading in readings if reading),
            *unlabelled_notes(results),
            *placed_notes([result.noted for result in results]),
            *label_notes(tasks, labels, training),
            *duplicate_notes(hashes, keys),
        ),
        content_hashes="hashes",
        account=account.totals(),
        pixels=pixel_facts([state for result in results for state in result.pixels], channels),
    )
    for split, content in packed.items():
        save_index(index_path(directory, split), np.concatenate([result.rows for result in content.results]))
        save_index(content_hashes_path(directory, split), hashes[split])
        columns = {task: [record.labels.get(task) for record in content.records] for task in tasks}
        save_index(
            labels_path(directory, split), label_columns(manifest.tasks, columns, len(content.records))
        )
    return write_manifest(directory, manifest)


def _packed_split(split: str, jobs: Sequence[ShardJob], results: Sequence[ShardResult]) -> PackedSplit:
    """The records of a split that were stored; a shard of which none was is removed."""
    records: list[Record] = []
    kept: list[ShardResult] = []
    for job, result in zip(jobs, results, strict=True):
        if job.split == split and result.info.num_samples:
            unlabelled = {task: set(positions) for task, positions in result.unlabelled.items()}
            records += [
                _as_stored(
                    record,
                    [task for task, positions in unlabelled.items() if i in positions],
                    {task: labels[i] for task, labels in result.placed.items()},
                )
                for i, record in enumerate(job.records)
                if i not in result.skipped
            ]
            kept.append(result)
        elif job.split == split:
            job.shard.unlink()
    if not records:
        raise UserError(f"split {split!r}: expected samples, found none that is readable.")
    return PackedSplit(records, kept)


def _as_stored(record: Record, unlabelled: Sequence[str], placed: Mapping[str, Label | None]) -> Record:
    """The record without the maps that have no label in them, and with the labels that are `placed`."""
    if unlabelled:
        masks = {name: mask for name, mask in record.masks.items() if name not in unlabelled}
        record = replace(record, masks=masks)
    if placed:
        labels = {name: label for name, label in {**record.labels, **placed}.items() if label is not None}
        record = replace(record, labels=labels)
    return record
