"""Map-style Datasets, as people write them, over the samples of `tests/tiny_datasets.py`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from tests.tiny_datasets import TASKS, image_of, labels_of, mask_of


class Tiny(Dataset[Any]):
    """Samples from `first` on as mappings, their labels missing where those of the tiny ones are."""

    def __init__(self, length: int = 20, first: int = 0, broken: int = -1, folder: Path = Path(".")) -> None:
        self.length, self.first, self.broken = length, first, broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        number = self.first + index
        if index == self.broken:
            raise OSError("no such file")
        mask = {"shape": mask_of(number)} if number % 7 else {}
        classes = TASKS["digit"].classes
        labels = labels_of(number)
        if "digit" in labels:
            labels["digit"] = classes[labels["digit"]]  # type: ignore[index]
        return {"image": image_of(number), **labels, **mask}


class Pairs(Tiny):
    """Tuples of a tensor and a class, as torchvision has them."""

    classes = ("a", "b", "c")

    def __getitem__(self, index: int) -> Any:
        return torch.from_numpy(image_of(index)).permute(2, 0, 1), index % 3


class Nested(Tiny):
    """Tuples of a picture and labels by task."""

    def __getitem__(self, index: int) -> Any:
        tags = np.zeros(4, np.int64)
        tags[index % 4] = 1
        return Image.fromarray(image_of(index)), {"digit": "abc"[index % 3], "tags": tags}


class Known(Tiny):
    """It says itself by what it is known."""

    def fingerprint(self) -> str:
        return "version 3"


class Unsteady(Tiny):
    """Its images are others at every time."""

    def __getitem__(self, index: int) -> Any:
        return {"image": image_of(random.randrange(200)), "digit": "a"}


class Odd(Tiny):
    """A label of another form."""

    def __getitem__(self, index: int) -> Any:
        return {"image": image_of(index), "digit": object()}


class Endless(IterableDataset[Any]):
    """Read from its beginning to its end."""

    def __iter__(self) -> Iterator[Any]:
        yield from ()
