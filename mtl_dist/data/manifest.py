"""dataset.json: what a dataset is made of. It is written last, so its existence means a complete dataset.

    data/cats/
        dataset.json            this file
        train-000000.tar ...    plain WebDataset shards
        train.index.npy         one packed row per sample (see shards.py)

Format version 2. A reader takes version 1 as well, and refuses a newer one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from mtl_dist.config.trust import mark, parts_of, refusal
from mtl_dist.data.remote import Location
from mtl_dist.data.table_hashes import TABLES, table_hashes
from mtl_dist.durable import write_text
from mtl_dist.errors import UserError
from mtl_dist.json_files import DamagedFile, parsed
from mtl_dist.specs import IGNORE, TaskInfo

FORMAT_VERSION = 2
MANIFEST_NAME = "dataset.json"

_SHA256 = re.compile(r"[0-9a-f]{64}")

ImageDtype = Literal["uint8", "uint16", "float32"]
"""The values of a dataset's images."""

LabelPlace = Literal["json", "columns"]
"""In each sample's `<key>.json`, or in `<split>.labels.npy` (external tars have forms of their own)."""

HashFiles = Literal["", "hashes", "digests"]
"""The name in `<split>.<name>.npy`: "digests" in format version 1; "" without content hashes."""


@dataclass(frozen=True)
class ShardInfo:
    """One tar: its path (a URL, absolute, or from the manifest on), samples, size in bytes and SHA-256."""

    path: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class LabelCounts:
    """The labels of one task in one split: present and missing samples, and what is in them.

    `class_counts` counts samples (pixels for segmentation, positives for multilabel).
    """

    present: int
    missing: int
    class_counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class SplitInfo:
    """One split: its shards in order, its labels by task, and the SHA-256 of its tables by their names."""

    num_samples: int
    shards: tuple[ShardInfo, ...]
    labels: dict[str, LabelCounts]
    tables: dict[str, str] = field(default_factory=dict)


PERCENTILES = (1, 50, 99)


@dataclass(frozen=True)
class PixelScale:
    """Mean and standard deviation of each channel, in the images' own units."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class PixelFacts:
    """What the pixels of the training split are like, one value per channel, in the images' own units.

    `percentiles` are those of PERCENTILES. They were measured on `num_images` images: on all pixels of small
    ones, on every n-th row and column of others.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    percentiles: tuple[tuple[float, ...], ...]
    num_images: int


@dataclass(frozen=True)
class MapStyle:
    """Where the samples are of a dataset that holds none: in a map-style Dataset of the user's.

    dataset      its import path, as `kind`, and its arguments
    image        where in a sample the image is
    fields       by task, where its label is
    num_samples  its length
    fingerprint  by what its samples are known again
    """

    dataset: dict[str, Any]
    image: str
    fields: dict[str, str]
    num_samples: int
    fingerprint: str


@dataclass(frozen=True)
class Manifest:
    """The whole of dataset.json.

    `channels` and `image_dtype` hold for every image (grey ones among colour ones are expanded when they
    are read). `tasks` carries the statistics of the training split (of the first split where there is none
    called "train").
    `notes` are lines the preparation had to say (skipped rows, duplicates across splits). `labels` says
    where a reader finds the labels that are not masks, `content_hashes` in which files it finds those of the
    images, if they are kept.
    `account` is, by unit (files, rows, pages), how many things of the source had each fate. `pixels` was
    measured while packing; None in version 1, and where images were only indexed. `values` is, by task, the
    class of each value of its maps (255: ignored), where these stay as others wrote them. Where `map_style`
    is stated, the offsets of the index are numbers of that Dataset, and each split's only shard is the index.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    channels: int
    image_dtype: ImageDtype
    tasks: dict[str, TaskInfo]
    splits: dict[str, SplitInfo]
    name: str = ""
    notes: tuple[str, ...] = field(default=())
    labels: LabelPlace = "json"
    content_hashes: HashFiles = ""
    account: dict[str, dict[str, int]] = field(default_factory=dict)
    pixels: PixelFacts | None = None
    values: dict[str, dict[int, int]] = field(default_factory=dict)
    map_style: MapStyle | None = None


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Write dataset.json durably, with the hashes of the tables in `directory`; returns what it says."""
    splits = {
        name: replace(split, tables=table_hashes(directory, name)) for name, split in manifest.splits.items()
    }
    manifest = replace(manifest, splits=splits)
    content = asdict(manifest)
    for info in content["tasks"].values():
        if not info["facts"]:  # of most kinds
            del info["facts"]
    for key in ("values", "map_style"):
        if not content[key]:
            del content[key]
    text = json.dumps({"format": "mtl_dist", "version": FORMAT_VERSION, **content}, indent=2)
    write_text(directory / MANIFEST_NAME, text + "\n")
    if manifest.map_style is not None or any("." in info.kind for info in manifest.tasks.values()):
        mark(directory, MANIFEST_NAME)
    return manifest


def read_manifest(directory: Location) -> Manifest:
    """The manifest of the dataset in `directory`.

    Raises:
        UserError: no such directory or manifest, not a manifest, or one of a newer version.
    """
    path = directory / MANIFEST_NAME
    if isinstance(directory, Path) and isinstance(path, Path) and not path.is_file():
        what = "no dataset.json in it" if directory.is_dir() else "no such directory"
        raise UserError(
            f"{directory}: expected a prepared dataset, found {what}. Make one with `mtl prepare`."
        )
    try:
        raw: dict[str, Any] = json.loads(
            (path.read_bytes() if isinstance(path, Path) else path.read_all()).decode("utf-8")
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, found: {error}. Prepare the dataset again.") from None
    version = raw.get("version") if isinstance(raw, dict) else None
    if not isinstance(version, int):
        raise UserError(
            f"{path}: expected an mtl_dist manifest, found no version. Was it made by `mtl prepare`?"
        )
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path}: expected format version <= {FORMAT_VERSION}, found {version}. "
            "The dataset was made by a newer mtl_dist: upgrade this one."
        )
    try:
        manifest = _parse(raw)
    except DamagedFile as error:
        raise UserError(
            f"{path}: expected a whole manifest, found {error}. Prepare the dataset again."
        ) from None
    problem = next(_inconsistencies(manifest), None)
    if problem is not None:
        raise UserError(f"{path}: {problem}. Prepare the dataset again.")
    with parts_of(Path(str(directory)), MANIFEST_NAME):
        for name, info in manifest.tasks.items():
            refused = refusal(info.kind) if "." in info.kind else ""
            if refused:
                raise UserError(f"{path}: tasks.{name}.kind: {refused}")
        refused = refusal(str(manifest.map_style.dataset.get("kind"))) if manifest.map_style else ""
        if refused:
            raise UserError(f"{path}: map_style.dataset: {refused}")
    return manifest


def _parse(raw: Mapping[str, Any]) -> Manifest:
    content = {key: value for key, value in raw.items() if key not in ("format", "version", "digests")}
    if raw.get("digests"):  # of version 1
        content["content_hashes"] = "digests"
    return parsed(Manifest, json.dumps(content))


def _inconsistencies(manifest: Manifest) -> Iterator[str]:
    """Where numbers that are in the manifest twice disagree, or cannot be."""
    if manifest.channels < 1:
        yield f"expected channels >= 1, found {manifest.channels}"
    for task, info in manifest.tasks.items():
        if len(set(info.classes)) < len(info.classes):
            yield f"expected classes of different names for the task {task}, found one twice"
    for task, values in manifest.values.items():
        known = range(len(manifest.tasks[task].classes)) if task in manifest.tasks else ()
        if any(index not in known and index != IGNORE for index in values.values()):
            yield f"expected values of classes of the tasks, found {task}: {values}"
    for name, split in manifest.splits.items():
        yield from _split_inconsistencies(name, split, manifest.tasks)


def _split_inconsistencies(name: str, split: SplitInfo, tasks: Mapping[str, TaskInfo]) -> Iterator[str]:
    in_shards = sum(shard.num_samples for shard in split.shards)
    if in_shards != split.num_samples:
        yield f"expected {split.num_samples} samples in the shards of {name}, found {in_shards}"
    for shard in split.shards:
        if shard.num_samples < 0 or shard.num_bytes < 0:
            yield f"expected a shard {shard.path} of samples and bytes, found negative numbers"
        if _SHA256.fullmatch(shard.sha256) is None:
            yield f"expected the SHA-256 of the shard {shard.path}, found {shard.sha256!r}"
    for table, sha256 in split.tables.items():
        if table not in TABLES or _SHA256.fullmatch(sha256) is None:
            yield f"expected the SHA-256 of {', '.join(TABLES)} of {name}, found {sha256!r} of {table!r}"
    if split.labels.keys() != tasks.keys():
        found = ", ".join(split.labels)
        yield f"expected labels of the tasks {', '.join(tasks)} in {name}, found those of {found}"
    for task, counts in split.labels.items():
        if counts.present + counts.missing != split.num_samples or min(counts.present, counts.missing) < 0:
            yield (
                f"expected {split.num_samples} samples with or without a label of {task} in {name}, found "
                f"{counts.present} and {counts.missing}"
            )
