"""Stacks: multi-page TIFFs, one sample per page, masks as stacks, values from a table.

Pages of one stack look alike, so a stack is a group: it is in one split, never in two.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar

from mtl_dist.data.images import extension_of
from mtl_dist.errors import UserError
from mtl_dist.importers.account import IMAGE, MASK, SAMPLE, TABLE
from mtl_dist.importers.compute import Computed, with_computed
from mtl_dist.importers.frames import chosen_frames
from mtl_dist.importers.importer import Importer
from mtl_dist.importers.jobs import Record, TaskSource, run_jobs
from mtl_dist.importers.options import Help
from mtl_dist.importers.road import split_word
from mtl_dist.importers.sources import Source, Tree
from mtl_dist.importers.split_columns import SPLIT
from mtl_dist.importers.splitting import splits_of_folders
from mtl_dist.importers.stack_table import NO_TABLE, read_stack_table
from mtl_dist.importers.summary import listed
from mtl_dist.importers.table_files import Row
from mtl_dist.importers.tiff import Bounds, Stack, StackPage, open_stack, percentiles
from mtl_dist.importers.wanted import (
    Classes,
    Facts,
    Labels,
    Missing,
    Separator,
    Strict,
    Units,
    wanted_tasks,
)
from mtl_dist.kinds.kind import Label
from mtl_dist.kinds.vocabulary import MISSING
from mtl_dist.plural import plural

STACK, PAGE, FOLDER = "stack", "page", "folder"
"""Columns of every page besides those of the table: its stack's name, its number, its stack's folder."""

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


class Stacks(Importer):
    """Multi-page TIFFs: one sample per page, masks as stacks, values from a table. A stack is in one split.

    \b
      mtl prepare stacks cells/ data/cells --stacks 'stack_*.tif' --table frames.csv \\
          --regression count=cell_count --segmentation cell='mask_*.tif' --split 'val=sw'
      mtl prepare stacks wells/ data/wells --classification treated=folder \\
          --compute 'hours=page * 0.5 - (4 if folder == "treated" else 0)' --regression hours=hours \\
          --frames every:4 --normalise 1,99

    Besides those of the table there are the columns stack, page and folder.
    """

    verify: ClassVar[bool] = False

    def __init__(
        self,
        source: Annotated[Path, Help("A directory or a zip of TIFF stacks.", "SRC")],
        stacks: Annotated[
            str,
            Help(
                "Which files, as 'stack_*.tif': * is the name. Without it all that are no masks.", "PATTERN"
            ),
        ] = "",
        table: Annotated[
            Path | None,
            Help("Values by stack, or by stack and page (from 0): columns stack, page and others.", "FILE"),
        ] = None,
        labels: Labels = {},  # noqa: B006 (never changed)
        classes: Classes = {},  # noqa: B006
        units: Units = {},  # noqa: B006
        facts: Facts = {},  # noqa: B006
        separator: Separator = "|",
        missing: Missing = MISSING,
        strict: Strict = False,
        compute: Computed = {},  # noqa: B006
        frames: Annotated[
            str, Help("all, every:N, A:B (B left out), or pages as first,10,last.", "WHICH")
        ] = "all",
        normalise: Annotated[
            tuple[float, float] | None,
            Help("Percentiles of a stack's values that become 0 and 255, such as 1,99.", "LOW,HIGH"),
        ] = None,
    ) -> None:
        if normalise is not None and not 0 <= normalise[0] < normalise[1] <= 100:
            raise UserError(
                f"--normalise: expected two percentiles from 0 to 100, found {normalise[0]:g},"
                f"{normalise[1]:g}."
            )
        self._wanted = wanted_tasks(labels, classes, units, separator, missing, strict, facts)
        self._source, self._tree = source, Tree(source)
        self._frames, self._normalise = frames, normalise
        self._notes: list[str] = []
        masks = {task.task: task.column for task in self._wanted if task.is_map}
        self._stacks = _find_stacks(self._tree, stacks or None, masks, frames)
        self._table = NO_TABLE if table is None else read_stack_table(table, source)
        self._table.check_used([(stack.name, stack.path) for stack in self._stacks])
        by_stack = {s.name: self._table.rows_of(s.name, s.path, s.num_frames) for s in self._stacks}
        self._samples = [(stack, frame) for stack in self._stacks for frame in stack.frames]
        rows = [_with_place(by_stack[stack.name](frame), stack, frame) for stack, frame in self._samples]
        self._rows = with_computed(rows, compute)
        self._columns = tuple(dict.fromkeys((*self._table.columns, STACK, PAGE, FOLDER, *compute)))
        where = self._table.where or "the stacks, without --table"
        wanted = [
            name for task in self._wanted if not task.is_map for name in task.columns(self._columns, where)
        ]
        if FOLDER in wanted and any(not row.cells[FOLDER] for row in self._rows):
            raise UserError("column 'folder': expected stacks in folders, found one beside them.")

    @property
    def name(self) -> str:
        return self._source.resolve().stem

    def tasks(self) -> Mapping[str, TaskSource]:
        tasks: dict[str, TaskSource] = {}
        self._labels: dict[str, Sequence[Label | None]] = {}
        for task in self._wanted:
            if task.is_map:
                tasks[task.task] = task.map_task()
            else:
                tasks[task.task], self._labels[task.task], notes = task.read(self._rows)
                self._notes += notes
        self._enter()
        return tasks

    def records(self) -> Iterator[Record]:
        bounds = self._bounds()
        splits = self._splits()
        for i, (stack, frame) in enumerate(self._samples):
            labels = {
                task: label for task, column in self._labels.items() if (label := column[i]) is not None
            }
            masks = {
                task: StackPage(source, frame, stack.frame_bytes, is_mask=True)
                for task, source in stack.masks.items()
            }
            page = StackPage(stack.source, frame, stack.frame_bytes, bounds.get(stack.name))
            path = f"{PurePosixPath(stack.path).with_suffix('')}_{frame:05d}.tif"
            yield Record("", page, labels, masks, splits[i], stack.name, path, self._rows[i].cells)

    def notes(self) -> Iterator[str]:
        yield from self._notes
        yield f"frames of {plural(len(self._stacks), 'stack')}: {self._frames}"
        if self._normalise is not None:
            low, high = self._normalise
            yield f"values of each stack from percentile {low:g} to {high:g} made 8 bits"

    def _enter(self) -> None:
        """Account for the files and the pages."""
        account, tree = self.account, self._tree
        tree.enter(account)
        taken = "left out: not among the frames that are taken"
        for stack in self._stacks:
            account.became("files", stack.path, IMAGE)
            for mask in stack.masks.values():
                account.became("files", tree.inside(mask), MASK)
            account.count("pages", SAMPLE, len(stack.frames))
            if stack.num_frames > len(stack.frames):
                account.count("pages", taken, stack.num_frames - len(stack.frames))
        for path in self._table.files:
            inside = os.path.relpath(path, tree.root)
            if inside in tree.files:
                account.became("files", inside, TABLE)
        account.rest("files", "left out: neither a stack nor a mask of one")

    def _bounds(self) -> dict[str, Bounds]:
        """The bounds of each stack's values, found in several processes where there is much to read."""
        if self._normalise is None:
            return {}
        low, high = self._normalise
        size = sum(len(stack.frames) * stack.frame_bytes for stack in self._stacks)
        workers = len(os.sched_getaffinity(0)) if size > _WORTH_PROCESSES else 1
        jobs = [_PercentileJob(stack.source, stack.frames, low, high) for stack in self._stacks]
        results = run_jobs(_percentiles_of, jobs, workers, lambda done: None)
        return {stack.name: bounds for stack, bounds in zip(self._stacks, results, strict=True)}

    def _splits(self) -> list[str]:
        """The word for each page's split that the data has, or nothing."""
        if SPLIT in self._table.columns:
            return [
                split_word(row.cells[SPLIT], f"{row.where}, column {SPLIT!r}, for {stack.path}")
                for row, (stack, _) in zip(self._rows, self._samples, strict=True)
            ]
        return splits_of_folders([stack.path for stack, _ in self._samples])


def _with_place(row: Row, stack: FrameStack, frame: int) -> Row:
    """The row with the columns that every page has, where the table has none of that name."""
    place = {STACK: stack.name, PAGE: str(frame), FOLDER: PurePosixPath(stack.path).parent.name}
    return Row(row.where, {**place, **row.cells})


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
        raise UserError(f"{tree}: expected TIFF stacks, found none among {plural(len(tree.files), 'file')}.")
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
            f"{mask_source}: expected {plural(stack.num_frames, 'page')}, as {source} has, "
            f"found {mask.num_frames}."
        )


@dataclass(frozen=True, eq=False)
class _PercentileJob:
    source: Source
    frames: list[int]
    low: float
    high: float


def _percentiles_of(job: _PercentileJob, tick: Callable[[], None]) -> Bounds:
    return percentiles(job.source, job.frames, job.low, job.high)
