"""Map-style Datasets of torch as sources: samples by their number, read where they are and packed nowhere.

    data:
      train:
        - dataset: {kind: my_project.datasets.Scans, folder: scans}
          fields: {digit: {kind: classification}}

What a run has to know of its data (labels, class names, statistics, by what the data is known again) is found
in one pass and kept as a dataset without images, the index. A row of it is a number of the Dataset, so that
the order of samples, exact resuming and missing labels are those of every other dataset.

A sample is a mapping, or a tuple of an image and labels: a number, a text, or a mapping by task. An image is
a picture of Pillow, an array (H, W) or (H, W, C), a tensor (H, W) or (C, H, W), or the bytes of a file.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from mtl_dist.config.user_defined import PartError, UserDefined, line_of
from mtl_dist.data.cache import Cache
from mtl_dist.data.derived import Derivation
from mtl_dist.data.manifest import Manifest, MapStyle
from mtl_dist.data.reader import Sample, SplitReader, UnreadableSample
from mtl_dist.data.remote import Location
from mtl_dist.data.user_dataset import DatasetSettings
from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import MapKind, StoredMap, UnreadableMap
from mtl_dist.kinds.registry import map_kind
from mtl_dist.kinds.vocabulary import Cell, LabelError
from mtl_dist.specs import TaskInfo

_FINGERPRINTED = 16  # samples that are read at every start
_IMAGE, _LABELS = "0", "1"
_DTYPES = ("uint8", "uint16", "float32")


@dataclass(frozen=True, eq=False)
class MapDataset:
    """A Dataset, and where in its samples the image and the labels are: `0`, `image`, `1.breed`."""

    settings: DatasetSettings
    image: str = ""
    fields: Mapping[str, str] | None = None

    @cached_property
    def made(self) -> Any:
        """The user's Dataset.

        Raises:
            UserError: its constructor fails.
        """
        try:
            return self.settings.make()
        except Exception as error:  # whatever the user's code raises
            words = f"{type(error).__name__}: {error}{line_of(error)}"
            raise UserError(f"{self.settings.path}: its constructor fails: {words}.") from error

    def __len__(self) -> int:
        return len(self.made)

    def __getstate__(self) -> dict[str, Any]:
        # For workers that are not forked: they make their own.
        return {name: value for name, value in self.__dict__.items() if name != "made"}

    def sample(self, number: int) -> Any:
        """The sample as the Dataset has it.

        Raises:
            UnreadableSample: the Dataset fails.
        """
        try:
            return self.made[number]
        except Exception as error:  # whatever the user's code raises
            raise UnreadableSample(f"{type(error).__name__}: {error}{line_of(error)}") from error

    def placed(self, tasks: Mapping[str, str]) -> MapDataset:
        """The same, with a place for the image and for each task; `tasks` are the places that are stated.

        Raises:
            UserError: a place is not stated, and the first sample does not say it.
        """
        try:
            first = self.sample(0)
        except UnreadableSample as error:
            raise UserError(f"{self.where(0)}: {error}.") from error
        if isinstance(first, Mapping):
            image, found = "image", {name: name for name in tasks}
        elif not isinstance(first, tuple | list) or len(first) < 2:
            raise UserError(
                f"{self.where(0)}: expected a mapping, or a tuple of an image and labels, found a "
                f"{type(first).__name__}."
            )
        else:
            image = _IMAGE
            is_mapping = isinstance(first[1], Mapping)
            found = {name: f"{_LABELS}.{name}" if is_mapping else _LABELS for name in tasks}
            unstated = [name for name, place in tasks.items() if not place]
            if not is_mapping and unstated and len(tasks) > 1:
                raise UserError(
                    f"fields.{unstated[0]}.from: expected its place in a sample, which is a tuple of "
                    f"{', '.join(type(part).__name__ for part in first)}, found none. State it, as in `from: "
                    '"1"`.'
                )
        places = {name: place or found[name] for name, place in tasks.items()}
        return MapDataset(self.settings, self.image or image, places)

    def image_of(self, sample: Any) -> memoryview:
        """The image of a sample as the bytes of a file.

        Raises:
            UnreadableSample: it has none, or one of another form.
        """
        value = _at(sample, self.image)
        if isinstance(value, bytes | bytearray | memoryview):
            return memoryview(bytearray(value))
        if isinstance(value, Image.Image):
            if value.mode in ("1", "LA", "La"):
                value = value.convert("L")
            elif value.mode not in ("L", "F", "RGB") and not value.mode.startswith("I;16"):
                value = value.convert("RGB")
        array = _array(value)
        if array is None or array.ndim not in (2, 3):
            raise UnreadableSample(f"expected an image at {self.image!r} of a sample, found {_words(value)}")
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        if array.dtype.name not in _DTYPES:
            raise UnreadableSample(
                f"expected an image of {', '.join(_DTYPES)} values, found {array.dtype.name}"
            )
        if array.ndim == 3 and not isinstance(value, Image.Image | np.ndarray):
            array = array.transpose(1, 2, 0)  # a tensor
        return _npy(array)

    def cell(self, sample: Any, task: str, num_classes: int = 0, of_parts: bool = False) -> Cell:
        """The label of a sample as text, "" where it has none; a list of several.

        A vector of 0 and 1 over all classes says which there are; `of_parts` it is the list of its numbers.

        Raises:
            UnreadableSample: it has a label of another form.
        """
        assert self.fields is not None
        value = _at(sample, self.fields[task])
        array = None if isinstance(value, list | tuple | str) else _array(value)
        if array is not None and array.ndim == 1 and num_classes and len(array) == num_classes:
            return [str(index) for index in np.flatnonzero(array).tolist()]
        if array is not None and array.ndim == 1 and of_parts:
            value = array.tolist()
        value = array.item() if array is not None and array.size == 1 and not of_parts else value
        if array is not None and array.ndim == 2:
            value = array.tolist()
        if isinstance(value, list | tuple):
            return [_text(item) for item in value]
        if value is None or isinstance(value, str | bool | int | float):
            return _text(value)
        raise UnreadableSample(f"expected a label of {task}, found {_words(value)}")

    def map_of(
        self, sample: Any, task: str, kind: MapKind, info: TaskInfo, by_value: Mapping[int, int]
    ) -> StoredMap | None:
        """The map of a sample as it would be stored; None where it has none. `by_value` are the classes of
        its values, where they are stated.

        Raises:
            UnreadableSample: it is no map of the task.
        """
        assert self.fields is not None
        value = _at(sample, self.fields[task])
        if value is None:
            return None
        opened: Image.Image | np.ndarray | None = value if isinstance(value, Image.Image) else _array(value)
        if opened is None:
            raise UnreadableSample(f"expected a map of {task}, found {_words(value)}")
        if isinstance(opened, np.ndarray) and kind.dtype == "uint8":
            if opened.dtype.kind not in "bui" or opened.min(initial=0) < 0 or opened.max(initial=0) > 255:
                raise UnreadableSample(f"expected a map of {task} of values from 0 to 255, found others")
            opened = Image.fromarray(opened.squeeze().astype(np.uint8))
        data = _npy(opened) if isinstance(opened, np.ndarray) else b""
        try:
            return kind.store(bytes(data), opened, info, by_value)
        except (UnreadableMap, LabelError) as error:
            raise UnreadableSample(f"its {task}: {error}".rstrip(".")) from None

    def where(self, number: int) -> str:
        """A sample in words, for messages."""
        return f"{self.settings.path}, sample {number}"

    def fingerprint(self, chosen: Callable[[int], Iterator[int]]) -> str:
        """By what the samples are known again: a hash of some, or what the Dataset's `fingerprint()` says.

        Raises:
            UserError: a sample cannot be read.
        """
        if hasattr(self.made, "fingerprint"):
            return hashlib.sha256(str(self.made.fingerprint()).encode()).hexdigest()
        digest = hashlib.sha256(str(len(self)).encode())
        for number in chosen(_FINGERPRINTED):
            try:
                sample = self.sample(number)
                digest.update(self.image_of(sample))
                for place in (self.fields or {}).values():
                    value = _at(sample, place)
                    array = _array(value)
                    digest.update(repr(value).encode() if array is None else array.tobytes())
            except UnreadableSample as error:
                raise UserError(f"{self.where(number)}: {error}.") from error
        return digest.hexdigest()


class MapStyleReader(SplitReader):
    """The samples of a split whose images are in a Dataset; labels are those of the index."""

    def __init__(
        self,
        directory: Location,
        manifest: Manifest,
        split: str,
        cache: Cache | None = None,
        derived: Mapping[str, Derivation] | None = None,
    ) -> None:
        super().__init__(directory, manifest, split, cache, derived)
        assert manifest.map_style is not None
        self._dataset = opened(manifest.map_style)

    def read(self, row: int, masks: tuple[str, ...] = ()) -> Sample:
        number = self._number(row)
        sample = self._dataset.sample(number)
        maps = {}
        for task in masks:
            info = self._task_infos[task]
            values = self._values.get(task, {})
            stored = self._dataset.map_of(sample, task, map_kind(info.kind), info, values)
            if stored is None:
                raise UnreadableSample(f"it has no map {task}, which the index says it has")
            maps[task] = memoryview(bytearray(stored.data))
        labels = self.with_derived(self._column_labels(row), row)
        return Sample(str(number), self._dataset.image_of(sample), labels, maps)

    def key(self, row: int) -> str:
        return str(self._number(row))

    def where(self, row: int) -> str:
        return self._dataset.where(self._number(row))

    def _number(self, row: int) -> int:
        return int(self._rows()["image_offset"][row])


def opened(stated: MapStyle) -> MapDataset:
    """The Dataset that a manifest names.

    Raises:
        UserError: it cannot be imported.
    """
    mark = UserDefined((DatasetSettings,), only=True)
    try:
        settings = mark.settings_class(stated.dataset["kind"]).model_validate(stated.dataset, strict=False)
    except PartError as error:
        raise UserError(f"dataset: {error}") from None
    assert isinstance(settings, DatasetSettings)
    return MapDataset(settings, stated.image, stated.fields)


def split_reader(
    directory: Location,
    manifest: Manifest,
    split: str,
    cache: Cache | None = None,
    derived: Mapping[str, Derivation] | None = None,
) -> SplitReader:
    """The samples of a split, wherever its images are.

    Raises:
        UserError: as `SplitReader` does.
    """
    kind = SplitReader if manifest.map_style is None else MapStyleReader
    return kind(directory, manifest, split, cache, derived)


def _at(sample: Any, place: str) -> Any:
    """What is at a place of a sample; None where a mapping lacks it."""
    value = sample
    for part in place.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, tuple | list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise UnreadableSample(f"expected {place!r} in a sample, found none: it is {_words(sample)}")
    return value


def _array(value: Any) -> np.ndarray | None:
    """What is an array, a tensor or a picture, as an array."""
    if isinstance(value, np.ndarray | np.generic | Image.Image):
        return np.asarray(value)
    if hasattr(value, "detach") and hasattr(value, "numpy"):
        found: np.ndarray = value.detach().cpu().numpy()
        return found
    return None


def _npy(array: np.ndarray) -> memoryview:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getbuffer()


def _text(value: Any) -> str:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return value.strip() if isinstance(value, str) else repr(int(value) if isinstance(value, bool) else value)


def _words(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(part).__name__ for part in value) or 'nothing'}"
    if isinstance(value, Mapping):
        return f"a mapping of {', '.join(map(str, value)) or 'nothing'}"
    return f"a {type(value).__name__}"
