"""CIFAR's binary records: one byte per label, then a 32x32 picture as its red, green and blue planes.

    CIFAR-10    data_batch_1.bin ... test_batch.bin, 1 label:  3,073 bytes per record
    CIFAR-100   train.bin  test.bin, coarse and fine label:    3,074 bytes per record

Any number of labels may precede the picture. The files may be compressed by gzip.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np

from mtl_dist.data.shards import check_task_names
from mtl_dist.errors import UserError
from mtl_dist.importers.arrays import ArrayImporter, ArrayPart, class_names_of, unpacked
from mtl_dist.importers.options import Help
from mtl_dist.importers.sources import Source, Tree
from mtl_dist.importers.splitting import split_name

SIZE = 32
PIXELS = 3 * SIZE * SIZE

_NAME = re.compile(
    r"(?:(?P<split>train|test|val|valid|validation)(?:_batch)?|data_batch)(?:_\d+)?\.bin(?:\.gz)?"
)
_LIKELY_HEADS = range(1, 9)
_NAME_FILES = ("_label_names.txt", "batches.meta.txt")


class Cifar(ArrayImporter):
    """CIFAR's binary records: one byte per label, then 32x32x3 bytes; any number of labels.

    \b
      mtl prepare cifar cifar-100-binary/ data/cifar100 --heads coarse,fine
      mtl prepare cifar cifar-10-batches-bin/ data/cifar10 --heads label

    Class names are those that are given, else the lines of HEAD_label_names.txt (with one head also of
    batches.meta.txt), else the labels themselves.
    """

    def __init__(
        self,
        source: Annotated[Path, Help("A directory or a zip of .bin files, .gz or not.", "SRC")],
        heads: Annotated[tuple[str, ...], Help("What a record's labels are, in their order.", "NAME,...")],
        classes: Annotated[
            dict[str, str | tuple[str, ...]], Help("Class names by label.", "HEAD=NAME,...")
        ] = {},  # noqa: B006 (never changed)
    ) -> None:
        check_task_names(heads)
        if not heads or len(set(heads)) < len(heads):
            raise UserError(f"--heads: expected each name once, found {', '.join(heads) or 'none'}.")
        for head in classes:
            if head not in heads:
                raise UserError(f"--classes: expected one of the heads {', '.join(heads)}, found {head!r}.")
        self.source, self.tree = source, Tree(source)
        files = _files(self.tree)
        self.parts = [_part(name, split, file, heads) for name, (split, file) in files.items()]
        beside = {head: _names_beside(self.tree, head, only=len(heads) == 1) for head in heads}
        given = {head: text.split(",") if isinstance(text, str) else text for head, text in classes.items()}
        self.classes = {
            head: class_names_of(
                head, self.parts, given.get(head) or beside[head], lambda part: str(files[part.name][1])
            )
            for head in heads
        }
        names = [path for path in self.tree.files if path.endswith((*_NAME_FILES,))]
        self.enter_files([*(self.tree.inside(file) for _, file in files.values()), *names])


def is_records(path: str) -> bool:
    """Whether a file is of this form by its name."""
    return _NAME.fullmatch(path.rpartition("/")[2].lower()) is not None


def num_labels(source: Source) -> int | None:
    """The labels of a record, by the size of the file; None where no number of them fits."""
    size = len(unpacked(source))
    return next((number for number in _LIKELY_HEADS if size and size % (number + PIXELS) == 0), None)


def _files(tree: Tree) -> dict[str, tuple[str, Source]]:
    """The split and the source of each file of records, by its name."""
    files: dict[str, tuple[str, Source]] = {}
    for path in tree.files:
        found = _NAME.fullmatch(path.rpartition("/")[2].lower())
        if found is None:
            continue
        name = found[0].partition(".")[0]
        if name in files:
            raise UserError(
                f"{tree}: expected one file {name}, found {files[name][1]} and {path}. Remove one of them."
            )
        files[name] = (split_name(found["split"] or "train"), tree.source(path))
    if not files:
        raise UserError(
            f"{tree}: expected files such as train.bin, data_batch_1.bin and test.bin (or .bin.gz), found "
            f"none of {len(tree.files)} files named so."
        )
    return files


def _part(name: str, split: str, source: Source, heads: Sequence[str]) -> ArrayPart:
    data = unpacked(source)
    size = len(heads) + PIXELS
    if not data or len(data) % size:
        fitting = [number for number in _LIKELY_HEADS if data and len(data) % (number + PIXELS) == 0]
        advice = f" It holds whole records of {fitting[0]} label(s): name as many heads." if fitting else ""
        raise UserError(
            f"{source}: expected records of {size:,} bytes ({len(heads)} label(s) and {SIZE}x{SIZE}x3), "
            f"found {len(data):,}: {len(data) // size:,} records and {len(data) % size:,} bytes.{advice}"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    planes = records[:, len(heads) :].reshape(-1, 3, SIZE, SIZE)
    classes = {head: records[:, position] for position, head in enumerate(heads)}
    return ArrayPart(name, split, planes.transpose(0, 2, 3, 1), classes)


def _names_beside(tree: Tree, head: str, only: bool) -> list[str] | None:
    """The class names in a text file beside the records, one per line; None where there is no such file."""
    wanted = {f"{head}_label_names.txt"} | ({"batches.meta.txt"} if only else set())
    found = [path for path in tree.files if path.rpartition("/")[2].lower() in wanted]
    if not found:
        return None
    source = tree.source(found[0])
    lines = source.read().decode("utf-8-sig", "replace").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{source}: expected one class name per line, each once, found {len(names)} lines.")
    return names
