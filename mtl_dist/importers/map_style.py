"""The index of a map-style Dataset: one pass over its samples, in which everything is counted and checked.

    data:
      train:
        - dataset: {kind: my_project.datasets.Scans, folder: scans}
          fields: {digit: {kind: classification}}

One process makes it, under a lock for which the other ranks wait. It is known by the Dataset, its arguments,
its length and its fingerprint, so that other samples make another index.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mtl_dist.data.columns import label_columns, labels_path
from mtl_dist.data.content_hashes import HASH_DTYPE, content_hash, content_hashes_path
from mtl_dist.data.external import FieldSettings, Indexing
from mtl_dist.data.images import ImageFacts, UnreadableImage, examine_image
from mtl_dist.data.inspect import spread
from mtl_dist.data.manifest import (
    MANIFEST_NAME,
    LabelCounts,
    Manifest,
    MapStyle,
    ShardInfo,
    SplitInfo,
    read_manifest,
    write_manifest,
)
from mtl_dist.data.map_style import DatasetSettings, MapDataset
from mtl_dist.data.reader import UnreadableSample
from mtl_dist.data.shards import check_task_names, index_dtype, index_path, map_tasks, save_index
from mtl_dist.durable import locked, sha256_of
from mtl_dist.errors import UserError
from mtl_dist.importers.conversion import pixels_of
from mtl_dist.importers.orientation import DISPLAYED
from mtl_dist.importers.pixel_counts import PixelCounts, pixel_facts
from mtl_dist.importers.shard_counts import PlacedLabels
from mtl_dist.importers.splitting import held_out_note, split_by_fractions
from mtl_dist.importers.summary import duplicate_notes, image_format, label_notes, placed_notes, with_facts
from mtl_dist.kinds.cells import parse_cells
from mtl_dist.kinds.kind import Kind, Label, MapKind, ScalarKind
from mtl_dist.kinds.registry import kind_of
from mtl_dist.kinds.vocabulary import Cell, Declared, LabelError
from mtl_dist.specs import TaskInfo

log = logging.getLogger(__name__)

PLACE = ".mtl"
_SAID_EVERY_S = 30.0
_MEASURED = 1024


def indexed_dataset(
    settings: DatasetSettings,
    fields: Mapping[str, FieldSettings],
    image: str,
    place: Path | None,
    indexing: Indexing,
    split: str,
    root: Path,
) -> Path:
    """The index of a Dataset, which is made if it is not there: by default below `.mtl` in `root`.

    Raises:
        UserError: the Dataset or a sample of it is not what it should be, or the place holds another index.
    """
    check_task_names(fields)
    dataset = MapDataset(settings, image)
    if len(dataset) == 0:
        raise UserError(
            f"{settings.path}: expected samples, found none{_arguments(settings)}. Correct where it looks."
        )
    dataset = dataset.placed({name: getattr(stated, "from") for name, stated in fields.items()})
    _check_repeats(dataset)
    assert dataset.fields is not None
    stated = MapStyle(
        dataset=settings.model_dump(mode="json"),
        image=dataset.image,
        fields=dict(dataset.fields),
        num_samples=len(dataset),
        fingerprint=dataset.fingerprint(lambda number: iter(spread(len(dataset), number))),
    )
    request = {
        "fields": {name: each.model_dump(mode="json") for name, each in fields.items()},
        "indexing": indexing.model_dump(mode="json"),
        "split": split,
    }
    if place is None:
        known = json.dumps([request, stated.dataset, stated.image, stated.num_samples, stated.fingerprint])
        name = settings.part_class.__name__
        place = root / PLACE / f"{name}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place.with_name(f".{place.name}.lock")):
            if (place / MANIFEST_NAME).exists():
                _check_made(place, stated)
            else:
                _make(place, dataset, stated, fields, indexing, split)
    except OSError as error:
        raise UserError(
            f"{place}: expected a place for the index that can be written, found: {error.strerror}. "
            "Name another with `index`."
        ) from None
    return place


def _check_made(place: Path, stated: MapStyle) -> None:
    """Refuse an index, in a place that was named, of another Dataset."""
    found = read_manifest(place).map_style
    if found is None or replace(found, dataset=stated.dataset) != stated:
        raise UserError(
            f"{place}: expected an index of the Dataset in the recipe as it is now, found another's. "
            "Remove it to make it again, or name another `index`."
        )


def _arguments(settings: DatasetSettings) -> str:
    values = settings.model_dump(mode="json")
    stated = ", ".join(f"{name}: {values[name]}" for name in settings.arguments if name in values)
    return f" with {stated}" if stated else ""


def _check_repeats(dataset: MapDataset) -> None:
    """Refuse a Dataset whose images are others when they are read again."""
    try:
        first, second = (bytes(dataset.image_of(dataset.sample(0))) for _ in range(2))
    except UnreadableSample as error:
        raise UserError(f"{dataset.where(0)}: {error}.") from error
    if first != second:
        raise UserError(
            f"{dataset.where(0)}: expected the same image when it is read again, found another. Leave out of "
            "the Dataset what is random: with data.augment and data.transforms a resumed run sees the same."
        )


@dataclass
class _Found:
    """What one pass over the Dataset found, sample by sample."""

    cells: dict[str, list[Cell]]
    tallies: dict[str, list[np.ndarray | None]]
    sizes: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    kinds: dict[str, tuple[str, int]] = field(default_factory=dict)
    pixels: dict[str, PixelCounts] = field(default_factory=dict)
    pictures: list[ImageFacts] = field(default_factory=list)
    """Where labels have a place in their image."""


def _make(
    place: Path,
    dataset: MapDataset,
    stated: MapStyle,
    fields: Mapping[str, FieldSettings],
    indexing: Indexing,
    split: str,
) -> None:
    """Write the index under another name, and rename it when it is whole."""
    log.warning("%s: reading the %s samples of %s, once", place, f"{len(dataset):,}", dataset.settings.path)
    declared = {name: _declared(dataset, each, fields, indexing) for name, each in fields.items()}
    task_infos, values = _declare(fields, declared)
    found = _pass(dataset, task_infos, values)
    task_infos, labels, notes = _labels(dataset, found, task_infos, declared)
    splits, more = _splits(len(dataset), labels, task_infos, indexing, split)
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that died
    partial.mkdir()
    channels, dtype = image_format([found.kinds])
    tasks: dict[str, TaskInfo] = {}
    made: dict[str, SplitInfo] = {}
    for name in sorted(set(splits), key=lambda name: name != split):  # the training one comes first
        chosen = np.flatnonzero(np.array(splits) == name)
        rows, counts, contents = _part(chosen, found, task_infos, labels)
        if not tasks:
            tasks = {
                task: with_facts(info, counts[task], contents[task]) for task, info in task_infos.items()
            }
        of_split = {task: [column[at] for at in chosen.tolist()] for task, column in labels.items()}
        shard = _write_split(
            partial,
            name,
            rows,
            [found.hashes[at] for at in chosen.tolist()],
            label_columns(task_infos, of_split, len(chosen)),
        )
        made[name] = SplitInfo(len(chosen), (shard,), counts)
    all_hashes = {name: np.load(content_hashes_path(partial, name)) for name in made}
    keys = {name: np.load(index_path(partial, name))["image_offset"].astype(str).tolist() for name in made}
    manifest = Manifest(
        name=dataset.settings.part_class.__name__,
        channels=channels,
        image_dtype=dtype,
        tasks=tasks,
        splits=made,
        notes=(
            *notes,
            *more,
            *label_notes(tasks, {name: info.labels for name, info in made.items()}, next(iter(made))),
            *duplicate_notes(all_hashes, keys),
        ),
        labels="columns",
        content_hashes="hashes",
        pixels=pixel_facts([each.state() for each in found.pixels.values()], channels),
        values=values,
        map_style=stated,
    )
    write_manifest(partial, manifest)
    os.rename(partial, place)


def _declare(
    fields: Mapping[str, FieldSettings], declared: Mapping[str, Declared]
) -> tuple[dict[str, TaskInfo], dict[str, dict[int, int]]]:
    """The tasks, and of maps whose classes are stated by value what each value becomes."""
    task_infos: dict[str, TaskInfo] = {}
    values: dict[str, dict[int, int]] = {}
    for name, each in fields.items():
        kind = kind_of(each.kind)
        try:
            task_infos[name] = kind.declare(name, declared[name])
        except LabelError as error:
            raise UserError(f"fields.{name}.classes: {error}") from None
        if kind.is_map and (by_value := declared[name].class_values):
            values[name] = by_value
    return task_infos, values


def _labels(
    dataset: MapDataset, found: _Found, task_infos: Mapping[str, TaskInfo], declared: Mapping[str, Declared]
) -> tuple[dict[str, TaskInfo], dict[str, Sequence[Label | None]], list[str]]:
    """The tasks with the classes that were found, the labels of those that are no maps, and the notes."""
    complete = dict(task_infos)
    labels: dict[str, Sequence[Label | None]] = {}
    notes: list[str] = []
    has_place = False
    for name, info in task_infos.items():
        kind = kind_of(info.kind)
        if isinstance(kind, ScalarKind):
            parsed = parse_cells(kind, found.cells[name], dataset.where, declared[name])
            complete[name] = kind.declare(name, replace(declared[name], classes=parsed.classes or None))
            labels[name] = parsed.labels
            has_place = has_place or kind.has_place
            notes += [f"{name}: {note}" for note in parsed.notes]
    if has_place:
        placed = PlacedLabels(complete, DISPLAYED)
        for at, picture in enumerate(found.pictures):
            of_sample = {name: labels[name][at] for name in placed.labels if labels[name][at] is not None}
            placed.beside(dataset.where(at), of_sample, picture)
        labels |= placed.labels
        notes += placed_notes([placed.noted])
    return complete, labels, notes


def _write_split(
    folder: Path, name: str, rows: np.ndarray, hashes: Sequence[bytes], columns: np.ndarray
) -> ShardInfo:
    """The index of a split, the hashes of its images and its labels; the index stands for its shard."""
    file = index_path(folder, name)
    save_index(file, rows)
    save_index(content_hashes_path(folder, name), np.frombuffer(b"".join(hashes), HASH_DTYPE))
    save_index(labels_path(folder, name), columns)
    return ShardInfo(file.name, len(rows), file.stat().st_size, sha256_of(file))


def _declared(
    dataset: MapDataset, stated: FieldSettings, fields: Mapping[str, FieldSettings], indexing: Indexing
) -> Declared:
    """What is known of a task beforehand; class names also from the Dataset's own `classes`."""
    classes = stated.class_names
    kind = kind_of(stated.kind)
    named = [name for name, each in fields.items() if _is_of_classes(kind_of(each.kind))]
    own = getattr(dataset.made, "classes", None)
    if isinstance(own, Mapping):
        name = next(name for name, each in fields.items() if each is stated)
        own = own.get(name)
    elif len(named) > 1 or not _is_of_classes(kind):
        own = None
    is_list = isinstance(own, list | tuple) and all(isinstance(each, str) for each in own)
    if classes is None and kind.has_classes and is_list:
        classes = tuple(own or ())
    return Declared(classes or None, stated.unit, indexing.separator, missing=indexing.missing)


def _classes_and_parts(info: TaskInfo) -> tuple[int, bool]:
    """How many classes a vector of 0 and 1 is over, and whether one is a list of numbers instead."""
    kind = kind_of(info.kind)
    return (len(info.classes), False) if kind.class_words == Kind.class_words else (0, True)


def _is_of_classes(kind: Kind) -> bool:
    """Whether the names of a kind are of classes, and not of parts that every label has."""
    return kind.has_classes and kind.class_words == Kind.class_words


def _pass(
    dataset: MapDataset, task_infos: Mapping[str, TaskInfo], values: Mapping[str, Mapping[int, int]]
) -> _Found:
    """Read every sample.

    Raises:
        UserError: one cannot be read, or has a label of another form.
    """
    maps = {
        name: kind for name, info in task_infos.items() if isinstance(kind := kind_of(info.kind), MapKind)
    }
    scalars = [name for name in task_infos if name not in maps]
    found = _Found({name: [] for name in scalars}, {name: [] for name in maps})
    has_place = any(kind_of(task_infos[name].kind).has_place for name in scalars)
    measured = set(spread(len(dataset), _MEASURED))
    said = time.monotonic()
    for number in range(len(dataset)):
        if time.monotonic() - said > _SAID_EVERY_S:
            said = time.monotonic()
            log.warning("read %s of %s samples", f"{number:,}", f"{len(dataset):,}")
        try:
            sample = dataset.sample(number)
            image = bytes(dataset.image_of(sample))
            facts = examine_image(image, decode=False)
            for name in scalars:
                found.cells[name].append(dataset.cell(sample, name, *_classes_and_parts(task_infos[name])))
            for name, kind in maps.items():
                stored = dataset.map_of(sample, name, kind, task_infos[name], values.get(name, {}))
                if stored is not None and (stored.height, stored.width) != (facts.height, facts.width):
                    raise UnreadableSample(
                        f"its map {name} is {stored.width}x{stored.height}, its image "
                        f"{facts.width}x{facts.height}"
                    )
                is_label = stored is not None and kind.is_labelled(stored)
                found.tallies[name].append(stored.tally if stored is not None and is_label else None)
        except (UnreadableSample, UnreadableImage) as error:
            raise UserError(f"{dataset.where(number)}: {error}.") from error
        described = f"{facts.channels} {facts.dtype}"
        found.kinds[described] = (str(number), found.kinds.get(described, ("", 0))[1] + 1)
        found.sizes.append(len(image))
        found.pictures += [facts] if has_place else []
        found.hashes.append(content_hash(image))
        if number in measured:
            counts = found.pixels.setdefault(described, PixelCounts(facts.channels, facts.dtype))
            counts.add(pixels_of(image, facts))
    return found


def _splits(
    num_samples: int,
    labels: Mapping[str, Sequence[Label | None]],
    task_infos: Mapping[str, TaskInfo],
    indexing: Indexing,
    split: str,
) -> tuple[list[str], list[str]]:
    """The split of each sample, and what is to be said of them; `indexing.val` is held out of train."""
    if indexing.val is None:
        return [split] * num_samples, []
    by = indexing.stratify or next(
        (name for name in labels if kind_of(task_infos[name].kind).is_one_class), ""
    )
    if by and by not in labels:
        raise UserError(f"indexing.stratify: expected one of {', '.join(labels)}, found {by!r}.")
    strata = labels[by] if by else [0] * num_samples
    keys = [str(number) for number in range(num_samples)]
    shares = (1 - indexing.val, indexing.val)
    splits = split_by_fractions(keys, [str(each) for each in strata], shares, indexing.seed)
    return splits, [held_out_note(indexing.val, by or "sample", indexing.seed, splits)]


def _part(
    chosen: np.ndarray,
    found: _Found,
    task_infos: Mapping[str, TaskInfo],
    labels: Mapping[str, Sequence[Label | None]],
) -> tuple[np.ndarray, dict[str, LabelCounts], dict[str, np.ndarray]]:
    """The rows of a split, what is counted of its labels, and what they hold."""
    rows = np.zeros(
        len(chosen), index_dtype(map_tasks({name: info.kind for name, info in task_infos.items()}))
    )
    rows["image_offset"] = chosen
    rows["image_size"] = np.array(found.sizes)[chosen]
    counts: dict[str, LabelCounts] = {}
    contents: dict[str, np.ndarray] = {}
    for bit, (name, info) in enumerate(task_infos.items()):
        kind = kind_of(info.kind)
        if isinstance(kind, MapKind):
            tallies = [found.tallies[name][at] for at in chosen.tolist()]
            has = np.array([tally is not None for tally in tallies], bool)
            content = kind.tally(info)
            for tally in tallies:
                content = content if tally is None else kind.add(content, tally)
            rows[f"{name}_size"] = has
        else:
            assert isinstance(kind, ScalarKind)
            column = [labels[name][at] for at in chosen.tolist()]
            has = np.array([label is not None for label in column], bool)
            content = kind.encode(column, info)
        rows["labelled"] |= has.astype(np.uint64) << np.uint64(bit)
        present = int(has.sum())
        of_classes = kind.counts(content, info) if info.classes else ()
        counts[name] = LabelCounts(present, len(has) - present, of_classes)
        contents[name] = content
    return rows, counts, contents
