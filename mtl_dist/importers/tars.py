"""WebDataset tars that others wrote: they are indexed where they lie, and stay as they are.

The manifest names the tars by path. Labels stand in them in any form (`.cls`, a value in `.json`, `.txt`),
so they are read once, now, and kept as label columns.

    tars -> a scan of each, in parallel -> records -> splits (the road's) -> rows, columns, manifest
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np

from mtl_dist.data.columns import label_columns, labels_path
from mtl_dist.data.content_hashes import HASH_DTYPE, content_hashes_path
from mtl_dist.data.external import LabelField, expanded, image_extensions
from mtl_dist.data.images import UnreadableImage, examine_image
from mtl_dist.data.manifest import (
    MANIFEST_NAME,
    LabelCounts,
    Manifest,
    PixelFacts,
    ShardInfo,
    SplitInfo,
    write_manifest,
)
from mtl_dist.data.reader import SplitReader
from mtl_dist.data.remote import Location, Place, Url, location
from mtl_dist.data.shards import index_path, save_index
from mtl_dist.errors import UserError
from mtl_dist.importers.account import SAMPLE, UNREADABLE
from mtl_dist.importers.conversion import pixels_of
from mtl_dist.importers.importer import Importer
from mtl_dist.importers.jobs import Record, TaskSource, check_skipped, run_jobs
from mtl_dist.importers.options import STANDARD, Help, PackOptions, fractions_in, names_groups
from mtl_dist.importers.orientation import DISPLAYED
from mtl_dist.importers.packing import Progress, silent
from mtl_dist.importers.pixel_counts import PixelCounts, pixel_facts
from mtl_dist.importers.road import splits_of
from mtl_dist.importers.shard_counts import PlacedLabels
from mtl_dist.importers.splitting import SPLIT_NAMES, is_split_word, split_name
from mtl_dist.importers.summary import (
    duplicate_notes,
    image_format,
    image_notes,
    label_notes,
    listed,
    placed_notes,
    with_facts,
)
from mtl_dist.importers.table_files import Row
from mtl_dist.importers.tar_scan import TarFacts, TarScan, scan_tar
from mtl_dist.importers.wanted import Classes, Facts, Missing, Separator, Strict, Units, wanted_tasks
from mtl_dist.kinds.kind import Label, MapKind, ScalarKind
from mtl_dist.kinds.registry import kind_of
from mtl_dist.kinds.vocabulary import MISSING
from mtl_dist.plural import plural
from mtl_dist.specs import IGNORE, TaskInfo

_SPLIT_IN_NAME = re.compile(r"(?:^|[^a-z])(train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?)(?![a-z])", re.I)
_MEASURED = 1024
"""Of the training images at most so many are measured: they are read a second time."""


class Tars(Importer):
    """WebDataset tars that others wrote: they stay where they are, and OUT says what is in them.

    \b
      mtl index 'in1k/train-{000..146}.tar' data/in1k --image jpg --classification label=cls
      mtl index laion/ data/laion --multilabel tags=json:tags --regression score=json:meta.score
      mtl index web/ data/web --classification label=cls --split 0.9,0.1 --group json:patient

    A sample is what WebDataset takes for one: members with the same name up to the first dot. Splits are
    those that the tars' names or folders say, or made (`--split 0.9,0.1`, `--val`), or a field's
    (`--split json:fold`); `--split test` is that of all tars. Without any all is train.
    """

    repacks: ClassVar[bool] = False

    def __init__(
        self,
        source: Annotated[
            tuple[str, ...], Help("Tars, names with {000..099}, folders; also as URLs.", "TARS...")
        ],
        image: Annotated[
            tuple[str, ...], Help("What is the image, such as jpg or left.png.", "EXT,...")
        ] = (),
        labels: Annotated[
            dict[str, str],
            Help(
                "A task of any kind, from a field: cls, txt, json:breed, meta.json:dog.breed, seg.png; "
                "--KIND TASK=FIELD in short.",
                "KIND:TASK=FIELD",
                "label",
            ),
        ] = {},  # noqa: B006 (never changed)
        classes: Classes = {},  # noqa: B006
        units: Units = {},  # noqa: B006
        separator: Separator = "|",
        missing: Missing = MISSING,
        strict: Strict = False,
        facts: Facts = {},  # noqa: B006
    ) -> None:
        self._images = image_extensions(image)
        self._wanted = {
            task.task: task
            for task in wanted_tasks(labels, classes, units, separator, missing, strict, facts)
        }
        self._maps = [task for task in self._wanted.values() if task.is_map]
        self._scalars = [task for task in self._wanted.values() if not task.is_map]
        for task in self._scalars:
            if "," in task.column:
                raise UserError(
                    f"--{task.kind} {task.task}: expected one field, such as json:NAME, perhaps of a list, "
                    f"found {task.column}."
                )
        self.tars = _tars(source)
        self._notes: list[str] = []

    @property
    def stratify(self) -> str:
        return ""

    def scan(self, options: PackOptions, progress: Progress) -> None:
        """Read all tars, once.

        Raises:
            UserError: a tar that is not whole, a label that is none, or more samples left out than allowed.
        """
        task_infos = {task.task: task.map_task().info for task in self._maps}
        values = {task.task: task.map_task().mask_values for task in self._maps}
        self._columns = {text: LabelField.parse(text) for text in _fields_of(options)}
        scans = [
            TarScan(
                path=path,
                images=self._images,
                labels={task.task: LabelField.parse(task.column) for task in self._scalars},
                masks={task.task: task.column.lower().lstrip(".") for task in self._maps},
                task_infos=task_infos,
                verify=options.verify,
                values=values,
                columns=self._columns,
                places=frozenset(task.task for task in self._scalars if kind_of(task.kind).has_place),
            )
            for path in self.tars
        ]
        progress(0, len(scans))
        workers = options.workers or len(os.sched_getaffinity(0))
        self.found: list[TarFacts] = []
        for facts in run_jobs(scan_tar, scans, workers, lambda done: progress(done, len(scans))):
            self.found.append(facts)
            check_skipped([reason for each in self.found for reason in each.skipped], options.max_skipped)
        self._account()

    def tasks(self) -> Mapping[str, TaskSource]:
        """Each task; its labels are read by the way. `scan` comes first."""
        self.labels: dict[str, Sequence[Label | None]] = {}
        sources: dict[str, TaskSource] = {}
        for name, task in self._wanted.items():
            if task.is_map:
                sources[name] = task.map_task()
                continue
            rows = [
                Row(f"{facts.info.path}, sample {key}", {task.column: cell})
                for facts in self.found
                for key, cell in zip(facts.keys, facts.cells[name], strict=True)
            ]
            sources[name], self.labels[name], notes = task.read(rows)
            self._notes += notes
        self._place(sources)
        return sources

    def _place(self, sources: Mapping[str, TaskSource]) -> None:
        """Put the labels that have a place in their image beside it."""
        placed = PlacedLabels({name: source.info for name, source in sources.items()}, DISPLAYED)
        if not placed.labels:
            return
        at = 0
        for facts in self.found:
            for key, picture in zip(facts.keys, facts.pictures, strict=True):
                of_sample = {
                    task: self.labels[task][at] for task in placed.labels if self.labels[task][at] is not None
                }
                placed.beside(f"{facts.info.path}, sample {key}", of_sample, picture)
                at += 1
        self.labels |= placed.labels
        self._notes += placed_notes([placed.noted])

    def records(self) -> Iterator[Record]:
        """Each sample in its order; its image is read where it lies, and is not in the record."""
        at = 0
        for facts in self.found:
            split = _split_of(location(facts.info.path)) or ""
            for number, key in enumerate(facts.keys):
                labels = {
                    task: label for task, column in self.labels.items() if (label := column[at]) is not None
                }
                columns = {name: cells[number] for name, cells in facts.columns.items()}
                name = f"{facts.info.path.rpartition('/')[2]}/{key}"
                yield Record(name, b"", labels, {}, split, path=key, columns=columns)
                at += 1

    def index(self, out: Path, options: PackOptions, progress: Progress) -> Manifest:
        return index(self, out, options, progress)

    def notes(self) -> Iterator[str]:
        yield from self._notes
        hidden = [name for facts in self.found for name in facts.hidden]
        if hidden:
            yield (
                f"members left out, hidden or left behind by an operating system: {len(hidden)} "
                f"({listed(hidden)})"
            )
        unlabelled: Counter[str] = Counter()
        for facts in self.found:
            unlabelled.update(facts.unlabelled)
        for task, number in unlabelled.items():
            if number:
                yield f"{task}: masks that are {IGNORE} throughout, taken as no label: {number}"

    def _account(self) -> None:
        account = self.account
        account.count("tars", "indexed", len(self.found))
        for facts in self.found:
            for fate, number in facts.members.items():
                account.count("members", fate, number)
            account.count("samples", SAMPLE, len(facts.rows))
            if facts.skipped:
                account.count("samples", UNREADABLE, len(facts.skipped))


def _fields_of(options: PackOptions) -> list[str]:
    """The fields by which samples are split or grouped."""
    fields = [options.group] if options.group and "{" not in options.group else []
    split = options.split
    if (
        isinstance(split, str)
        and not _is_of_all(split)
        and not names_groups(split)
        and fractions_in(split) is None
    ):
        fields.append(split)
    return fields


def _is_of_all(split: object) -> bool:
    """Whether `--split` names the split of all tars, as a word and not a field."""
    return isinstance(split, str) and is_split_word(split)


def index(tars: Tars, out: Path, options: PackOptions = STANDARD, progress: Progress = silent) -> Manifest:
    """Write index, label columns and manifest of `tars` into the directory `out`; return the manifest.

    `progress` counts tars.

    Raises:
        UserError: a tar, field or label that is not there or not understood, or `out` holds a dataset.
    """
    if (out / MANIFEST_NAME).exists():
        raise UserError(f"{out}: expected a directory without a dataset, found one. Choose another.")
    tars.scan(options, progress)
    tasks = tars.tasks()
    records = list(tars.records())
    if not records:
        raise UserError(f"expected samples, found none in {plural(len(tars.found), 'tar')}.")
    notes: list[str] = []
    if _is_of_all(options.split):
        splits = [split_name(str(options.split))] * len(records)
    else:
        if options.split is None and not any(record.split for record in records):
            records = [replace(record, split=SPLIT_NAMES[0]) for record in records]
        splits, notes = splits_of(tars, records, tasks, options)
    return _write(out, tars, tasks, splits, notes)


# ---------------------------------------------------------------- which tars
def _tars(arguments: Sequence[str]) -> list[Location]:
    """The tars that the arguments name, in order, as absolute paths or URLs."""
    places: list[Location] = []
    for argument in arguments:
        place = location(argument)
        if isinstance(place, Url):
            names = expanded(argument)
            is_folder = names == [argument] and not argument.endswith(".tar")
            places += _inside(place, place.matching("*.tar")) if is_folder else map(Url, names)
        elif place.is_dir():
            places += _inside(place, sorted(place.glob("*.tar")) or sorted(place.glob("*/*.tar")))
        else:
            places += [Path(name) for name in expanded(argument)]
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


def _split_of(path: Location) -> str | None:
    """The split that a part of the tar's name names, or else the whole of its folder's name."""
    parts = str(path).split("/")
    match = _SPLIT_IN_NAME.search(parts[-1].removesuffix(".tar"))
    if match:
        return split_name(match[1])
    folder = split_name(parts[-2])
    return folder if folder in SPLIT_NAMES else None


# ---------------------------------------------------------------- what is in them
def _write(
    out: Path, tars: Tars, sources: Mapping[str, TaskSource], splits: Sequence[str], notes: Sequence[str]
) -> Manifest:
    """Write everything that the scans found, the manifest last."""
    found = tars.found
    tasks = {task: source.info for task, source in sources.items()}
    parts = {
        name: _Part(name, tars, tasks, np.array([s == name for s in splits])) for name in _ordered(splits)
    }
    for task in tasks:
        if not any(part.counts[task].present for part in parts.values()):
            raise UserError(f"task {task!r}: expected labels, found none in {len(splits)} samples.")
        kind = kind_of(tasks[task].kind)
        if isinstance(kind, MapKind):
            examples = {k: v for facts in reversed(found) for k, v in facts.conventions[task].items()}
            tallies = [part.contents[task] for part in parts.values()]
            kind.check_files(task, examples, functools.reduce(kind.add, tallies), tasks[task])
    training = parts.get(SPLIT_NAMES[0]) or next(iter(parts.values()))
    channels, dtype = image_format([facts.image_kinds for facts in found])
    skipped = [reason for facts in found for reason in facts.skipped]
    counts = {name: part.counts for name, part in parts.items()}
    hashes = {name: part.hashes for name, part in parts.items()}
    manifest = Manifest(
        name=out.absolute().name,
        channels=channels,
        image_dtype=dtype,
        tasks={
            task: with_facts(info, training.counts[task], training.contents[task])
            for task, info in tasks.items()
        },
        splits={
            name: SplitInfo(len(part.rows), tuple(_beside(out, info) for info in part.shards), part.counts)
            for name, part in parts.items()
        },
        notes=(
            *tars.notes(),
            *notes,
            *image_notes([facts.oddities for facts in found], skipped),
            *label_notes(tasks, counts, training.name),
            *duplicate_notes(hashes, {name: part.keys for name, part in parts.items()}),
        ),
        labels="columns",
        content_hashes="hashes",
        account=tars.account.totals(),
        values={task: dict(source.mask_values) for task, source in sources.items() if source.mask_values},
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            save_index(index_path(out, name), part.rows)
            save_index(content_hashes_path(out, name), part.hashes)
            save_index(labels_path(out, name), label_columns(tasks, part.labels, len(part.rows)))
        manifest = replace(manifest, pixels=_measured(out, manifest, training.name))
        manifest = write_manifest(out, manifest)
    except OSError as error:
        raise UserError(f"{out}: expected a place that can be written, found: {error.strerror}.") from None
    return manifest


def _ordered(splits: Sequence[str]) -> list[str]:
    """The splits, the usual ones first."""
    usual = [name for name in SPLIT_NAMES if name in splits]
    return usual + sorted(set(splits) - set(usual))


class _Part:
    """One split of the tars: its rows in their order, which are some of each tar's."""

    def __init__(self, name: str, tars: Tars, tasks: Mapping[str, TaskInfo], chosen: np.ndarray) -> None:
        self.name = name
        of_tars = np.split(chosen, np.cumsum([len(facts.rows) for facts in tars.found])[:-1])
        rows, hashes = [], []
        self.keys: list[str] = []
        self.shards: list[ShardInfo] = []
        tallies: dict[str, list[np.ndarray]] = {}
        for facts, here in zip(tars.found, of_tars, strict=True):
            if not here.any():
                continue
            positions = np.flatnonzero(here).tolist()
            rows.append(facts.rows[here])
            hashes.append(np.frombuffer(facts.content_hashes, HASH_DTYPE)[here])
            self.keys += [facts.keys[i] for i in positions]
            self.shards.append(replace(facts.info, num_samples=len(positions)))
            for task, column in facts.tallies.items():
                some = [tally for i in positions if (tally := column[i]) is not None]
                tallies.setdefault(task, []).extend(some)
        self.rows, self.hashes = np.concatenate(rows), np.concatenate(hashes)
        at = np.flatnonzero(chosen).tolist()
        self.labels = {task: [column[i] for i in at] for task, column in tars.labels.items()}
        self.contents: dict[str, np.ndarray] = {}
        self.counts: dict[str, LabelCounts] = {}
        for bit, (task, info) in enumerate(tasks.items()):
            kind = kind_of(info.kind)
            if isinstance(kind, MapKind):
                content = functools.reduce(kind.add, tallies.get(task, []), kind.tally(info))
                labelled = self.rows[f"{task}_size"] > 0
            else:
                assert isinstance(kind, ScalarKind)
                content = kind.encode(self.labels[task], info)
                labelled = np.array([label is not None for label in self.labels[task]], dtype=bool)
            self.rows["labelled"] |= labelled.astype(np.uint64) << np.uint64(bit)
            self.contents[task] = content
            present = int(labelled.sum())
            of_classes = kind.counts(content, info) if info.classes else ()
            self.counts[task] = LabelCounts(present, len(labelled) - present, of_classes)


def _measured(out: Path, manifest: Manifest, split: str) -> PixelFacts | None:
    """What the pixels of a split are like, from images of it at even distances."""
    reader = SplitReader(out, manifest, split)
    counts: dict[str, PixelCounts] = {}
    for row in np.unique(np.linspace(0, reader.num_samples - 1, _MEASURED).astype(int)).tolist():
        data = bytes(reader.read(row).image)
        try:
            facts = examine_image(data, decode=False)
            kind = f"{facts.channels} {facts.dtype}"
            counts.setdefault(kind, PixelCounts(facts.channels, facts.dtype)).add(pixels_of(data, facts))
        except UnreadableImage:  # found without verification; training will say so
            continue
    reader.close()
    return pixel_facts([each.state() for each in counts.values()], manifest.channels)


def _beside(out: Path, shard: ShardInfo) -> ShardInfo:
    """The shard by its path below `out`, if it lies there: a folder that moves as a whole stays a dataset."""
    if "://" in shard.path:
        return shard
    path = Path(shard.path)
    root = out.absolute()
    return replace(shard, path=str(path.relative_to(root))) if path.is_relative_to(root) else shard
