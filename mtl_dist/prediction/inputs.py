"""What people ask to have predicted, as a stream of images: files, folders, patterns, zips, tars, pages of
stacks, prepared datasets, standard input.

Nothing is left out silently: what cannot be read is an input with an error in place of its bytes.
"""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from PIL import Image

from mtl_dist.config.errors import suggest
from mtl_dist.data.images import IMAGE_EXTENSIONS, UnreadableImage, examine_image, extension_of, open_image
from mtl_dist.data.manifest import read_manifest
from mtl_dist.data.map_style import split_reader
from mtl_dist.data.reader import UnreadableSample
from mtl_dist.data.remote import Location, location
from mtl_dist.errors import UserError
from mtl_dist.importers.pixels import encoded_picture
from mtl_dist.importers.sources import Source, Tree
from mtl_dist.importers.tiff import Stack

STANDARD_INPUT = "-"
MANIFEST = "dataset.json"

_TARS = (".tar", ".tar.gz", ".tgz")
_JPEG = b"\xff\xd8\xff"
_TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_IMAGES = (_JPEG, b"\x89PNG", b"GIF8", b"RIFF", b"\x93NUMPY", b"BM", *_TIFFS)
_HEAD = 8

Note = Callable[[str], None]


@dataclass(frozen=True)
class Input:
    """One image to answer for: its name, and its file's bytes or why there are none."""

    name: str
    data: bytes = b""
    error: str = ""


def check_given(given: Sequence[str]) -> None:
    """Refuse what is nothing: no file, folder or URL, and a pattern that no file fits.

    Raises:
        UserError: a line for each.
    """
    missing = [
        f"{one}: expected an image, a folder, an archive, a pattern or a dataset, found nothing there."
        for one in given
        if one != STANDARD_INPUT and "://" not in one and not _matches(one)
    ]
    if missing:
        raise UserError("\n".join(missing))


def inputs_of(given: Sequence[str], split: str | None, stdin: BinaryIO, note: Note) -> Iterator[Input]:
    """Every image of what is `given`, one after another; `split` of prepared datasets, all where it is None.

    Raises:
        UserError: a dataset without the split.
    """
    for one in given:
        if one == STANDARD_INPUT:
            yield from _of_stream(stdin, split, note)
        elif "://" in one:
            yield from _of_dataset(location(one), split)
        else:
            for path in _matches(one):
                yield from _of_path(path, split, note)


def pages(source: Source) -> Iterator[Input]:
    """The images in one file: one, or each frame of several as `NAME#0`, `NAME#1`, ..."""
    name = str(source)
    try:
        head = _head(source)
        if head.startswith(_TIFFS):
            yield from _of_tiff(source)
        elif head.startswith((b"GIF8", b"RIFF", b"\x89PNG")):
            yield from _of_frames(source)
        else:
            yield Input(name, source.read())
    except UserError as error:
        yield Input(name, error=str(error).removeprefix(f"{name}: "))
    except OSError as error:
        yield Input(name, error=f"expected a readable file, found: {error.strerror or error}.")


def _matches(given: str) -> list[Path]:
    path = Path(given)
    if path.exists() or not glob.has_magic(given):
        return [path] if path.exists() else []
    return [Path(found) for found in sorted(glob.glob(given, recursive=True))]


def _of_path(path: Path, split: str | None, note: Note) -> Iterator[Input]:
    if (path / MANIFEST).is_file():
        yield from _of_dataset(path, split)
    elif path.is_dir() or path.suffix.lower() == ".zip":
        yield from _of_tree(path, note)
    elif path.name.lower().endswith(_TARS):
        yield from _of_tar(path)
    else:
        yield from pages(_source(path))


def _source(path: Path) -> Source:
    try:
        status = path.stat()
    except OSError:
        return Source(str(path), 0, 0)
    return Source(str(path), status.st_size, status.st_mtime_ns)


def _of_tree(path: Path, note: Note) -> Iterator[Input]:
    try:
        tree = Tree(path)
        files = tree.files
    except UserError as error:
        yield Input(str(path), error=str(error).removeprefix(f"{path}: "))
        return
    images = [name for name in files if extension_of(name) in IMAGE_EXTENSIONS]
    if len(images) < len(files):
        note(f"{path}: {len(files) - len(images)} of {len(files)} files are no images by their names.")
    for name in images:
        yield from pages(tree.source(name))


def _of_tar(path: Path) -> Iterator[Input]:
    """The images of a tar as WebDataset has them: the files of a sample stand together, masks beside it."""
    try:
        with tarfile.open(path, "r|*") as tar:
            members = (member for member in tar if member.isfile() and _is_data(member.name))
            for _, group in groupby(members, lambda member: _key_and_extension(member.name)[0]):
                images: list[Input] = []
                others: list[Input] = []
                for member in group:
                    file = tar.extractfile(member)
                    assert file is not None
                    plain = _key_and_extension(member.name)[1] in IMAGE_EXTENSIONS
                    if plain or extension_of(member.name) in IMAGE_EXTENSIONS:
                        (images if plain else others).append(Input(f"{path}/{member.name}", file.read()))
                yield from images or others
    except (tarfile.TarError, OSError, EOFError) as error:
        yield Input(str(path), error=f"expected a readable tar, found: {error}.")


def _is_data(name: str) -> bool:
    return not any(part.startswith(".") for part in PurePosixPath(name).parts)


def _key_and_extension(name: str) -> tuple[str, str]:
    """A member's name before and after the first dot of its last part."""
    folder, _, file = name.rpartition("/")
    key, _, extension = file.partition(".")
    return f"{folder}/{key}", extension.lower()


def _of_dataset(place: Location, split: str | None) -> Iterator[Input]:
    manifest = read_manifest(place)
    if split is not None and split not in manifest.splits:
        raise UserError(
            f"{place}: expected a split {split!r}, found none of this name. {suggest(split, manifest.splits)}"
        )
    for name in [split] if split is not None else manifest.splits:
        reader = split_reader(place, manifest, name)
        for row in range(reader.num_samples):
            try:
                sample = reader.read(row)
            except UnreadableSample as error:
                yield Input(f"{place}/{name}/{row}", error=f"expected a readable sample, found: {error}.")
            else:
                yield Input(f"{place}/{name}/{sample.key}", bytes(sample.image))


def _of_stream(stream: BinaryIO, split: str | None, note: Note) -> Iterator[Input]:
    """The image that comes through a pipe, or those at the paths there, one a line."""
    head = stream.read(_HEAD)
    if head.startswith(_IMAGES):
        yield Input(STANDARD_INPUT, head + stream.read())
        return
    if not head.endswith(b"\n"):
        head += stream.readline()
    for lines in (head.splitlines(), stream):
        for line in lines:
            text = os.fsdecode(line.rstrip(b"\r\n"))
            if not text:
                continue
            try:
                check_given([text])
            except UserError:
                yield Input(text, error="expected an image, found nothing there.")
            else:
                yield from inputs_of([text], split, stream, note)


def _head(source: Source) -> bytes:
    if source.archive:
        return source.read()[:_HEAD]
    with open(source.path, "rb") as file:
        return file.read(_HEAD)


def _place(source: Source) -> bytes | Path:
    return source.read() if source.archive else Path(source.path)


def _of_frames(source: Source) -> Iterator[Input]:
    """A GIF, WebP or PNG, which may be an animation."""
    name = str(source)
    try:
        with open_image(_place(source)) as image:
            count = getattr(image, "n_frames", 1)
            if count == 1:
                yield Input(name, source.read())
                return
            for number in range(count):
                image.seek(number)
                yield Input(f"{name}#{number}", _encoded(image.convert("RGB")))
    except UnreadableImage as error:
        yield Input(name, error=f"expected a readable image, found: {error}.")


def _encoded(image: Image.Image) -> bytes:
    import numpy as np

    return encoded_picture(np.array(image))


def _of_tiff(source: Source) -> Iterator[Input]:
    """By Pillow where it sees all that the file holds, else frame by frame."""
    name = str(source)
    if _is_whole_by_pillow(source):
        yield Input(name, source.read())
        return
    stack = Stack(source)
    for number in range(stack.num_frames):
        frame = f"{name}#{number}" if stack.num_frames > 1 else name
        try:
            data = encoded_picture(stack.frame(number))
        except UserError as error:
            yield Input(frame, error=str(error))
        else:
            yield Input(frame, data)


def _is_whole_by_pillow(source: Source) -> bool:
    """Whether it is one picture, of no more channels and no more depth than Pillow gives."""
    samples_per_pixel = 277
    try:
        with open_image(_place(source)) as image:
            if getattr(image, "n_frames", 1) > 1:
                return False
            tags = getattr(image, "tag_v2", {})
            if tags.get(samples_per_pixel, 1) != len(image.getbands()):
                return False
        examine_image(source.read(), decode=False)
    except UnreadableImage:
        return False
    return True
