"""Source files for the importers' tests, and a look at what became of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from mtl_dist.data.manifest import Manifest, read_manifest
from mtl_dist.durable import sha256_of
from mtl_dist.importers import run
from mtl_dist.importers.importer import Importer
from mtl_dist.importers.options import PackOptions

HERE = PackOptions(workers=1)
"""In this process: the tests' data is small."""


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(seed: int, mode: str = "RGB", format: str = "JPEG", size: tuple[int, int] = (10, 12)) -> bytes:
    """The file of a picture of noise."""
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encoded(Image.fromarray(array).convert(mode), format)


def mask(value: int, size: tuple[int, int] = (10, 12)) -> bytes:
    """The file of a mask whose upper three rows are `value`, and 0 elsewhere."""
    array = np.zeros((size[1], size[0]), np.uint8)
    array[:3] = value
    return encoded(Image.fromarray(array))


def fill(root: Path, files: Mapping[str, Any]) -> Path:
    """Write files below `root`: bytes, text, or what becomes JSON."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes | str):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def contents(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file in a dataset."""
    return {path.name: sha256_of(path) for path in directory.iterdir()}


def read_back(directory: Path, split: str) -> list[dict[str, Any]]:
    """The samples of a split, read by plain webdataset."""
    urls = [str(directory / shard.path) for shard in read_manifest(directory).splits[split].shards]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def labels(directory: Path) -> dict[str, dict[str, Any]]:
    """The scalar labels of every sample of every split, by key."""
    return {
        sample["__key__"]: json.loads(sample["json"])
        for split in read_manifest(directory).splits
        for sample in read_back(directory, split)
    }


CSV = """file,split,dx,age,tags,mask
a.png,train,mel,41.0,round|dark,masks/a.png
b.png,train,"nv, common",,round,
c.png,train,mel,7,|,masks/c.png
d.png,val,"nv, common",60,dark,masks/d.png
e.png,val,,nan,,
"""
FILES = {f"{name}.png": picture(number, format="PNG") for number, name in enumerate("abcde")}
MASKS = {f"masks/{name}.png": mask(255) for name in "acd"}
ALL: dict[str, Any] = {
    "classification": {"diagnosis": "dx"},
    "regression": {"age": "age"},
    "multilabel": {"tags": "tags"},
    "segmentation": {"lesion": "mask"},
    "units": {"age": "years"},
}
"""The settings of a table for every task in `CSV`."""


def skin(root: Path, table: str = CSV) -> Path:
    """A directory with a table of labels of every kind, its images and its masks."""
    return fill(root, {"labels.csv": table, **FILES, **MASKS})


def prepared(
    importer: str | type[Importer],
    out: Path,
    options: PackOptions = HERE,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Manifest:
    """The dataset by an importer, in this process; the shared options may be among the settings."""
    shared = {field.name for field in fields(PackOptions)} & set(settings)
    packing = replace(options, **{name: settings.pop(name) for name in shared})
    return run(importer, out, {k: v for k, v in settings.items() if v is not None}, packing, progress)


def prepare(src: Path, out: Path, **arguments: Any) -> Manifest:
    """A dataset from a table."""
    return prepared("table", out, source=src, **arguments)


def prepare_folders(
    src: Path,
    out: Path,
    task: str,
    split: Sequence[float] | None = None,
    options: PackOptions = HERE,
    **more: Any,
) -> Manifest:
    """A dataset from folders of classes."""
    return prepared("folders", out, options, source=src, task=task, split=split, **more)


def prepare_idx(src: Path, out: Path, task: str = "label", **more: Any) -> Manifest:
    """A dataset from IDX files."""
    return prepared("idx", out, source=src, task=task, **more)


def prepare_cifar(src: Path, out: Path, heads: Sequence[str], **more: Any) -> Manifest:
    """A dataset from CIFAR's records."""
    return prepared("cifar", out, source=src, heads=heads, **more)


def prepare_stacks(src: Path, out: Path, **more: Any) -> Manifest:
    """A dataset from TIFF stacks."""
    return prepared("stacks", out, source=src, **more)


def index_tars(
    tars: Sequence[str], out: Path, fields: Mapping[str, Any], options: PackOptions = HERE, **more: Any
) -> Manifest:
    """The dataset over tars that others wrote."""
    return prepared("tars", out, options, source=list(tars), **fields, **more)
