"""What is found while a shard is packed: of its images, and of its maps, which are stored on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import Any

from mtl_dist.data.images import ImageFacts, UnreadableImage, open_map
from mtl_dist.errors import UserError
from mtl_dist.importers.conversion import Conversion, pixels_of, stored_image
from mtl_dist.importers.made_masks import MadeMask
from mtl_dist.importers.orientation import DISPLAYED, EITHER, STORED, as_given, check_size, turned
from mtl_dist.importers.pixel_counts import MOST_PIXELS, PixelCounts
from mtl_dist.importers.sources import Readable, read_bytes
from mtl_dist.kinds.kind import Label, MapKind, ScalarKind, StoredMap, UnreadableMap
from mtl_dist.kinds.registry import kind_of
from mtl_dist.kinds.vocabulary import LabelError
from mtl_dist.specs import TaskInfo

_MEASURED_FIRST, _EVERY, _EVERY_UNVERIFIED = 16, 16, 64
"""Of large 8-bit pictures these are measured: to decode one in colour costs twice its verification."""


class Unreadable(Exception):
    """An image or a map that cannot be read; the text says where it is."""


class ImageCounts:
    """The images of a shard: how many of each kind there are, what is odd of them, and their pixels.

    `kinds` maps "channels dtype" to an example and a number of images.
    """

    def __init__(self, verify: bool, measured: bool, conversion: Conversion) -> None:
        self.kinds: dict[str, tuple[str, int]] = {}
        self.oddities: Counter[str] = Counter()
        self._verify = verify
        self._measured = measured
        self._conversion = conversion
        self._pixels: dict[str, PixelCounts] = {}

    def read(self, position: int, where: str, source: Readable | bytes) -> tuple[bytes, ImageFacts]:
        """The image as it is to be stored, its pixels measured where it is one of those.

        Raises:
            Unreadable: it cannot be read.
        """
        image = read_bytes(source)
        measured = self._measured and self._is_measured(position)
        try:
            image, facts = stored_image(image, self._verify and not measured, self._conversion)
            if self._measured and (measured or _is_always_measured(facts)):
                counts = self._pixels.setdefault(_kind(facts), PixelCounts(facts.channels, facts.dtype))
                with nullcontext() if self._verify else suppress(UnreadableImage):
                    counts.add(pixels_of(image, facts))
        except UnreadableImage as error:
            raise Unreadable(f"{where}: expected a readable image, found {error}.") from None
        return image, facts

    def add(self, place: str, facts: ImageFacts) -> None:
        """Count an image that is kept."""
        example, number = self.kinds.get(_kind(facts), (place, 0))
        self.kinds[_kind(facts)] = (example, number + 1)
        self.oddities.update(facts.oddities)

    def pixels(self) -> list[dict[str, Any]]:
        """The states of the PixelCounts."""
        return [counts.state() for counts in self._pixels.values()]

    def _is_measured(self, position: int) -> bool:
        """Whether an image of any kind is measured: the first of a shard, then every n-th."""
        return position < _MEASURED_FIRST or position % (_EVERY if self._verify else _EVERY_UNVERIFIED) == 0


def _kind(facts: ImageFacts) -> str:
    return f"{facts.channels} {facts.dtype}"


def _is_always_measured(facts: ImageFacts) -> bool:
    """Whether the image is small, or of those that are normalised by what is measured."""
    small = facts.width * facts.height <= MOST_PIXELS
    return small or facts.dtype != "uint8" or facts.channels not in (1, 3)


class MapCounts:
    """The maps of a shard, by task.

    `conventions` maps how values were read to an example; `unlabelled` are the positions of records whose map
    has no labelled pixel; `fits` counts the maps of images turned by EXIF by the reading that their size
    allows.
    """

    def __init__(
        self,
        kinds: Mapping[str, MapKind],
        task_infos: Mapping[str, TaskInfo],
        values: Mapping[str, Mapping[int, int]],
        masks_as: str,
    ) -> None:
        self.conventions: dict[str, dict[str, str]] = {name: {} for name in kinds}
        self.unlabelled: dict[str, list[int]] = {}
        self.fits: dict[str, dict[str, tuple[str, int]]] = {}
        self._kinds = kinds
        self._task_infos = task_infos
        self._values = values
        self._masks_as = masks_as
        self._tallies = {name: kind.tally(task_infos[name]) for name, kind in kinds.items()}

    def read(
        self, position: int, key: str, sources: Mapping[str, Readable | bytes], facts: ImageFacts
    ) -> dict[str, bytes]:
        """The maps of one record as they are to be stored, by task; one without any label is left out.

        Raises:
            Unreadable: one cannot be read.
            UserError: one has another size than its image, or a value that is no class.
        """
        stored = {}
        for name, source in sources.items():
            where = f"{name} of {key}" if isinstance(source, bytes) else str(source)
            try:
                found = self._stored(name, where, source, facts)
            except LabelError as error:
                raise UserError(f"{where}: task {name!r}: {error}") from None
            except (UnreadableImage, UnreadableMap) as error:
                raise Unreadable(f"{where}: expected a readable image, found {error}.") from None
            kind = self._kinds[name]
            if not kind.is_labelled(found):
                self.unlabelled.setdefault(name, []).append(position)
                continue
            stored[name] = found.data
            self._tallies[name] = kind.add(self._tallies[name], found.tally)
            self.conventions[name].setdefault(found.convention, where)
        return stored

    def tallies(self) -> dict[str, list[float]]:
        """What each kind counts of its maps."""
        return {name: tally.tolist() for name, tally in self._tallies.items()}

    def _stored(self, name: str, where: str, source: Readable | bytes, facts: ImageFacts) -> StoredMap:
        kind, info = self._kinds[name], self._task_infos[name]
        masks_as = DISPLAYED if isinstance(source, MadeMask) else self._masks_as
        data = read_bytes(source)
        with open_map(data) as opened:
            if masks_as == STORED and facts.orientation > 1:
                if kind.channels:
                    raise UserError(
                        f"{where}: expected a map of single values with --masks-as stored, "
                        f"found {info.kind}. Turn the vectors and the picture yourself."
                    )
                opened = turned(opened, facts.orientation)
            stored = kind.store(data, opened, info, self._values[name])
        fit = check_size(where, stored, facts, masks_as)
        if fit and not isinstance(source, MadeMask):
            example, number = self.fits.setdefault(name, {}).get(fit, (where, 0))
            self.fits[name][fit] = (example, number + 1)
        return stored


class PlacedLabels:
    """The labels of a shard that have a place in their image, by task, as they are stored: one a record.

    `noted` counts what is to be said of them, in words; `fits` those of images turned by EXIF, as `MapCounts`
    does.
    """

    def __init__(self, task_infos: Mapping[str, TaskInfo], masks_as: str) -> None:
        self._kinds = {
            name: kind
            for name, info in task_infos.items()
            if isinstance(kind := kind_of(info.kind), ScalarKind) and kind.has_place
        }
        self.labels: dict[str, list[Label | None]] = {name: [] for name in self._kinds}
        self.noted: dict[str, Counter[str]] = {name: Counter() for name in self._kinds}
        self.fits: dict[str, dict[str, tuple[str, int]]] = {}
        self._task_infos = task_infos
        self._masks_as = masks_as

    def beside(self, place: str, labels: Mapping[str, Label], facts: ImageFacts) -> dict[str, Label]:
        """The labels of a record as they are stored, those without a place among them.

        Raises:
            UserError: a label that its task cannot have.
        """
        stored = dict(labels)
        for name, kind in self._kinds.items():
            label = stored.pop(name, None)
            if label is not None:
                view = as_given(facts, self._masks_as)
                try:
                    label = kind.beside(label, view, self._task_infos[name], self.noted[name])
                except LabelError as error:
                    raise UserError(f"{place}: task {name!r}: {error}") from None
                if facts.orientation > 1:
                    example, number = self.fits.setdefault(name, {}).get(EITHER, (place, 0))
                    self.fits[name][EITHER] = (example, number + 1)
            if label is not None:
                stored[name] = label
            self.labels[name].append(label)
        return stored

    def leave_out(self) -> None:
        """The next record is not stored."""
        for labels in self.labels.values():
            labels.append(None)
