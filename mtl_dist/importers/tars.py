"""Index and manifest over WebDataset tars that someone else wrote; the tars stay where and as they are.

The manifest names the tars by path. Labels stand in them in any form (`.cls`, a value in `.json`, `.txt`),
so they are read once, now, and kept as label columns.
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mtl_dist.data.columns import label_columns, labels_path
from mtl_dist.data.content_hashes import HASH_DTYPE, content_hashes_path
from mtl_dist.data.manifest import MANIFEST_NAME, LabelCounts, Manifest, ShardInfo, SplitInfo, write_manifest
from mtl_dist.data.remote import Location, Place, Url, location
from mtl_dist.data.shards import check_task_names, index_path, save_index
from mtl_dist.errors import UserError
from mtl_dist.importers.jobs import check_skipped, run_jobs
from mtl_dist.importers.options import STANDARD, PackOptions
from mtl_dist.importers.packing import Progress, silent
from mtl_dist.importers.splitting import SPLIT_NAMES, split_name
from mtl_dist.importers.summary import (
    duplicate_notes,
    image_format,
    image_notes,
    label_notes,
    listed,
    with_facts,
)
from mtl_dist.importers.tables import Row, read_labels
from mtl_dist.importers.tar_scan import LabelField, TarFacts, TarScan, image_extensions, scan_tar
from mtl_dist.kinds.classification import Classification
from mtl_dist.kinds.kind import Label, MapKind, ScalarKind
from mtl_dist.kinds.multilabel import Multilabel
from mtl_dist.kinds.registry import kind_of
from mtl_dist.kinds.regression import Regression
from mtl_dist.kinds.segmentation import Segmentation
from mtl_dist.kinds.vocabulary import MISSING, ClassNames, Declared, LabelError
from mtl_dist.plural import plural
from mtl_dist.specs import TaskInfo

_SPLIT_IN_NAME = re.compile(r"(?:^|[^a-z])(train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?)(?![a-z])", re.I)
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class FieldMapping:
    """Which fields of a sample are which tasks: `cls`, `txt`, `json:age`; a mask by its extension.

    `image` is the image's extension, or several with commas; the usual ones without it. `classes` names the
    classes of a task; without it they are those that are found. `separator` stands between the classes in
    the text of a multilabel task; `missing` and `strict` are as `Declared` has them.
    """

    image: str | None = None
    classification: Mapping[str, str] = field(default_factory=dict)
    multilabel: Mapping[str, str] = field(default_factory=dict)
    regression: Mapping[str, str] = field(default_factory=dict)
    segmentation: Mapping[str, str] = field(default_factory=dict)
    classes: Mapping[str, ClassNames] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    separator: str = "|"
    missing: Sequence[str] = MISSING
    strict: bool = False

    @property
    def tasks(self) -> dict[str, TaskInfo]:
        """The tasks, by name, with the classes that are known beforehand."""
        tasks: dict[str, TaskInfo] = {}
        kinds = (
            (Classification.name, self.classification),
            (Multilabel.name, self.multilabel),
            (Regression.name, self.regression),
            (Segmentation.name, self.segmentation),
        )
        for kind, fields in kinds:
            for task in fields:
                if task in tasks:
                    raise UserError(f"tasks: expected each name once, found {task!r} twice.")
                try:
                    tasks[task] = kind_of(kind).declare(task, self.declared(task))
                except LabelError as error:
                    raise UserError(f"classes of {task!r}: {error}") from None
        return tasks

    def declared(self, task: str) -> Declared:
        """What is said of a task beforehand."""
        return Declared(
            self.classes.get(task),
            self.units.get(task, ""),
            self.separator,
            missing=self.missing,
            strict=self.strict,
        )

    def checked_tasks(self) -> dict[str, TaskInfo]:
        """The tasks.

        Raises:
            UserError: none, a bad or repeated name, or classes or a unit of no task.
        """
        tasks = self.tasks
        if not tasks:
            raise UserError(
                "tasks: expected at least one task, found none. Example: --classification label=cls"
            )
        check_task_names(tasks)
        for option, given in (("--classes", self.classes), ("--unit", self.units)):
            for task in given:
                if task not in tasks:
                    raise UserError(
                        f"{option}: expected one of the tasks {', '.join(tasks)}, found {task!r}."
                    )
        return tasks


def index_tars(
    tars: Sequence[str],
    out: Path,
    mapping: FieldMapping,
    *,
    split: str | None = None,
    options: PackOptions = STANDARD,
    progress: Progress = silent,
) -> Manifest:
    """Write index, label columns and manifest for `tars` into the directory `out`; return the manifest.

    `tars` are files, directories of them, names with {000..099}, or URLs of these. All are of `split`, or
    of the split that their folder or file name names, or of "train". `progress` counts tars.

    Raises:
        UserError: a tar, field or label that is not there or not understood, or `out` holds a dataset.
    """
    tasks = mapping.checked_tasks()
    if (out / MANIFEST_NAME).exists():
        raise UserError(f"{out}: expected a directory without a dataset, found one. Choose another.")
    splits = _splits(_tars(tars), split)
    scans = [_scan(path, mapping, tasks, options.verify) for paths in splits.values() for path in paths]
    progress(0, len(scans))
    workers = options.workers or len(os.sched_getaffinity(0))
    found: list[TarFacts] = []
    for facts in run_jobs(scan_tar, scans, workers, lambda done: progress(done, len(scans))):
        found.append(facts)
        check_skipped([reason for each in found for reason in each.skipped], options.max_skipped)
    return _write(out, mapping, tasks, splits, found)


# ---------------------------------------------------------------- which tars
def _tars(arguments: Sequence[str]) -> list[Location]:
    """The tars that the arguments name, in order, as absolute paths or URLs."""
    places: list[Location] = []
    for argument in arguments:
        place = location(argument)
        if isinstance(place, Url):
            names = _expanded(argument)
            is_folder = names == [argument] and not argument.endswith(".tar")
            places += _inside(place, place.matching("*.tar")) if is_folder else map(Url, names)
        elif place.is_dir():
            places += _inside(place, sorted(place.glob("*.tar")) or sorted(place.glob("*/*.tar")))
        else:
            places += [Path(name) for name in _expanded(argument)]
    places = [place.absolute() if isinstance(place, Path) else place for place in places]
    for place in places:
        if isinstance(place, Path) and not place.is_file():
            raise UserError(f"{place}: expected a tar, found no such file.")
    twice = [str(place) for place, count in Counter(places).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]}: expected each tar once, found it twice.")
    return places


def _inside(folder: Location, tars: Sequence[Place]) -> Sequence[Place]:
    if not tars:
        raise UserError(f"{folder}: expected tars in the directory, found none.")
    return tars


def _expanded(name: str) -> list[str]:
    """The names that a name with {000..099} stands for."""
    match = _BRACES.search(name)
    if match is None:
        return [name]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    names = [f"{name[: match.start()]}{n:0{len(first)}d}{name[match.end() :]}" for n in numbers]
    return [full for name in names for full in _expanded(name)]


def _splits(paths: Sequence[Location], split: str | None) -> dict[str, list[Location]]:
    """The tars of each split, the usual splits first."""
    names: list[str | None]
    if split is not None:
        names = [split] * len(paths)
    else:
        names = [_split_of(path) for path in paths]
        if not any(names):
            names = [SPLIT_NAMES[0]] * len(paths)
    splits: dict[str, list[Location]] = {}
    for path, name in zip(paths, names, strict=True):
        if name is None:
            raise UserError(
                f"{path}: expected a split in its name as others have, found none. Say --split NAME."
            )
        splits.setdefault(name, []).append(path)
    usual = [name for name in SPLIT_NAMES if name in splits]
    return {name: splits[name] for name in usual + sorted(set(splits) - set(usual))}


def _split_of(path: Location) -> str | None:
    """The split that a part of the tar's name names, or else the whole of its folder's name."""
    parts = str(path).split("/")
    match = _SPLIT_IN_NAME.search(parts[-1].removesuffix(".tar"))
    if match:
        return split_name(match[1])
    folder = split_name(parts[-2])
    return folder if folder in SPLIT_NAMES else None


def _scan(path: Location, mapping: FieldMapping, tasks: Mapping[str, TaskInfo], verify: bool) -> TarScan:
    scalar = {**mapping.classification, **mapping.multilabel, **mapping.regression}
    return TarScan(
        path=path,
        images=image_extensions(mapping.image),
        labels={task: LabelField.parse(text) for task, text in scalar.items()},
        masks={task: text.lower().lstrip(".") for task, text in mapping.segmentation.items()},
        task_infos=tasks,
        verify=verify,
        values={task: mapping.declared(task).class_values for task in mapping.segmentation},
    )


# ---------------------------------------------------------------- what is in them
def _write(
    out: Path,
    mapping: FieldMapping,
    tasks: Mapping[str, TaskInfo],
    splits: Mapping[str, Sequence[Location]],
    found: Sequence[TarFacts],
) -> Manifest:
    """Write everything that the scans found, the manifest last."""
    labels, tasks, said = _labels(mapping, tasks, found)
    hidden = [name for facts in found for name in facts.hidden]
    if hidden:
        said.append(
            f"members left out, hidden or left behind by an operating system: {len(hidden)} "
            f"({listed(hidden)})"
        )
    by_path = {facts.info.path: facts for facts in found}
    split_infos: dict[str, SplitInfo] = {}
    values: dict[str, dict[str, Sequence[Label | None]]] = {}
    files: dict[Path, np.ndarray] = {}
    hashes: dict[str, np.ndarray] = {}
    keys: dict[str, list[str]] = {}
    start = 0
    for split, paths in splits.items():
        of_split = [by_path[str(path)] for path in paths]
        rows = np.concatenate([facts.rows for facts in of_split])
        if len(rows) == 0:
            raise UserError(f"split {split!r}: expected samples, found none in {plural(len(paths), 'tar')}.")
        columns = {task: column[start : start + len(rows)] for task, column in labels.items()}
        start += len(rows)
        for bit, task in enumerate(tasks):
            rows["labelled"] |= _labelled(task, rows, columns).astype(np.uint64) << np.uint64(bit)
        hashes[split] = np.frombuffer(b"".join(facts.content_hashes for facts in of_split), HASH_DTYPE)
        keys[split] = [key for facts in of_split for key in facts.keys]
        files[index_path(out, split)] = rows
        files[content_hashes_path(out, split)] = hashes[split]
        files[labels_path(out, split)] = label_columns(tasks, columns, len(rows))
        counts = {task: _counts(task, info, rows, columns, of_split) for task, info in tasks.items()}
        shards = tuple(_beside(out, facts.info) for facts in of_split if facts.info.num_samples)
        split_infos[split] = SplitInfo(len(rows), shards, counts)
        values[split] = columns
    for task in tasks:
        if not any(info.labels[task].present for info in split_infos.values()):
            raise UserError(f"task {task!r}: expected labels, found none in {start} samples.")
    training = "train" if "train" in split_infos else next(iter(split_infos))
    channels, dtype = image_format([facts.image_kinds for facts in found])
    skipped = [reason for facts in found for reason in facts.skipped]
    manifest = Manifest(
        name=out.absolute().name,
        channels=channels,
        image_dtype=dtype,
        tasks={
            task: with_facts(
                info,
                split_infos[training].labels[task],
                _content(task, info, values[training], [by_path[str(path)] for path in splits[training]]),
            )
            for task, info in tasks.items()
        },
        splits=split_infos,
        notes=(
            *said,
            *image_notes([facts.oddities for facts in found], skipped),
            *label_notes(tasks, {name: info.labels for name, info in split_infos.items()}, training),
            *duplicate_notes(hashes, keys),
        ),
        labels="columns",
        content_hashes="hashes",
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, array in files.items():
            save_index(path, array)
        write_manifest(out, manifest)
    except OSError as error:
        raise UserError(f"{out}: expected a place that can be written, found: {error.strerror}.") from None
    return manifest


def _labels(
    mapping: FieldMapping, tasks: Mapping[str, TaskInfo], found: Sequence[TarFacts]
) -> tuple[dict[str, Sequence[Label | None]], dict[str, TaskInfo], list[str]]:
    """Each task's labels over all tars in the order of the scans, the tasks with their classes, and notes."""
    labels: dict[str, Sequence[Label | None]] = {}
    notes: list[str] = []
    classes: dict[str, tuple[str, ...]] = {}
    for task, text in {**mapping.classification, **mapping.multilabel, **mapping.regression}.items():
        rows = [
            Row(f"{facts.info.path}, sample {key}", {text: cell})
            for facts in found
            for key, cell in zip(facts.keys, facts.cells[task], strict=True)
        ]
        parsed = read_labels(tasks[task].kind, rows, text, mapping.declared(task))
        classes[task], labels[task] = parsed.classes, parsed.labels
        notes += [f"{task}: {note}" for note in parsed.notes]
    tasks = {task: replace(info, classes=classes.get(task, info.classes)) for task, info in tasks.items()}
    return labels, tasks, notes


def _labelled(task: str, rows: np.ndarray, columns: Mapping[str, Sequence[Label | None]]) -> np.ndarray:
    if task in columns:
        return np.array([label is not None for label in columns[task]], dtype=bool)
    has: np.ndarray = rows[f"{task}_size"] > 0
    return has


def _counts(
    task: str,
    info: TaskInfo,
    rows: np.ndarray,
    columns: Mapping[str, Sequence[Label | None]],
    found: Sequence[TarFacts],
) -> LabelCounts:
    """The labels of one task in one split."""
    present = int(_labelled(task, rows, columns).sum())
    kind = kind_of(info.kind)
    assert isinstance(kind, ScalarKind | MapKind)
    counts = kind.counts(_content(task, info, columns, found), info) if info.classes else ()
    return LabelCounts(present, len(rows) - present, counts)


def _content(
    task: str, info: TaskInfo, columns: Mapping[str, Sequence[Label | None]], found: Sequence[TarFacts]
) -> np.ndarray:
    """The column of a task's labels in one split, or the tally of its maps."""
    kind = kind_of(info.kind)
    if isinstance(kind, MapKind):
        return functools.reduce(kind.add, [facts.tallies[task] for facts in found])
    assert isinstance(kind, ScalarKind)
    return kind.encode(columns[task], info)


def _beside(out: Path, shard: ShardInfo) -> ShardInfo:
    """The shard by its path below `out`, if it lies there: a folder that moves as a whole stays a dataset."""
    if "://" in shard.path:
        return shard
    path = Path(shard.path)
    root = out.absolute()
    return replace(shard, path=str(path.relative_to(root))) if path.is_relative_to(root) else shard
