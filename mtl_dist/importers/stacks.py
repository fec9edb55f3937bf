"""Time-course stacks: multi-page TIFFs, one sample per frame, masks as stacks, values from a table.

Frames of one stack look alike, so a stack is in one split, never in two.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from mtl_dist.data.images import extension_of
from mtl_dist.data.manifest import Manifest
from mtl_dist.data.shards import check_task_names
from mtl_dist.errors import UserError
from mtl_dist.importers.frames import chosen_frames
from mtl_dist.importers.jobs import Record, TaskSource, run_jobs
from mtl_dist.importers.packing import STANDARD, PackOptions, Progress, pack, refuse_existing, silent
from mtl_dist.importers.sources import Source, Tree
from mtl_dist.importers.splitting import (
    DEFAULT_FRACTIONS,
    SPLIT_NAMES,
    split_by_fractions,
    split_name,
    unique_keys,
)
from mtl_dist.importers.stack_table import NO_TABLE, StackTable, read_stack_table
from mtl_dist.importers.stack_time import TimeTask
from mtl_dist.importers.summary import listed
from mtl_dist.importers.tables import Row, read_labels
from mtl_dist.importers.tiff import Bounds, Stack, StackPage, open_stack, percentiles
from mtl_dist.kinds.classification import Classification
from mtl_dist.kinds.kind import Label
from mtl_dist.kinds.regression import Regression
from mtl_dist.kinds.segmentation import Segmentation
from mtl_dist.kinds.words import ClassNames, Declared, LabelError

FOLDER = "folder"
"""In place of a column: the folder that a stack is in names its class."""

_WORTH_PROCESSES = 256 * 2**20


@dataclass(frozen=True, eq=False)
class FrameStack:
    """One stack: its name, its path in the tree, its file, the masks' files by task, the frames to take."""

    name: str
    path: str
    source: Source
    masks: Mapping[str, Source]
    frames: list[int]
    num_frames: int
    frame_bytes: int


def prepare_stacks(
    src: Path,
    out: Path,
    *,
    stacks: str | None = None,
    table: Path | None = None,
    classification: Mapping[str, str] = {},
    regression: Mapping[str, str] = {},
    segmentation: Mapping[str, str] = {},
    classes: Mapping[str, ClassNames] = {},
    units: Mapping[str, str] = {},
    frames: str = "all",
    time: TimeTask | None = None,
    normalise: tuple[float, float] | None = None,
    split: str | Sequence[float] | Mapping[str, str] | None = None,
    options: PackOptions = STANDARD,
    progress: Progress = silent,
) -> Manifest:
    """Prepare a dataset from the stacks in a directory or a zip, a sample for each frame that is taken.

    stacks          which files are stacks, as `stack_*.tif`: what stands for * is the stack's name.
                    Without it every TIFF that is no mask; its name is the file's stem
    table           values by stack, or by stack and page: columns `stack` (or `file`) and `page` (or `frame`,
                    from 0)
    classification  by task a column of the table, or `folder`: the folder that the stack is in
    regression      by task a column of the table
    segmentation    by task the files of its masks, as `mask_*.tif`: the stack's name stands for *
    frames          `all`, `every:N`, `A:B` (from A up to before B), or pages such as `first,last`
    time            a regression task of the time of each frame
    normalise       two percentiles of a stack's values, by channel, that become 0 and 255 of 8 bits
    split           a column of the table, fractions, or stacks by split; without it the column `split`, else
                    folders named train, val and test, else 0.8, 0.1, 0.1 of the stacks by class

    Raises:
        UserError: a stack, mask, column, frame or split that is not there or does not fit; a stack in two
            splits; or what `pack` refuses.
    """
    refuse_existing(out)
    _check_tasks(
        [*classification, *regression, *segmentation, *([time.task] if time else [])], classes, units
    )
    tree = Tree(src)
    found = _find_stacks(tree, stacks, segmentation, frames)
    rows = NO_TABLE if table is None else read_stack_table(table, src)
    by_stack = {stack.name: rows.rows_of(stack.name, stack.path, stack.num_frames) for stack in found}
    rows.check_used([(stack.name, stack.path) for stack in found])
    rows.check_columns([c for c in (*classification.values(), *regression.values()) if c != FOLDER])

    samples = [(stack, frame) for stack in found for frame in stack.frames]
    cells = [by_stack[stack.name](frame) for stack, frame in samples]
    tasks, labels = _scalar_tasks(samples, cells, classification, regression, classes, units)
    notes = [f"frames of {len(found)} stacks: {frames}"]
    if time is not None:
        tasks[time.task] = TaskSource(Regression.name, unit=units.get(time.task, "hours"))
        class_names = {task: tasks[task].classes for task in classification}
        labels[time.task], early = time.values(
            [frame for _, frame in samples], cells, class_names, labels, rows.columns
        )
        if early:
            notes.append(f"{time.task}: {early} frames are before their onset, with values below 0")
    for task in segmentation:
        tasks[task] = _mask_task(task, classes.get(task))
    bounds = _bounds(found, normalise, options)
    if normalise is not None:
        notes.append(f"values of each stack from percentile {normalise[0]:g} to {normalise[1]:g} made 8 bits")

    split_of = _splits(found, samples, cells, rows, split, labels, classification, options.seed, notes)
    records = _records(samples, labels, bounds, split_of)
    return pack(records, out, tasks, src.resolve().stem, notes, replace(options, verify=False), progress)


def _check_tasks(names: Sequence[str], classes: Mapping[str, ClassNames], units: Mapping[str, str]) -> None:
    """Refuse no task, a name that stands twice or cannot be one, and options of tasks that are not there."""
    if not names:
        raise UserError("tasks: expected at least one task, found none. Example: --regression hours=hours")
    if len(set(names)) < len(names):
        raise UserError(f"tasks: expected each name once, found {', '.join(names)}.")
    check_task_names(names)
    for option, given in (("--classes", classes), ("--unit", units)):
        for task in given:
            if task not in names:
                raise UserError(f"{option}: expected one of the tasks {', '.join(names)}, found {task!r}.")


def _records(
    samples: Sequence[tuple[FrameStack, int]],
    labels: Mapping[str, Sequence[Label | None]],
    bounds: Mapping[str, Bounds],
    split_of: Mapping[str, str],
) -> dict[str, list[Record]]:
    """The record of each frame, by split."""
    pages = [f"{PurePosixPath(stack.path).with_suffix('')}_{frame:05d}.tif" for stack, frame in samples]
    records: dict[str, list[Record]] = {}
    for i, ((stack, frame), key) in enumerate(zip(samples, unique_keys(pages), strict=True)):
        values = {task: label for task, column in labels.items() if (label := column[i]) is not None}
        masks = {
            task: StackPage(source, frame, stack.frame_bytes, is_mask=True)
            for task, source in stack.masks.items()
        }
        page = StackPage(stack.source, frame, stack.frame_bytes, bounds.get(stack.name))
        records.setdefault(split_of[stack.name], []).append(Record(key, page, values, masks))
    return records


def _find_stacks(
    tree: Tree, pattern: str | None, segmentation: Mapping[str, str], frames: str
) -> list[FrameStack]:
    """The stacks of the tree with their masks, opened once to see what they hold."""
    tiffs = [path for path in tree.files if extension_of(path) == "tif"]
    mask_paths = {
        task: _by_name(tree, tiffs, wanted, f"--segmentation {task}") for task, wanted in segmentation.items()
    }
    taken = {path for paths in mask_paths.values() for path in paths.values()}
    if pattern is not None:
        paths = _by_name(tree, tiffs, pattern, "--stacks")
    else:
        rest = [path for path in tiffs if path not in taken]
        paths = {PurePosixPath(path).stem: path for path in rest}
        if len(paths) < len(rest):
            paths = {str(PurePosixPath(path).with_suffix("")): path for path in rest}
    if not paths:
        raise UserError(f"{tree}: expected TIFF stacks, found none among {len(tree.files)} files.")
    found = []
    for name, path in paths.items():
        source = tree.source(path)
        stack = open_stack(source)
        masks = {}
        for task, of_task in mask_paths.items():
            if name in of_task:
                masks[task] = tree.source(of_task[name])
                _check_mask(open_stack(masks[task]), stack, masks[task], source)
        chosen = chosen_frames(frames, stack.num_frames, str(source))
        size = stack.frame(chosen[0]).nbytes
        found.append(FrameStack(name, path, source, masks, chosen, stack.num_frames, size))
    for task, of_task in mask_paths.items():
        if not set(of_task) & set(paths):
            raise UserError(
                f"--segmentation {task}: expected masks of the stacks {listed(list(paths))}, found those of "
                f"{listed(list(of_task))}. What stands for * must be the same."
            )
    return found


def _by_name(tree: Tree, tiffs: Sequence[str], pattern: str, option: str) -> dict[str, str]:
    """The files of a pattern such as `stack_*.tif` by what stands for the star."""
    if pattern.count("*") != 1:
        raise UserError(f"{option}: expected one * in the pattern, found {pattern!r}. Example: 'stack_*.tif'")
    regular = re.compile(
        r"(?:.*/)?" + re.escape(pattern).replace(r"\*", "(?P<name>[^/]*)").replace(r"\?", "[^/]")
    )
    found: dict[str, str] = {}
    for path in tiffs:
        match = regular.fullmatch(path)
        if match is None:
            continue
        if match["name"] in found:
            raise UserError(
                f"{option}: expected one file for each name, found {found[match['name']]} and {path}. "
                "Give a longer pattern."
            )
        found[match["name"]] = path
    if not found:
        raise UserError(
            f"{option}: expected files like {pattern!r} in {tree}, found {listed(tiffs) or 'no TIFF'}."
        )
    return found


def _check_mask(mask: Stack, stack: Stack, mask_source: Source, source: Source) -> None:
    if mask.num_frames != stack.num_frames:
        raise UserError(
            f"{mask_source}: expected {stack.num_frames} pages, as {source} has, found {mask.num_frames}."
        )


def _mask_task(task: str, classes: ClassNames | None) -> TaskSource:
    declared = Declared(classes)
    try:
        info = Segmentation().declare(task, declared)
    except LabelError as error:
        raise UserError(f"classes of {task!r}: {error}") from None
    return TaskSource(info.kind, info.classes, mask_values=declared.class_values)


def _scalar_tasks(
    samples: Sequence[tuple[FrameStack, int]],
    cells: Sequence[Row],
    classification: Mapping[str, str],
    regression: Mapping[str, str],
    classes: Mapping[str, ClassNames],
    units: Mapping[str, str],
) -> tuple[dict[str, TaskSource], dict[str, Sequence[Label | None]]]:
    """The tasks with values from the table or from folders, and the label of each sample."""
    tasks: dict[str, TaskSource] = {}
    labels: dict[str, Sequence[Label | None]] = {}
    for task, column in classification.items():
        rows = cells
        if column == FOLDER:
            rows = [Row(stack.path, {FOLDER: PurePosixPath(stack.path).parent.name}) for stack, _ in samples]
            if any(not row.cells[FOLDER] for row in rows):
                raise UserError(
                    f"--classification {task}: expected stacks in folders, found one beside them."
                )
        names, labels[task] = read_labels(Classification.name, rows, column, Declared(classes.get(task)))
        tasks[task] = TaskSource(Classification.name, names)
    for task, column in regression.items():
        _, labels[task] = read_labels(Regression.name, cells, column, Declared())
        tasks[task] = TaskSource(Regression.name, unit=units.get(task, ""))
    return tasks, labels


@dataclass(frozen=True, eq=False)
class _PercentileJob:
    source: Source
    frames: list[int]
    low: float
    high: float


def _percentiles_of(job: _PercentileJob, tick: Callable[[], None]) -> Bounds:
    return percentiles(job.source, job.frames, job.low, job.high)


def _bounds(
    found: Sequence[FrameStack], normalise: tuple[float, float] | None, options: PackOptions
) -> dict[str, Bounds]:
    """The bounds of each stack's values, found in several processes where there is much to read."""
    if normalise is None:
        return {}
    low, high = normalise
    if not 0 <= low < high <= 100:
        raise UserError(f"--normalise: expected two percentiles from 0 to 100, found {low:g},{high:g}.")
    size = sum(len(stack.frames) * stack.frame_bytes for stack in found)
    workers = options.workers or (len(os.sched_getaffinity(0)) if size > _WORTH_PROCESSES else 1)
    jobs = [_PercentileJob(stack.source, stack.frames, low, high) for stack in found]
    results = run_jobs(_percentiles_of, jobs, workers, lambda done: None)
    return {stack.name: bounds for stack, bounds in zip(found, results, strict=True)}


def _splits(
    found: Sequence[FrameStack],
    samples: Sequence[tuple[FrameStack, int]],
    cells: Sequence[Row],
    table: StackTable,
    split: str | Sequence[float] | Mapping[str, str] | None,
    labels: Mapping[str, Sequence[Label | None]],
    classification: Mapping[str, str],
    seed: int,
    notes: list[str],
) -> dict[str, str]:
    """The split of each stack, by the first rule that applies (see `prepare_stacks`)."""
    if split is None and "split" in table.columns:
        split = "split"
    if isinstance(split, str):
        return _splits_of_column(samples, cells, table, split)
    if isinstance(split, Mapping):
        return _splits_by_name(found, split)
    if split is None:
        folders = {s.name: _split_folder(s.path) for s in found}
        if all(folders.values()):
            notes.append("splits taken from the folders of the stacks")
            return folders
    fractions = DEFAULT_FRACTIONS if split is None else split
    first = next(iter(classification), None)
    strata: dict[str, str] = {stack.name: "" for stack in found}
    if first is not None:
        for (stack, _), label in zip(samples, labels[first], strict=True):
            strata[stack.name] = str(label)  # of its last frame: that of all, where the class is the stack's
    names = [stack.name for stack in found]
    splits = split_by_fractions(names, [strata[name] for name in names], fractions, seed)
    shares = ", ".join(f"{fraction:g}" for fraction in fractions)
    notes.append(f"{len(names)} stacks split into {shares} with seed {seed}")
    return dict(zip(names, splits, strict=True))


def _splits_of_column(
    samples: Sequence[tuple[FrameStack, int]], cells: Sequence[Row], table: StackTable, column: str
) -> dict[str, str]:
    table.check_columns([column])
    splits: dict[str, tuple[str, str]] = {}
    for (stack, frame), row in zip(samples, cells, strict=True):
        name = split_name(str(row.cells[column]))
        if not re.fullmatch(r"[a-z0-9_]+", name):
            raise UserError(
                f"{row.where}, column {column!r}: expected a split for every frame of {stack.path}, found "
                f"{name or 'nothing'!r}."
            )
        before, where = splits.setdefault(stack.name, (name, f"page {frame}"))
        if before != name:
            raise UserError(
                f"{stack.path}: expected all its frames in one split, found {before} for {where} and {name} "
                f"for page {frame}. Frames of one stack look alike: put the whole stack into one."
            )
    return {stack: name for stack, (name, _) in splits.items()}


def _splits_by_name(found: Sequence[FrameStack], wanted: Mapping[str, str]) -> dict[str, str]:
    """`{"sw": "val"}`: the named stacks in their splits, the others in train."""
    names = [stack.name for stack in found]
    for name in wanted:
        if name not in names:
            raise UserError(f"--split: expected one of the stacks {listed(names)}, found {name!r}.")
    return {name: wanted.get(name, "train") for name in names}


def _split_folder(path: str) -> str:
    names = [split_name(part) for part in PurePosixPath(path).parts[:-1]]
    return next((name for name in reversed(names) if name in SPLIT_NAMES), "")
