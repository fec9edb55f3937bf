"""IDX files, as MNIST and its relatives come: a file of pictures and a file of labels for each split.

    train-images-idx3-ubyte[.gz]  train-labels-idx1-ubyte[.gz]  t10k-images-idx3-ubyte[.gz]  ...

A file is two zero bytes, the type of its values (8: unsigned bytes, the only one taken), the number of
dimensions, each dimension as 4 bytes (big-endian), and the values.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np

from mtl_dist.data.shards import check_task_names
from mtl_dist.errors import UserError
from mtl_dist.importers.arrays import ArrayImporter, ArrayPart, class_names_of, unpacked
from mtl_dist.importers.measures import require_measures
from mtl_dist.importers.options import Help
from mtl_dist.importers.sources import Source, Tree
from mtl_dist.importers.splitting import split_name

_NAME = re.compile(
    r"(?P<of>.*?(?P<split>train(?:ing)?|t10k|test(?:ing)?|val(?:id|idation)?))"
    r"[-_.](?P<what>images|labels)[-_.]idx(?P<dims>\d)[-_.]ubyte(?:\.gz)?",
    re.IGNORECASE,
)
_UNSIGNED_BYTES = 8
_TYPES = {9: "signed bytes", 11: "16-bit integers", 12: "32-bit integers", 13: "floats", 14: "doubles"}


class Idx(ArrayImporter):
    """MNIST and its relatives: train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-...

    \b
      mtl prepare idx mnist/ data/mnist --task digit
      mtl prepare idx mnist/ data/strokes --task digit --measure thickness,slant
    """

    def __init__(
        self,
        source: Annotated[Path, Help("A directory or a zip of IDX files, .gz or not.", "SRC")],
        task: Annotated[str, Help("The task's name.", "NAME")] = "label",
        classes: Annotated[
            tuple[str, ...], Help("Class names by label; without it the labels.", "NAME,...")
        ] = (),
        measure: Annotated[
            tuple[str, ...],
            Help(
                "Measured on every picture, a task of numbers each: thickness (px), slant (degrees).",
                "WHAT,...",
            ),
        ] = (),
    ) -> None:
        require_measures(measure)
        check_task_names((task, *measure))
        if task in measure:
            raise UserError(f"--task: expected another name than the measure {task!r}.")
        self.source, self.tree, self.measures = source, Tree(source), measure
        files = _pairs(self.tree)
        self.parts = [_part(name, files[name], task) for name in files]
        for part in self.parts:
            if measure and part.pictures.ndim != 3:
                raise UserError(
                    f"{files[part.name]['images']}: expected grey pictures to measure, found colour."
                )
        names = class_names_of(
            task, self.parts, classes or None, lambda part: str(files[part.name]["labels"])
        )
        self.classes = {task: names}
        self.enter_files(self.tree.inside(file) for pair in files.values() for file in pair.values())


def is_idx(name: str) -> bool:
    """Whether a file is of this form by its name."""
    return _NAME.fullmatch(name) is not None


def _pairs(tree: Tree) -> dict[str, dict[str, Source]]:
    """The pictures and the labels of each part, by its name."""
    pairs: dict[str, dict[str, Source]] = {}
    for path in tree.files:
        found = _NAME.fullmatch(path.rpartition("/")[2])
        if found is None:
            continue
        name = re.sub(r"[^A-Za-z0-9-]+", "_", found["of"])[-48:]
        pair = pairs.setdefault(name, {})
        what = found["what"].lower()
        if what in pair:
            raise UserError(
                f"{tree}: expected one file of {name} {what}, found {pair[what]} and {path}. "
                "Remove one of them."
            )
        pair[what] = tree.source(path)
    if not pairs:
        raise UserError(
            f"{tree}: expected files such as train-images-idx3-ubyte.gz, found none of {len(tree.files)} "
            "files named so."
        )
    for name, pair in pairs.items():
        missing = {"images", "labels"} - set(pair)
        if missing:
            raise UserError(
                f"{next(iter(pair.values()))}: expected a file of {missing.pop()} of {name} beside it, "
                "found none."
            )
    return pairs


def _part(name: str, pair: dict[str, Source], task: str) -> ArrayPart:
    pictures, labels = read_idx(pair["images"]), read_idx(pair["labels"])
    if pictures.ndim not in (3, 4) or (pictures.ndim == 4 and pictures.shape[3] not in (1, 3)):
        raise UserError(
            f"{pair['images']}: expected pictures (number, height, width), found {pictures.ndim} "
            f"dimensions ({_shape(pictures.shape)})."
        )
    if labels.ndim != 1:
        raise UserError(
            f"{pair['labels']}: expected one label per picture, found {labels.ndim} dimensions "
            f"({_shape(labels.shape)}). Are the two files exchanged?"
        )
    if len(pictures) != len(labels):
        raise UserError(
            f"{pair['labels']}: expected {len(pictures):,} labels, one per picture in {pair['images']}, "
            f"found {len(labels):,}."
        )
    found = _NAME.fullmatch(Path(pair["images"].path).name)
    assert found is not None
    split = found["split"].lower()
    return ArrayPart(name, "test" if split == "t10k" else split_name(split), pictures, {task: labels})


def read_idx(source: Source) -> np.ndarray:
    """The array in an IDX file of unsigned bytes, which may be compressed by gzip.

    Raises:
        UserError: not an IDX file, of other values, or of another size than its header says.
    """
    data = unpacked(source)
    if len(data) < 4 or data[:2] != b"\0\0" or data[3] == 0:
        raise UserError(
            f"{source}: expected an IDX file, which begins with 00 00 08, found "
            f"{data[:4].hex(' ') or 'an empty file'}."
        )
    if data[2] != _UNSIGNED_BYTES:
        kind = _TYPES.get(data[2], f"values of an unknown type {data[2]}")
        raise UserError(f"{source}: expected an IDX file of unsigned bytes (type 8), found {kind}.")
    begin = 4 + 4 * data[3]
    if len(data) < begin:
        raise UserError(f"{source}: expected a header of {begin} bytes, found {len(data)}. Copy it again.")
    shape = struct.unpack(f">{data[3]}I", data[4:begin])
    size = math.prod(shape)
    if len(data) != begin + size:
        raise UserError(
            f"{source}: expected {begin + size:,} bytes ({_shape(shape)} and the header), found "
            f"{len(data):,}. Copy it again."
        )
    if size == 0:
        raise UserError(f"{source}: expected values, found none ({_shape(shape)}).")
    return np.frombuffer(data, np.uint8, offset=begin).reshape(shape)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
