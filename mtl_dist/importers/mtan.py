"""NYUv2 and Cityscapes as the multi-task field has them: MTAN's folders of arrays.

    train|val / image | label | depth | normal / 0.npy, 1.npy, ...

Of each picture an array of the same number: the image (H, W, 3) in 0 to 1, classes (H, W) where -1 is no
label, depth (H, W, 1) where 0 is none, normals (H, W, 3) where 0, 0, 0 is none. From
https://github.com/lorenmt/mtan.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import numpy as np
from PIL import Image

from mtl_dist.config.describe import listed
from mtl_dist.errors import UserError
from mtl_dist.importers.account import IMAGE, MASK
from mtl_dist.importers.importer import Importer
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.options import Help
from mtl_dist.importers.sources import Source, Tree
from mtl_dist.importers.splitting import split_name
from mtl_dist.kinds.depth import Depth
from mtl_dist.kinds.normals import Normals
from mtl_dist.kinds.segmentation import Segmentation
from mtl_dist.specs import IGNORE

_NO_LABEL = -1
_FOLDERS = {"label": "semantic", Depth.name: Depth.name, "normal": "normal"}
"""The task that each folder beside the images is."""

_NYUV2 = (
    "bed",
    "books",
    "ceiling",
    "chair",
    "floor",
    "furniture",
    "objects",
    "picture",
    "sofa",
    "table",
    "tv",
    "wall",
    "window",
)
"""The 13 classes of https://arxiv.org/abs/1301.3572, in their order."""


@dataclass(frozen=True, slots=True)
class NpyPicture:
    """An image or a mask of classes in an .npy file, as PNG. An image is rounded to 8 bits."""

    source: Source
    what: Literal["image", "label"]

    @property
    def size(self) -> int:
        return self.source.size

    def read(self) -> bytes:
        array = read_array(self.source)
        picture = self._image(array) if self.what == "image" else self._classes(array)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def _image(self, array: np.ndarray) -> np.ndarray:
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype.kind not in "uif":
            raise UserError(f"{self.source}: expected an image (H, W, 3), found {described(array)}.")
        if array.dtype == np.uint8:
            return array
        low, high = float(array.min(initial=0)), float(array.max(initial=0))
        if not (low >= 0 and high <= 1):  # NaN too
            raise UserError(f"{self.source}: expected values from 0 to 1, found {low:g} to {high:g}.")
        return np.rint(array * 255).astype(np.uint8)

    def _classes(self, array: np.ndarray) -> np.ndarray:
        classes = class_map(array, self.source)
        return np.where(classes == _NO_LABEL, IGNORE, classes).astype(np.uint8)

    def __str__(self) -> str:
        return str(self.source)


class Mtan(Importer):
    """NYUv2 or Cityscapes in MTAN's folders: train|val/image|label|depth|normal/N.npy.

    \b
      mtl prepare mtan nyuv2/ data/nyuv2 --classes nyuv2
      mtl prepare mtan cityscapes2/ data/cityscapes

    The tasks are `semantic`, `depth` and `normal`, as far as their folders are there. Images are rounded to 8
    bits. Without --classes they are called by their numbers.
    """

    def __init__(
        self,
        source: Annotated[Path, Help("The folder, or a zip, with train/ and val/ in it.", "SRC")],
        classes: Annotated[
            tuple[str, ...], Help("Class names by index, or nyuv2: its 13.", "NAME,...|nyuv2")
        ] = (),
        label: Annotated[str, Help("The folder of classes: label, label_7, label_19.", "FOLDER")] = "label",
        unit: Annotated[str, Help("The unit of depth: m for NYUv2.", "UNIT")] = "",
        metric: Annotated[
            bool, Help("Depth is a distance: enlarging a picture by 2 halves it. Not so with disparity.")
        ] = False,
    ) -> None:
        self._source, self._tree = source, Tree(source)
        self._names = _NYUV2 if classes == ("nyuv2",) else classes
        self._unit, self._metric = unit, metric
        folders = {label if folder == "label" else folder: task for folder, task in _FOLDERS.items()}
        self._images: dict[tuple[str, str], str] = {}
        self._maps: dict[str, dict[tuple[str, str], str]] = {}
        others: set[str] = set()
        for path in self._tree.files:
            parts = PurePosixPath(path).parts
            if len(parts) < 3 or not path.endswith(".npy"):
                continue
            place = (split_name(parts[-3]), PurePosixPath(path).stem)
            if parts[-2] == "image":
                self._images[place] = path
            elif parts[-2] in folders:
                self._maps.setdefault(folders[parts[-2]], {})[place] = path
            elif parts[-2].startswith("label"):
                others.add(parts[-2])
        if others and "semantic" not in self._maps:
            raise UserError(
                f"{source}: expected a folder {label} of classes in train and val, found "
                f"{listed(sorted(others))}. Name one: --label {min(others)}."
            )
        if not self._images or not self._maps:
            raise UserError(
                f"{source}: expected train/image/0.npy, train/{label}/0.npy and so on, found "
                f"{len(self._images)} images and maps of {listed(sorted(self._maps))}. Name the "
                "folder that has train and val in it."
            )
        for task, maps in self._maps.items():
            if lonely := sorted(set(maps) - set(self._images)):
                split, stem = lonely[0]
                raise UserError(
                    f"{source}: expected an image for each map of {task}, found none for {len(lonely)} "
                    f"({split}/image/{stem}.npy). Copy the folders again."
                )
        self._tree.enter(self.account)
        for path in self._images.values():
            self.account.became("files", path, IMAGE)
        for maps in self._maps.values():
            for path in maps.values():
                self.account.became("files", path, MASK)
        self.account.rest("files", "left out: in none of the folders that are read")

    @property
    def name(self) -> str:
        return self._source.resolve().stem

    def tasks(self) -> Mapping[str, TaskSource]:
        sources = {
            "semantic": lambda: TaskSource(Segmentation.name, self._classes()),
            Depth.name: lambda: TaskSource(
                Depth.name, unit=self._unit, facts={"metric": True} if self._metric else {}
            ),
            "normal": lambda: TaskSource(Normals.name),
        }
        return {task: source() for task, source in sources.items() if task in self._maps}

    def records(self) -> Iterator[Record]:
        for place, path in sorted(self._images.items()):
            split, stem = place
            masks = {
                task: NpyPicture(self._tree.source(maps[place]), "label")
                if task == "semantic"
                else self._tree.source(maps[place])
                for task, maps in self._maps.items()
                if place in maps
            }
            image = NpyPicture(self._tree.source(path), "image")
            yield Record(f"{split}_{stem}", image, {}, masks, split=split, path=path)

    def notes(self) -> Iterator[str]:
        splits = Counter(split for split, _ in self._images)
        for split, num_images in splits.items():
            for task, maps in self._maps.items():
                missing = sorted(place for place in self._images if place[0] == split and place not in maps)
                if (
                    0 < len(missing) < num_images
                ):  # all of them: no labels in the split, which is said for all
                    yield f"{split}: images without a map of {task}: {len(missing)} ({missing[0][1]} is one)"

    def _classes(self) -> tuple[str, ...]:
        """The names of the classes: those that are given, or the numbers up to the largest that occurs."""
        largest, where = -1, ""
        for path in self._maps["semantic"].values():
            source = self._tree.source(path)
            found = int(class_map(read_array(source), source).max(initial=-1))
            if found > largest:
                largest, where = found, path
        if self._names and largest >= len(self._names):
            raise UserError(
                f"--classes: expected a name for each class up to {largest} ({where}), found "
                f"{len(self._names)}. Add the others."
            )
        return self._names or tuple(str(number) for number in range(largest + 1))


def read_array(source: Source) -> np.ndarray:
    """The array in an .npy file; nothing is unpickled.

    Raises:
        UserError: it cannot be read.
    """
    try:
        array: np.ndarray = np.load(io.BytesIO(source.read()), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{source}: expected an array, found: {error}. Copy it again.") from None
    return array


def class_map(array: np.ndarray, source: Source) -> np.ndarray:
    """A map of classes as whole numbers, -1 where there is no label.

    Raises:
        UserError: it has another shape, or other numbers.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 or array.dtype.kind not in "uif":
        raise UserError(f"{source}: expected classes (H, W), found {described(array)}.")
    wrong = (array != np.rint(array)) | (array < _NO_LABEL) | (array >= IGNORE)
    if wrong.any():
        raise UserError(
            f"{source}: expected classes from 0 to {IGNORE - 1} and {_NO_LABEL} for none, found "
            f"{array[wrong][0]:g} among them. Correct the file."
        )
    return array.astype(np.int64)


def described(array: np.ndarray) -> str:
    """An array's type and shape in words."""
    return f"{array.dtype.name} ({', '.join(map(str, array.shape))})"
