"""The classes that a function of the user's makes of a split's stored images.

They have to be known before training: they are counted, and samples may be drawn by them. So each image is
read and decoded once, in one process, before the first run with the function. The classes are kept in the
user's cache folder under a name that says what they were made of: the samples, the function, the sources that
it imports, what decodes the images. Whoever asks next, another rank or run, takes them from there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from pathlib import Path

import numpy as np

from mtl_dist.config.user_modules import hash_of, user_modules
from mtl_dist.data.decode import decode_image, decoder_name
from mtl_dist.data.derived import OfImages
from mtl_dist.data.images import UnreadableImage
from mtl_dist.data.manifest import Manifest
from mtl_dist.data.map_style import split_reader
from mtl_dist.data.reader import SplitReader, UnreadableSample
from mtl_dist.data.remote import Location
from mtl_dist.data.table_hashes import table_hash
from mtl_dist.durable import locked, replacing
from mtl_dist.heartbeat import getting_on
from mtl_dist.specs import NO_CLASS

log = logging.getLogger(__name__)

_TOGETHER = 64  # samples that are asked for at once where each is a request


def cache_folder() -> Path:
    """Where the classes are kept: `$XDG_CACHE_HOME/mtl_dist/derived`, or below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mtl_dist" / "derived"


def classes_of_images(
    derivation: OfImages, directory: Location, manifest: Manifest, split: str
) -> np.ndarray:
    """The class of each row of a split, -1 where the function says none or the image cannot be read, int32.

    Whoever reads a sample that cannot be read says so; here it has no label.

    Raises:
        UserError: the function fails, or says something that is no class.
    """
    reader = split_reader(directory, manifest, split)
    name = _name(derivation, reader, manifest)
    if name not in derivation.known:
        derivation.known[name] = _from_cache(name, derivation, reader, manifest)
    return derivation.known[name]


def _from_cache(name: str, derivation: OfImages, reader: SplitReader, manifest: Manifest) -> np.ndarray:
    folder = cache_folder()
    kept = folder / f"{name}.npz"
    found: np.ndarray | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{name}.lock"):  # the other ranks of this machine wait, and find it made
            found = _loaded(kept, reader.num_samples)
            if found is None:
                found = _made(derivation, reader, manifest)
                with replacing(kept, sync=False) as temporary, open(temporary, "wb") as file:
                    np.savez_compressed(file, classes=found)
    except OSError as error:
        log.warning(
            "%s: expected to keep the classes there, found: %s; they are made again in every process",
            folder,
            error.strerror or error,
        )
    return _made(derivation, reader, manifest) if found is None else found


def _loaded(path: Path, num_samples: int) -> np.ndarray | None:
    """What was kept; nothing if it is not there or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            classes: np.ndarray = file["classes"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return classes if classes.shape == (num_samples,) and classes.dtype == np.int32 else None


def _made(derivation: OfImages, reader: SplitReader, manifest: Manifest) -> np.ndarray:
    log.warning(
        "%s: asking %s for the classes of %s images, once",
        manifest.name,
        derivation.function.path,
        f"{reader.num_samples:,}",
    )
    classes = np.full(reader.num_samples, NO_CLASS, np.int32)
    for start in range(0, reader.num_samples, _TOGETHER):
        rows = range(start, min(start + _TOGETHER, reader.num_samples))
        reader.prefetch(rows, [()] * len(rows))
        for row in rows:
            classes[row] = _class_of(row, derivation, reader, manifest)
        getting_on()
    return classes


def _class_of(row: int, derivation: OfImages, reader: SplitReader, manifest: Manifest) -> int:
    try:
        image = decode_image(reader.read(row).image, manifest.channels, manifest.image_dtype)
    except (UnreadableSample, UnreadableImage):
        return NO_CLASS
    return derivation.of_image(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), reader.where(row))


def _name(derivation: OfImages, reader: SplitReader, manifest: Manifest) -> str:
    """What the classes are made of, as a hash."""
    function = derivation.function
    module = function.path.partition(".")[0]
    sources = {name: [hash_of(place) for place in places] for name, places in user_modules([module]).items()}
    hashes = reader.content_hashes()
    made_of = (
        function.path,
        function.classes,
        sources,
        decoder_name(),
        manifest.channels,
        manifest.image_dtype,
        manifest.map_style,
        reader.content,
        table_hash(reader.index_rows()),
        "" if hashes is None else table_hash(hashes),
    )
    return hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]
