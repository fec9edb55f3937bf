"""dataset.json: what a dataset is made of. It is written last, so its existence means a complete dataset.

    data/cats/
        dataset.json            this file
        train-000000.tar ...    plain WebDataset shards
        train.index.npy         one packed row per sample (see shards.py)

Format version 2. A reader takes version 1 as well, and refuses a newer one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mtl_dist.config.trust import mark, parts_of, refusal
from mtl_dist.data.remote import Location
from mtl_dist.durable import write_text
from mtl_dist.errors import UserError
from mtl_dist.specs import TaskInfo

FORMAT_VERSION = 2
MANIFEST_NAME = "dataset.json"

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
    """One split: its shards in order, and its labels by task."""

    num_samples: int
    shards: tuple[ShardInfo, ...]
    labels: dict[str, LabelCounts]


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

    @staticmethod
    def parse(raw: dict[str, Any]) -> PixelFacts:
        """From JSON, which has lists.

        Raises:
            TypeError: it is something else.
        """
        return PixelFacts(
            mean=tuple(raw["mean"]),
            std=tuple(raw["std"]),
            minimum=tuple(raw["minimum"]),
            maximum=tuple(raw["maximum"]),
            percentiles=tuple(tuple(row) for row in raw["percentiles"]),
            num_images=raw["num_images"],
        )


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
    measured while packing; None in version 1, and where images were only indexed.
    """

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


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write dataset.json durably."""
    content = asdict(manifest)
    for info in content["tasks"].values():
        if not info["facts"]:  # of most kinds
            del info["facts"]
    text = json.dumps({"format": "mtl_dist", "version": FORMAT_VERSION, **content}, indent=2)
    write_text(directory / MANIFEST_NAME, text + "\n")
    if any("." in info.kind for info in manifest.tasks.values()):
        mark(directory, MANIFEST_NAME)


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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
        _check(manifest, Manifest, "")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a complete manifest ({error!r}). Prepare the dataset again.") from None
    with parts_of(Path(str(directory)), MANIFEST_NAME):
        for name, info in manifest.tasks.items():
            refused = refusal(info.kind) if "." in info.kind else ""
            if refused:
                raise UserError(f"{path}: tasks.{name}.kind: {refused}")
    return manifest


def _check(value: Any, hint: Any, where: str) -> None:
    """Refuse what JSON holds in place of a value of the annotated type.

    Raises:
        TypeError: naming it.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, hint):
        hints = get_type_hints(hint)
        for one in fields(hint):
            _check(getattr(value, one.name), hints[one.name], f"{where}.{one.name}".lstrip("."))
        return
    if origin is Literal:
        fits = value in arguments
    elif origin in (Union, UnionType):
        fits = any(_fits(value, argument, where) for argument in arguments)
    elif origin in (dict, Mapping):
        fits = isinstance(value, dict)
        for key, item in value.items() if fits else ():
            _check(item, arguments[1], f"{where}.{key}")
    elif origin is tuple:
        fits = isinstance(value, list | tuple)
        for number, item in enumerate(value if fits else ()):
            _check(item, arguments[0], f"{where}.{number}")
    else:
        wanted = (int, float) if hint is float else hint
        fits = hint is Any or (isinstance(value, wanted) and isinstance(value, bool) == (hint is bool))
    if not fits:
        raise TypeError(f"{where}: {value!r}")


def _fits(value: Any, hint: Any, where: str) -> bool:
    try:
        _check(value, hint, where)
    except TypeError:
        return False
    return True


def _parse(raw: dict[str, Any]) -> Manifest:
    if raw["image_dtype"] not in get_args(ImageDtype):
        raise TypeError(f"image_dtype {raw['image_dtype']!r}")
    if raw.get("labels", "json") not in get_args(LabelPlace):
        raise TypeError(f"labels {raw['labels']!r}")
    content_hashes = raw.get("content_hashes", "digests" if raw.get("digests") else "")  # else: version 1
    if content_hashes not in get_args(HashFiles):
        raise TypeError(f"content_hashes {content_hashes!r}")

    def tuples(values: dict[str, Any]) -> dict[str, Any]:
        return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}

    return Manifest(
        name=raw["name"],
        channels=raw["channels"],
        image_dtype=raw["image_dtype"],
        tasks={name: TaskInfo(**tuples(info)) for name, info in raw["tasks"].items()},
        splits={
            name: SplitInfo(
                num_samples=split["num_samples"],
                shards=tuple(ShardInfo(**shard) for shard in split["shards"]),
                labels={task: LabelCounts(**tuples(counts)) for task, counts in split["labels"].items()},
            )
            for name, split in raw["splits"].items()
        },
        notes=tuple(raw["notes"]),
        labels=raw.get("labels", "json"),
        content_hashes=content_hashes,
        account=raw.get("account", {}),
        pixels=PixelFacts.parse(raw["pixels"]) if raw.get("pixels") else None,
    )
