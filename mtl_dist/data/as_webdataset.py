"""A dataset as a pipeline of the package webdataset, for training loops that other people wrote.

    loader = mtl_dist.webdataset("data/cats").shuffle(1000).to_tuple("image", "breed").batched(64)

The shards are plain WebDataset tars; what is added is the meaning of their labels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl_dist.config.errors import suggest
from mtl_dist.data.decode import decode_image, decode_map
from mtl_dist.data.images import UnreadableImage
from mtl_dist.data.manifest import Manifest, read_manifest
from mtl_dist.data.remote import beside, location
from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import MapKind, ScalarKind
from mtl_dist.kinds.registry import kind_of
from mtl_dist.kinds.vocabulary import LabelError

if TYPE_CHECKING:
    from webdataset import WebDataset


def webdataset(
    dataset: str | Path, split: str = "train", *, decode: bool = True, **options: Any
) -> WebDataset:
    """A split of a dataset as a `webdataset.WebDataset`: stored order, divided over ranks and workers.

    A sample is a dictionary: `__key__`, `image` (a tensor (C, H, W), upright, with the dataset's channels;
    without `decode` the file's bytes) and each task of the dataset: a class index, a list of them, a number,
    or the map's array as its kind means it. Without a label it is None, which `to_tuple` wants to be told:
    `none_is_error=False`. `options` are those of `WebDataset`, such as `shardshuffle=100`.

    Raises:
        UserError: no dataset there, no such split, or one over tars that others wrote.
    """
    from webdataset import WebDataset, split_by_node

    place = location(dataset)
    manifest = read_manifest(place)
    if split not in manifest.splits:
        raise UserError(
            f"{place}: expected a split {split!r}, found none of this name. "
            f"{suggest(split, manifest.splits, 'It has')}"
        )
    if manifest.labels != "json":
        raise UserError(
            f"{place}: expected shards that `mtl prepare` packed, found an index over others' tars. "
            "Read those with webdataset.WebDataset."
        )
    shards = [str(beside(place, shard.path)) for shard in manifest.splits[split].shards]
    options = {"shardshuffle": False, "nodesplitter": split_by_node} | options
    return WebDataset(shards, **options).map(_Meaning(manifest, decode))


@dataclass(frozen=True)
class _Meaning:
    """From the members of a sample to its image and labels; it can be sent to workers."""

    manifest: Manifest
    decode: bool

    def __call__(self, members: Mapping[str, Any]) -> dict[str, Any]:
        where = f"{members['__url__']}, sample {members['__key__']}"
        try:
            return {"__key__": members["__key__"], "__url__": members["__url__"]} | self._parts(members)
        except (UnreadableImage, ValueError) as error:
            raise UserError(f"{where}: {str(error).rstrip('.')}. Prepare the dataset again.") from None
        except LabelError as error:
            raise UserError(f"{where}: {error} Prepare the dataset again.") from None

    def _parts(self, members: Mapping[str, Any]) -> dict[str, Any]:
        tasks = self.manifest.tasks
        files = {name: data for name, data in members.items() if not name.startswith("__")}
        stored = json.loads(files.pop("json"))
        parts: dict[str, Any] = {}
        for name, info in tasks.items():
            kind = kind_of(info.kind)
            if isinstance(kind, MapKind):
                found = [files.pop(member) for member in list(files) if member.partition(".")[0] == name]
                values = None if not found else kind.values(decode_map(memoryview(found[0])), info)
                parts[name] = values
            elif isinstance(kind, ScalarKind):
                parts[name] = stored.get(name)
        if len(files) != 1:
            raise ValueError(f"expected one image, found {', '.join(map(str, files)) or 'none'}")
        (image,) = files.values()
        if self.decode:
            image = decode_image(image, self.manifest.channels, self.manifest.image_dtype)
        return {"image": image} | parts
