"""Loaders to measure beside ours: each turns the same JPEGs into batches of 64 random crops of 224x224.

All decode with torchvision and crop and flip with its transforms on uint8 tensors, so that what differs is
the loader. Ours and "webdataset, uint8" leave it to the device to make floats of the batch; the others
normalise, as is usual, image by image.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2 as vision
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, decode_png, read_file

from mtl_dist.data.decode import open_picture
from mtl_dist.data.loader import BatchLoader, open_data, train_loader
from mtl_dist.data.manifest import read_manifest
from mtl_dist.data.pictures import Box, Resizing
from mtl_dist.data.reader import SplitReader
from mtl_dist.data.settings import DataSettings
from mtl_dist.data.transforms import AugmentSettings, Transform
from mtl_dist.data.turbojpeg import VARIABLE, find_turbojpeg
from mtl_dist.randomness import Draws, derive_key

SIDE, BATCH, SMALL_SIDE, SMALL_BATCH = 224, 64, 28, 256
TASK = "label"

_CROP_AND_FLIP = AugmentSettings(crop_scale=(0.08, 1.0), flip=True)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Contender:
    """One loader: its name, how it turns a number of workers into batches, the package that it needs."""

    name: str
    batches: Callable[[Path, int], Any]
    needs: str = "mtl_dist"
    prepare: Callable[[Path, list[bytes]], None] | None = None

    @property
    def is_installed(self) -> bool:
        """Whether its package is there."""
        return importlib.util.find_spec(self.needs) is not None


# ---------------------------------------------------------------- ours
def ours(
    directory: Path, workers: int, side: int = SIDE, batch: int = BATCH, crop: bool = True
) -> BatchLoader:
    """An epoch of our loader over `directory`."""
    augment = _CROP_AND_FLIP if crop else AugmentSettings()
    stated = {"train": [{"path": str(directory)}], "image_size": side, "augment": augment}
    data = open_data(DataSettings.model_validate(stated, strict=False), [TASK])
    return train_loader(
        data,
        seed=0,
        global_batch=batch,
        accumulation=1,
        rank=0,
        world_size=1,
        start_position=0,
        end_position=data.num_train_samples,
        workers=workers,
        pin_memory=False,
    )


def ours_whole(directory: Path, workers: int) -> BatchLoader:
    """Ours without TurboJPEG 3: by simplejpeg where it is installed, else by torchvision."""
    os.environ[VARIABLE] = ""
    find_turbojpeg.cache_clear()
    return ours(directory, workers)


class CropsAlone:
    """No loader: our decoder on crops drawn as ours draws them, one by one, from memory, and nothing else.

    What a loader takes beyond this goes into reading, resizing and putting batches together.
    """

    def __init__(self, directory: Path, workers: int) -> None:
        manifest = read_manifest(directory)
        reader = SplitReader(directory, manifest, "train")
        transform = Transform((SIDE, SIDE), "stretch", _CROP_AND_FLIP)
        self._crops: list[tuple[memoryview, Box]] = []
        for row in range(reader.num_samples):
            image = reader.read(row).image
            size = open_picture(image, manifest.channels).size
            self._crops.append((image, transform.source(size, Draws(derive_key(row)))))

    def __iter__(self) -> Iterator[tuple[list[Resizing]]]:
        for image, box in self._crops:
            yield ([open_picture(image, 3).decode(box, (SIDE, SIDE))],)


# ---------------------------------------------------------------- what the others have in common
def _decoded(data: bytes) -> Tensor:
    image: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return image


def _views(floats: bool) -> Callable[[Tensor], Tensor]:
    steps: list[Any] = [vision.RandomResizedCrop(SIDE, antialias=True), vision.RandomHorizontalFlip()]
    if floats:
        steps += [vision.ToDtype(torch.float32, scale=True), vision.Normalize(_MEAN, _STD)]
    return vision.Compose(steps)


def _stacked(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


def _loader(dataset: Any, workers: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=_stacked, **options)


# ---------------------------------------------------------------- webdataset and wids
def web(directory: Path, workers: int, floats: bool = True) -> Any:
    """webdataset over our tars."""
    view = _views(floats)

    def sample(parts: tuple[bytes, bytes]) -> tuple[Tensor, int]:
        return view(_decoded(parts[0])), json.loads(parts[1])[TASK]

    return _web(directory, workers, "jpg", sample, BATCH)


def web_small(directory: Path, workers: int, extension: str) -> Any:
    """webdataset over tars of small images."""

    def sample(parts: tuple[bytes, bytes]) -> tuple[Tensor, int]:
        if extension == "png":
            image = decode_png(torch.frombuffer(bytearray(parts[0]), dtype=torch.uint8))
        else:
            image = torch.from_numpy(np.load(io.BytesIO(parts[0])))[None]
        return image, json.loads(parts[1])[TASK]

    return _web(directory, workers, extension, sample, SMALL_BATCH)


def _web(directory: Path, workers: int, extension: str, sample: Callable[[Any], Any], batch: int) -> Any:
    import webdataset

    shards = sorted(map(str, directory.glob("*.tar")))
    dataset = webdataset.WebDataset(
        shards, shardshuffle=len(shards), workersplitter=webdataset.split_by_worker
    )
    dataset = dataset.shuffle(256).to_tuple(extension, "json").map(sample)
    return webdataset.WebLoader(
        dataset.batched(batch, collation_fn=_stacked), batch_size=None, num_workers=workers
    )


def wids(directory: Path, workers: int) -> DataLoader[Any]:
    """wids over our tars."""
    view = _views(True)
    manifest = json.loads((directory / "dataset.json").read_text())
    shards = [
        {"url": str(directory / shard["path"]), "nsamples": shard["num_samples"]}
        for shard in manifest["splits"]["train"]["shards"]
    ]

    def sample(parts: dict[str, Any]) -> tuple[Tensor, int]:
        return view(_decoded(parts[".jpg"].read())), json.loads(parts[".json"].read())[TASK]

    dataset = importlib.import_module("wids").ShardListDataset(shards, transformations=[sample])
    return _loader(dataset, workers, shuffle=True)


# ---------------------------------------------------------------- a folder of files
def write_folder(directory: Path, images: list[bytes]) -> None:
    """One file per image, in one class."""
    folder = directory / "folder" / "class"
    folder.mkdir(parents=True)
    for number, data in enumerate(images):
        (folder / f"{number:06d}.jpg").write_bytes(data)


def image_folder(directory: Path, workers: int) -> DataLoader[Any]:
    """torchvision's ImageFolder, decoding by torchvision."""

    def load(path: str) -> Tensor:
        image: Tensor = decode_jpeg(read_file(path), ImageReadMode.RGB)
        return image

    return _loader(ImageFolder(directory / "folder", _views(True), loader=load), workers, shuffle=True)


# ---------------------------------------------------------------- external formats
def write_mds(directory: Path, images: list[bytes]) -> None:
    """Shards of mosaicml-streaming."""
    streaming = importlib.import_module("streaming")
    with streaming.MDSWriter(out=str(directory / "mds"), columns={"jpg": "bytes", TASK: "int"}) as writer:
        for data in images:
            writer.write({"jpg": data, TASK: 0})


def mosaic(directory: Path, workers: int) -> DataLoader[Any]:
    """mosaicml-streaming over shards of its own format."""
    streaming = importlib.import_module("streaming")
    streaming.base.util.clean_stale_shared_memory()
    view = _views(True)

    class Images(streaming.StreamingDataset):  # type: ignore[name-defined]
        def __getitem__(self, at: Any) -> tuple[Tensor, int]:
            sample = super().__getitem__(at)
            return view(_decoded(sample["jpg"])), sample[TASK]

    return _loader(Images(local=str(directory / "mds"), batch_size=BATCH, shuffle=True), workers)


def write_litdata(directory: Path, images: list[bytes]) -> None:
    """Chunks of litdata."""
    writer = importlib.import_module("litdata.streaming.writer").BinaryWriter(
        str(directory / "litdata"), chunk_bytes=1 << 26
    )
    for number, data in enumerate(images):
        writer.add_item(number, {"jpg": data, TASK: 0})
    writer.done()
    writer.merge()


def lit(directory: Path, workers: int) -> Any:
    """litdata over chunks of its own format."""
    litdata = importlib.import_module("litdata")
    view = _views(True)

    class Images(litdata.StreamingDataset):  # type: ignore[name-defined]
        def __getitem__(self, at: Any) -> tuple[Tensor, int]:
            sample = super().__getitem__(at)
            return view(_decoded(sample["jpg"])), sample[TASK]

    dataset = Images(str(directory / "litdata"), shuffle=True)
    return litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=_stacked)


PHOTOS: tuple[Contender, ...] = (
    Contender("decoding alone, region decode", CropsAlone),
    Contender("ours, region decode", ours),
    Contender("ours, whole images", ours_whole),
    Contender("webdataset", web, "webdataset"),
    Contender("webdataset, uint8", partial(web, floats=False), "webdataset"),
    Contender("wids", wids, "wids"),
    Contender("ImageFolder", image_folder, "torchvision", write_folder),
    Contender("mosaicml-streaming", mosaic, "streaming", write_mds),
    Contender("litdata", lit, "litdata", write_litdata),
)
SMALL: dict[str, tuple[Contender, ...]] = {
    extension: (
        Contender("ours", partial(ours, side=SMALL_SIDE, batch=SMALL_BATCH, crop=False)),
        Contender("webdataset", partial(web_small, extension=extension), "webdataset"),
    )
    for extension in ("png", "npy")
}
