"""What is in a prepared dataset: counts, labels, sizes, and whether its files are whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from mtl_dist.cell_table import CellTable
from mtl_dist.data.columns import columns_dtype, counted, labels_path
from mtl_dist.data.content_hashes import HASH_DTYPE, content_hash, content_hashes_path
from mtl_dist.data.images import UnreadableImage, examine_image
from mtl_dist.data.manifest import (
    PERCENTILES,
    Manifest,
    PixelFacts,
    ShardInfo,
    SplitInfo,
    read_manifest,
)
from mtl_dist.data.map_style import split_reader
from mtl_dist.data.reader import UnreadableSample
from mtl_dist.data.remote import Location, beside, sha256_at
from mtl_dist.data.shards import index_path, scan_shard
from mtl_dist.durable import sha256_of
from mtl_dist.errors import UserError
from mtl_dist.kinds.registry import kind_of
from mtl_dist.plural import plural
from mtl_dist.printable import printable
from mtl_dist.specs import TaskInfo

_LOOKED_AT = 200
_CLASSES_SHOWN = 30
_NOUNS = ("image", "mask", "table", "sample", "label", "folder")
"""The fates in an account that are things; others say what was done: read, indexed, left out."""


@dataclass(frozen=True)
class Inspection:
    """A dataset's manifest, and what a look at its files adds.

    `image_sizes` holds (width, height) of some images of each split, spread evenly. `problems` are the
    lines of what `verify` found wrong, empty where all is well, None where it did not look.
    """

    directory: Location
    manifest: Manifest
    image_sizes: dict[str, list[tuple[int, int]]]
    problems: tuple[str, ...] | None


def inspect_dataset(directory: Location, verify: bool = False) -> Inspection:
    """Look into the dataset; with `verify` compare every shard with its hash, and the indexes with the tars.

    Raises:
        UserError: no dataset, or a shard or an index that is missing (with `verify` that is a problem among
            others).
    """
    manifest = read_manifest(directory)
    problems = tuple(_problems(directory, manifest)) if verify else None
    sizes: dict[str, list[tuple[int, int]]] = {}
    if not problems:
        sizes = {split: _image_sizes(directory, manifest, split) for split in manifest.splits}
    return Inspection(directory, manifest, sizes, problems)


def _image_sizes(directory: Location, manifest: Manifest, split: str) -> list[tuple[int, int]]:
    reader = split_reader(directory, manifest, split)
    sizes = []
    for row in spread(reader.num_samples, _LOOKED_AT):
        try:
            facts = examine_image(bytes(reader.read(row).image), decode=False)
        except (UnreadableSample, UnreadableImage) as error:
            raise UserError(f"{reader.where(row)}: expected a readable image, found {error}.") from None
        sizes.append((facts.width, facts.height))
    return sizes


def spread(num_samples: int, wanted: int) -> list[int]:
    """At most `wanted` rows, evenly over the split."""
    return np.unique(np.linspace(0, num_samples - 1, min(wanted, num_samples)).astype(int)).tolist()


def _problems(directory: Location, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the files, one line each."""
    kinds = {name: info.kind for name, info in manifest.tasks.items()}
    for split, info in manifest.splits.items():
        rows, hashes = [], list[bytes]()
        for shard in info.shards:
            path = beside(directory, shard.path)
            problem = _problem_of(path, shard)
            if problem is not None:
                yield f"{path}: {problem}"
            elif manifest.labels == "json" and isinstance(path, Path):
                rows.append(scan_shard(path, kinds))
                hashes += _hashes_in(path, rows[-1]) if manifest.content_hashes else []
        if isinstance(directory, Path):
            yield from _column_problems(directory, manifest, split)
            if manifest.content_hashes:
                path = content_hashes_path(directory, split, manifest.content_hashes)
                yield from _hash_problems(path, info, hashes)
        if rows and len(rows) == len(info.shards) and isinstance(directory, Path):
            yield from _index_problems(index_path(directory, split), np.concatenate(rows))


def _column_problems(directory: Path, manifest: Manifest, split: str) -> Iterator[str]:
    """What is wrong with the label columns of a split: they must hold what the manifest counted."""
    path, info = labels_path(directory, split), manifest.splits[split]
    if not path.is_file() and manifest.labels == "json":
        return
    columns = _rows_in(path, "label columns")
    if isinstance(columns, str):
        yield columns
        return
    if columns.dtype != columns_dtype(manifest.tasks) or columns.shape != (info.num_samples,):
        yield f"{path}: not the columns of the tasks and samples in the manifest"
        return
    for task in columns.dtype.names or ():
        counts = info.labels[task]
        expected = counts.class_counts if manifest.tasks[task].classes else (counts.present,)
        if counted(columns, task, manifest.tasks[task]) != expected:
            yield f"{path}: other labels of {task} than were counted when it was written"


def _hashes_in(path: Path, rows: np.ndarray) -> list[bytes]:
    """The content hashes of the images of a shard."""
    spans = zip(rows["image_offset"].tolist(), rows["image_size"].tolist(), strict=True)
    with open(path, "rb") as file:  # not memory-mapped: one that is shortened meanwhile would be a bus error
        return [content_hash(os.pread(file.fileno(), size, offset)) for offset, size in spans]


def _hash_problems(path: Path, split: SplitInfo, expected: Sequence[bytes]) -> Iterator[str]:
    """What is wrong with a split's content hashes; `expected` are those of all images, if all were read."""
    found = _rows_in(path, "content hashes")
    if isinstance(found, str):
        yield found
        return
    is_whole = found.dtype == HASH_DTYPE and found.shape == (split.num_samples,)
    if not is_whole or (len(expected) == split.num_samples and found.tobytes() != b"".join(expected)):
        yield f"{path}: does not fit its shards"


def _problem_of(path: Location, shard: ShardInfo) -> str | None:
    """What is wrong with a shard."""
    if isinstance(path, Path) and not path.is_file():
        return "missing"
    found = path.stat().st_size if isinstance(path, Path) else path.size()
    if found != shard.num_bytes:
        return f"expected {shard.num_bytes} bytes, found {found}"
    if (sha256_of(path) if isinstance(path, Path) else sha256_at(path)) != shard.sha256:
        return "its content has changed since it was written (another SHA-256)"
    return None


def _index_problems(path: Path, expected: np.ndarray) -> Iterator[str]:
    found = _rows_in(path, "index")
    if isinstance(found, str):
        yield found
    elif found.dtype != expected.dtype or not np.array_equal(found, expected):
        yield f"{path}: does not fit its shards"


def _rows_in(path: Path, what: str) -> np.ndarray | str:
    """The rows in a file of the dataset, or why there are none."""
    if not path.is_file():
        return f"{path}: missing"
    try:
        rows: np.ndarray = np.load(path, allow_pickle=False)
    except Exception as error:  # whatever numpy raises of a damaged header
        return f"{path}: no {what} ({' '.join(str(error).split())[:200]})"
    return rows


def render(inspection: Inspection) -> RenderableType:
    """The inspection as tables, for a rich console."""
    manifest = inspection.manifest
    tables = [_split_table(inspection), _label_table(manifest)]
    measured = {
        f"{name}.{part}" if part else name: number
        for name, info in manifest.tasks.items()
        for part, number in kind_of(info.kind).numbers(info).items()
    }
    tables += [_value_table(measured)] if measured else []
    tables += [_pixel_table(manifest.pixels, manifest.channels)] if manifest.pixels is not None else []
    tables += [_class_table(name, info, manifest) for name, info in manifest.tasks.items() if info.classes]
    parts: list[RenderableType] = [_headline(manifest)]
    for table in tables:
        parts += [table, Text("")]
    parts += [Text(printable(f"found: {line}")) for line in account_lines(manifest.account)]
    parts += [Text(printable(f"note: {note}"), style="yellow") for note in manifest.notes]
    if inspection.problems is not None:
        parts += [Text(printable(problem), style="bold red") for problem in inspection.problems]
        if not inspection.problems:
            parts.append(Text("every shard matches its hash, every index its shards", style="green"))
    return Group(*parts)


def account_lines(account: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The account of a preparation as lines: what was found of each unit, and what became of it."""
    found = []
    for unit, fates in account.items():
        ordered = sorted(fates.items(), key=lambda item: (item[0].startswith("left out"), -item[1], item[0]))
        parts = " + ".join(_counted(number, fate) for fate, number in ordered)
        found.append(f"{unit}: {sum(fates.values()):,} = {parts or '0'}")
    return found


def _counted(number: int, fate: str) -> str:
    """A number of things that became samples, labels, or were left out for a reason."""
    word, colon, more = fate.partition(":")
    return f"{plural(number, word)}{colon}{more}" if word in _NOUNS else f"{number:,} {fate}"


def _headline(manifest: Manifest) -> Text:
    channels = {1: "grey", 3: "colour"}.get(manifest.channels, f"{manifest.channels}-channel")
    samples = sum(split.num_samples for split in manifest.splits.values())
    text = Text(printable(manifest.name or "dataset"), style="bold")
    return text.append(f"  {samples:,} {channels} images of {manifest.image_dtype} values", style="not bold")


def _table(title: str, columns: Iterable[str]) -> CellTable:
    table = CellTable(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _split_table(inspection: Inspection) -> CellTable:
    table = _table("split", ("samples", "shards", "size", "width x height"))
    for name, split in inspection.manifest.splits.items():
        sizes = _range(inspection.image_sizes.get(name, []))
        table.add_row(name, f"{split.num_samples:,}", f"{len(split.shards)}", _bytes(split), sizes)
    return table


def _label_table(manifest: Manifest) -> CellTable:
    """One line per task: its labels in each split."""
    table = _table("labels", manifest.splits)
    for name, info in manifest.tasks.items():
        cells = []
        for split in manifest.splits.values():
            counts = split.labels[name]
            missing = f" ({counts.missing:,} missing)" if counts.missing else ""
            cells.append(f"{counts.present:,}{missing}")
        table.add_row(f"{name} ({info.kind})", *cells)
    return table


def _pixel_table(pixels: PixelFacts, channels: int) -> CellTable:
    """One line per channel: what its values are in training."""
    shares = [f"{share}%" for share in PERCENTILES]
    table = _table(f"pixels of {pixels.num_images:,} images", ("mean", "std", "min", *shares, "max"))
    names = {1: ("grey",), 3: ("red", "green", "blue")}.get(channels, range(channels))
    columns = (pixels.mean, pixels.std, pixels.minimum, *pixels.percentiles, pixels.maximum)
    for channel, name in enumerate(names):
        table.add_row(f"channel {name}", *(f"{column[channel]:.4g}" for column in columns))
    return table


def _bytes(split: SplitInfo) -> str:
    size = float(sum(shard.num_bytes for shard in split.shards))
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def _range(sizes: list[tuple[int, int]]) -> str:
    """The sizes that were seen: one, or from the smallest to the largest of each side."""
    if not sizes:
        return "?"
    smallest, largest = np.min(sizes, axis=0), np.max(sizes, axis=0)
    if (smallest == largest).all():
        return f"{smallest[0]} x {smallest[1]}"
    return f"{smallest[0]}..{largest[0]} x {smallest[1]}..{largest[1]}"


def _value_table(tasks: dict[str, TaskInfo]) -> CellTable:
    """One line per task of numbers: its values in training."""
    table = _table("values in training", ("mean", "std", "min", "max", "unit"))
    for name, info in tasks.items():
        values = [f"{value:.4g}" for value in (info.mean, info.std, info.minimum, info.maximum)]
        table.add_row(name, *(values if info.num_labelled else ["-"] * 4), info.unit or "-")
    return table


def _class_table(name: str, info: TaskInfo, manifest: Manifest) -> CellTable:
    """One line per class: its count in each split, of pixels the share."""
    pixels = kind_of(info.kind).is_map
    table = _table(f"{name}, {'share of pixels' if pixels else 'samples'}", manifest.splits)
    for index, class_name in enumerate(info.classes[:_CLASSES_SHOWN]):
        cells = []
        for split_info in manifest.splits.values():
            counts = split_info.labels[name].class_counts
            cells.append(f"{counts[index] / max(1, sum(counts)):.1%}" if pixels else f"{counts[index]:,}")
        table.add_row(class_name, *cells)
    if len(info.classes) > _CLASSES_SHOWN:
        table.add_row(f"and {len(info.classes) - _CLASSES_SHOWN} more classes", *[""] * len(manifest.splits))
    return table
