"""Tiny datasets with every kind of task, whose samples can be recognised by their pixels.

The image of sample i shows the number i in every pixel (red: i % 256, green: i // 256, blue: the mask, times
100). Labels are missing by rule: `digit` in every fifth sample, `value` in every third, `tags` in every
fourth, `shape` in every seventh.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from mtl_dist.data.manifest import LabelCounts, Manifest, SplitInfo, write_manifest
from mtl_dist.data.shards import ShardWriter
from mtl_dist.specs import TaskInfo

HEIGHT, WIDTH = 8, 10
TASKS = {
    "digit": TaskInfo("classification", classes=("a", "b", "c")),
    "value": TaskInfo("regression", unit="mm"),
    "tags": TaskInfo("multilabel", classes=("p", "q", "r", "s")),
    "shape": TaskInfo("segmentation", classes=("ground", "thing")),
}


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def mask_of(number: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, number % WIDTH :] = 1
    return mask


def image_of(number: int) -> np.ndarray:
    plain = np.full((HEIGHT, WIDTH), 1, np.uint8)
    return np.stack([plain * (number % 256), plain * (number // 256), mask_of(number) * 100], axis=-1)


def labels_of(number: int) -> dict[str, object]:
    labels: dict[str, object] = {}
    if number % 5:
        labels["digit"] = number % 3
    if number % 3:
        labels["value"] = number / 4
    if number % 4:
        labels["tags"] = sorted({number % 4, (number // 4) % 4})
    return labels


def masks_of(number: int) -> dict[str, bytes]:
    return {"shape": png(mask_of(number))} if number % 7 else {}


def encoded(number: int) -> bytes:
    return npy(image_of(number))


def write_dataset(
    directory: Path,
    lengths: dict[str, int],
    shard_samples: int = 5,
    encode: Callable[[int], bytes] = encoded,
    extension: str = "npy",
    tasks: dict[str, TaskInfo] = TASKS,
    first: int = 0,
) -> Path:
    """Write splits of these lengths, numbered on from `first`; only labels of `tasks` are written."""
    directory.mkdir(parents=True)
    kinds = {name: info.kind for name, info in tasks.items()}
    splits = {}
    number = first
    for split, length in lengths.items():
        numbers = range(number, number + length)
        number += length
        with ShardWriter(directory, split, kinds, max_samples=shard_samples) as writer:
            for n in numbers:
                labels = {name: label for name, label in labels_of(n).items() if name in tasks}
                masks = {name: mask for name, mask in masks_of(n).items() if name in tasks}
                writer.write(f"sample{n:05d}", encode(n), extension, labels, masks)  # type: ignore[arg-type]
        counts = {name: _counts(name, info, numbers) for name, info in tasks.items()}
        splits[split] = SplitInfo(length, tuple(writer.shards), counts)
    task_infos = {name: _info(name, info, splits) for name, info in tasks.items()}
    write_manifest(directory, Manifest(3, "uint8", task_infos, splits, name=directory.name))
    return directory


def _counts(name: str, info: TaskInfo, numbers: range) -> LabelCounts:
    if info.kind == "segmentation":
        present = [n for n in numbers if n % 7]
        pixels = np.sum(
            [np.zeros(2), *(np.bincount(mask_of(n).ravel(), minlength=2) for n in present)], axis=0
        )
        return LabelCounts(len(present), len(numbers) - len(present), tuple(int(p) for p in pixels))
    values = [labels_of(n)[name] for n in numbers if name in labels_of(n)]
    missing = len(numbers) - len(values)
    if info.kind == "regression":
        return LabelCounts(len(values), missing)
    flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
    counts = np.bincount(np.array(flat, dtype=int), minlength=len(info.classes))
    return LabelCounts(len(values), missing, tuple(int(c) for c in counts))


def _info(name: str, info: TaskInfo, splits: dict[str, SplitInfo]) -> TaskInfo:
    counts = splits["train"].labels[name]
    return replace(info, num_labelled=counts.present, class_counts=counts.class_counts)
