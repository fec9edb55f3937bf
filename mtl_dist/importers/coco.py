"""COCO: JSON files of images, categories and annotations, of instances or panoptic.

instances   annotations have `bbox` [x, y, width, height] and `segmentation`: polygons or run lengths; and
            `keypoints` [x, y, visibility, ...] where their category names some
panoptic    annotations have `segments_info`, and a PNG beside the JSON whose colours are the segments' ids

https://cocodataset.org/#format-data
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
from PIL import Image

from mtl_dist.errors import UserError
from mtl_dist.importers.finding import FileFinder
from mtl_dist.importers.options import Help
from mtl_dist.importers.outlines import Outline, Polygons, Runs
from mtl_dist.importers.pixels import encoded_png
from mtl_dist.importers.regions import (
    AnnotatedImage,
    Boxes,
    Categories,
    Crowds,
    Empty,
    Masks,
    Points,
    Region,
    RegionImporter,
    Several,
    item,
    numbers,
    read_json,
)
from mtl_dist.importers.sources import Source, Tree
from mtl_dist.importers.splitting import is_split_word, splits_of_folders
from mtl_dist.importers.summary import listed
from mtl_dist.kinds.keypoints import Keypoints
from mtl_dist.kinds.segmentation import Segmentation
from mtl_dist.kinds.vocabulary import plain
from mtl_dist.specs import IGNORE

_PARTS = ("images", "annotations", "categories")
_NO_RECORD = "left out: its image is not in the file"


@dataclass(frozen=True, slots=True)
class SegmentMask:
    """The mask in a panoptic PNG, whose colours are the ids of segments: red + 256 green + 65536 blue."""

    source: Source
    values: tuple[tuple[int, int], ...]
    """The value in the mask of each segment's id."""

    @property
    def size(self) -> int:
        """The bytes of the PNG."""
        return self.source.size

    def read(self) -> bytes:
        """A PNG of values; what belongs to no segment (id 0) is ignored.

        Raises:
            UserError: no PNG of colours, or an id that its annotation lacks.
        """
        try:
            with Image.open(io.BytesIO(self.source.read())) as opened:
                colours = np.asarray(opened.convert("RGB")).astype(np.uint32)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.source}: expected a readable PNG, found: {error}.") from None
        ids, place = np.unique(colours @ np.array([1, 256, 65536], np.uint32), return_inverse=True)
        known = {0: IGNORE, **dict(self.values)}
        for segment in ids:
            if int(segment) not in known:
                raise UserError(
                    f"{self.source}: expected the segments of its annotation, found the id {segment}."
                )
        table = np.array([known[int(segment)] for segment in ids], np.uint8)
        return encoded_png(table[place].reshape(colours.shape[:2]))

    def __str__(self) -> str:
        return str(self.source)


class Coco(RegionImporter):
    """COCO's JSON files: instances or panoptic.

    \b
      mtl prepare coco coco/ data/coco --annotations 'instances_*.json' --categories objects --masks scene
      mtl prepare coco coco/ data/heads --annotations heads.json --box head=head
      mtl prepare coco coco/ data/poses --annotations 'person_keypoints_*.json' --points pose=person
      mtl prepare coco coco/ data/panoptic --annotations 'panoptic_*.json' --masks scene

    Of several files each is a split, by its name or its folder's (instances_train2017.json,
    valid/_annotations.coco.json); one file alone is divided.
    """

    def __init__(
        self,
        source: Annotated[Path, Help("A directory or a zip of images and JSON files, or one JSON.", "SRC")],
        annotations: Annotated[
            str, Help("Which JSON files, as a pattern of their names; without it all of COCO's form.", "GLOB")
        ] = "",
        root: Annotated[Path | None, Help("Where the images are; without it in SRC.", "DIR")] = None,
        categories: Categories = "",
        masks: Masks = "",
        box: Boxes = {},  # noqa: B006 (never changed)
        points: Points = {},  # noqa: B006
        several: Several = "refuse",
        empty: Empty = "none",
        crowds: Crowds = "ignore",
    ) -> None:
        self.ask(categories, masks, box, empty, crowds, points, several)
        self._source = source
        base = source.parent if source.suffix.lower() == ".json" else source
        files = Tree(base)
        images = Tree(root) if root is not None else files
        found = _annotation_files(files, source.name if base != source else "", annotations)
        self._files = {path: data for path, data in found if data is not None}
        self._check_splits()
        self._index: dict[int, int] = {}
        names = self._read_categories()
        self._read_points()
        self._panoptic = self._check_forms()
        if self._panoptic:
            self.mask_classes = tuple(names)
            if box:
                raise UserError("--box: expected a file of instances, found panoptic ones.")
        self._png: list[str] = []
        self._orphans: list[str] = []
        read: list[AnnotatedImage] = []
        for path, data in self._files.items():
            folder = "" if "/" not in path else f"{PurePosixPath(path).parent}/"
            beside_it = FileFinder(files, folder)
            read += self._read(path, data, FileFinder(images, "") if root else beside_it, beside_it)
        words = splits_of_folders([image.path for image in read])
        if len(self._files) == 1 and len(set(words)) > 1:
            self._noted.append("splits taken from the folders of the images")
            read = [replace(image, split=word) for image, word in zip(read, words, strict=True)]
        self.has(images, names, read)
        _check_once(read)
        self.enter_files(
            [images.inside(image.source) for image in read if image.source is not None],
            [] if root is not None else list(self._files),
            [] if root is not None else self._png,
        )
        self._leave_out_orphans()

    @property
    def name(self) -> str:
        return self._source.resolve().stem

    def _check_forms(self) -> bool:
        """Whether the files are panoptic; refuses some of each form."""
        are_panoptic = {_is_panoptic(data) for data in self._files.values()}
        if len(are_panoptic) > 1:
            raise UserError(
                f"{self._source}: expected instances or panoptic, found both in "
                f"{listed(list(self._files))}. Choose with --annotations."
            )
        return True in are_panoptic

    def _leave_out_orphans(self) -> None:
        """Account for the annotations of images that are not in their file."""
        for name in self._orphans:
            self.account.found("regions", [name])
            self.account.became("regions", name, _NO_RECORD)
        if self._orphans:
            self._noted.append(
                f"annotations of images that are not in their file, left out: {len(self._orphans)} "
                f"({listed(self._orphans)})"
            )

    def _check_splits(self) -> None:
        """Refuse files that speak of one split: which is meant?"""
        if not self._files:
            raise UserError(
                f"{self._source}: expected JSON files with images, annotations and categories, found none."
            )
        splits: dict[str, str] = {}
        for path in self._files:
            before = splits.setdefault(split_in(path), path)
            if before != path:
                raise UserError(
                    f"{self._source}: expected one file for each split, found {before} and {path}. "
                    "Choose with --annotations, for example 'instances_*.json'."
                )

    def _read_categories(self) -> list[str]:
        """The categories' names by their ids, the same in all files."""
        known: dict[int, str] = {}
        for path, data in self._files.items():
            for category in data["categories"]:
                number, name = item(category, "id", int, path), item(category, "name", str, path).strip()
                if not plain(name):
                    raise UserError(f"{path}: expected a name of the category {number}, found none.")
                if known.setdefault(number, name) != name:
                    raise UserError(
                        f"{path}: expected the category {number} to be {known[number]!r} as in the other "
                        f"files, found {name!r}."
                    )
        if not known:
            raise UserError(f"{self._source}: expected categories, found none.")
        self._index = {number: index for index, number in enumerate(sorted(known))}
        return [known[number] for number in sorted(known)]

    def _read_points(self) -> None:
        """The names of the points of categories, and which are joined: the same in all files."""
        known: dict[str, tuple[str, ...]] = {}
        joined: dict[str, list[tuple[str, str]]] = {}
        for path, data in self._files.items():
            for category in data["categories"]:
                points = category.get(Keypoints.name)  # which is its name in COCO, too
                if not points:
                    continue
                name = category["name"].strip()
                if not isinstance(points, list) or not all(isinstance(each, str) and each for each in points):
                    raise UserError(f"{path}: expected names of the points of {name}, found {points!r:.60}.")
                if known.setdefault(name, tuple(points)) != tuple(points):
                    raise UserError(
                        f"{path}: expected the points of {name} as in the other files, "
                        f"{', '.join(known[name])}, found {', '.join(points)}."
                    )
                pairs = category.get("skeleton") or []
                try:
                    joined[name] = [(points[int(a) - 1], points[int(b) - 1]) for a, b in pairs if a > 0 < b]
                except (TypeError, ValueError, IndexError):
                    raise UserError(
                        f"{path}: expected a skeleton of pairs of points by number, from 1 on, of {name}, "
                        f"found {str(pairs)[:60]}."
                    ) from None
        self.point_names, self.skeletons = known, joined
        self._points_by_category = {
            self._index[category["id"]]: known[category["name"].strip()]
            for data in self._files.values()
            for category in data["categories"]
            if category["name"].strip() in known
        }

    def _category(self, annotation: Any, where: str) -> int:
        number = item(annotation, "category_id", int, where)
        if number not in self._index:
            raise UserError(f"{where}: expected a category of the file, found the id {number}.")
        return self._index[number]

    def _read(
        self, path: str, data: dict[str, Any], finder: FileFinder, pngs: FileFinder
    ) -> list[AnnotatedImage]:
        by_image: dict[Any, list[dict[str, Any]]] = {}
        for image in data["images"]:
            number = item(image, "id", (int, str), path)
            if number in by_image:
                raise UserError(f"{path}: expected each image's id once, found {number} twice.")
            by_image[number] = []
        for position, annotation in enumerate(data["annotations"]):
            number = item(annotation, "image_id", (int, str), f"{path}, annotation {position}")
            if number in by_image:
                by_image[number].append(annotation)
                continue
            if str(number) in map(str, by_image):
                raise UserError(
                    f"{path}, annotation {position}: expected image_id as the images have their ids, found "
                    f"{number!r}, a {type(number).__name__}. Write them alike."
                )
            for segment in annotation.get("segments_info", [annotation]):
                self._orphans.append(f"{path}, annotation {segment.get('id', position)} of image {number}")
        split = split_in(path) if len(self._files) > 1 else ""
        read = []
        for image in data["images"]:
            where = f"{path}, image {image['id']}"
            name = item(image, "file_name", str, where)
            width, height = item(image, "width", int, where), item(image, "height", int, where)
            found = self._in_a_folder_of(split, name, finder) or finder.find(name, split)
            of_image = by_image[image["id"]]
            if self._panoptic:
                regions, mask = self._segments(of_image, where, pngs, path, split)
            else:
                regions, mask = _named_once([self._region(each, where) for each in of_image]), None
            place, source = found or (name, None)
            if mask is not None and mask.source == source:
                raise UserError(
                    f"{where}: expected {name!r} and its segments in two files, found {source} alone. Is the "
                    "folder of the images there?"
                )
            read.append(AnnotatedImage(place, source, width, height, regions, split, mask, where))
        return read

    def _in_a_folder_of(self, split: str, name: str, finder: FileFinder) -> tuple[str, Source] | None:
        """The image in a folder such as `train2017`, where the file of its annotations is of this split.

        A folder called as a file of annotations, such as `panoptic_train2017`, holds no images but segments.
        """
        of_segments = [path.rpartition(".")[0] for path in self._files]
        for folder in finder.tree.directories if split else ():
            if split_in(folder) != split or folder in of_segments:
                continue
            if (found := finder.tree.find(f"{folder}/{name}")) is not None:
                return f"{folder}/{name}", found
        return None

    def _region(self, annotation: dict[str, Any], where: str) -> Region:
        where = f"{where}, annotation {item(annotation, 'id', (int, str), where)}"
        box = None
        if annotation.get("bbox"):
            left, top, wide, high = numbers(annotation["bbox"], 4, f"{where}, bbox")
            box = (left, top, left + wide, top + high)
        outline = _outline(annotation.get(Segmentation.name), where)  # which is its name in COCO, too
        if box is None and isinstance(outline, Polygons):
            box = outline.box
        crowd = _is_crowd(annotation, where)
        category = self._category(annotation, where)
        points = self._points_in(annotation, category, where) if self._points else []
        return Region(where, category, box, outline, crowd, points)

    def _points_in(self, annotation: dict[str, Any], category: int, where: str) -> list[list[float]]:
        """The points of an annotation (x, y, visibility); none where its category or itself has none."""
        names = self._points_by_category.get(category, ())
        given = annotation.get(Keypoints.name)
        if not names or not given:
            return []
        values = numbers(given, 3 * len(names), f"{where}, {Keypoints.name}")
        points = [values[at : at + 3] for at in range(0, len(values), 3)]
        if any(visibility not in (0, 1, 2) for _, _, visibility in points):
            raise UserError(f"{where}: expected visibility 0, 1 or 2 of each point, found {given}.")
        stated, found = annotation.get("num_keypoints"), sum(visibility > 0 for _, _, visibility in points)
        if stated is not None and stated != found:
            raise UserError(f"{where}: expected {stated} labelled points (num_keypoints), found {found}.")
        return [[x, y, int(v)] if v else [0.0, 0.0, 0] for x, y, v in points]

    def _segments(
        self, annotations: Sequence[dict[str, Any]], where: str, pngs: FileFinder, path: str, split: str
    ) -> tuple[list[Region], SegmentMask | None]:
        if not annotations:
            return [], None
        if len(annotations) > 1:
            raise UserError(f"{where}: expected one panoptic annotation, found {len(annotations)}.")
        name = item(annotations[0], "file_name", str, where)
        own = f"{path.rpartition('.')[0]}/{name}"  # the picture may have the same name
        source = pngs.tree.find(own)
        found = (own, source) if source is not None else pngs.find(name, split)
        if found is None:
            raise UserError(f"{where}: expected its segments in {name!r} in {pngs.tree}, found no such file.")
        self._png.append(pngs.tree.inside(found[1]))
        regions, values = [], []
        for segment in item(annotations[0], "segments_info", list, where):
            number = item(segment, "id", int, where)
            crowd = _is_crowd(segment, where)
            category = self._category(segment, where)
            regions.append(Region(f"{where}, segment {number}", category, None, None, crowd))
            values.append((number, IGNORE if crowd and self._crowds == "ignore" else category))
        return regions, SegmentMask(found[1], tuple(values))


def _is_crowd(annotation: dict[str, Any], where: str) -> bool:
    value = annotation.get("iscrowd", 0)
    if value not in (0, 1):
        raise UserError(f"{where}: expected 'iscrowd' to be 0 or 1, found {value!r}.")
    return bool(value)


def _named_once(regions: Sequence[Region]) -> list[Region]:
    """The regions of an image, each under a name of its own: an id may come twice."""
    found: Counter[str] = Counter()
    named = []
    for region in regions:
        found[region.name] += 1
        number = found[region.name]
        named.append(region if number == 1 else replace(region, name=f"{region.name}, number {number}"))
    return named


def is_coco(data: Any) -> bool:
    """Whether JSON is a file of COCO's form."""
    return isinstance(data, dict) and all(isinstance(data.get(part), list) for part in _PARTS)


def split_in(path: str) -> str:
    """The word for a split in a file's name, else in its folders'; or nothing."""
    parts = [PurePosixPath(path).stem, *reversed(PurePosixPath(path).parts[:-1])]
    for part in parts:
        for word in re.findall(r"[A-Za-z]+", part):
            if is_split_word(word):
                return str(word).lower()
    return ""


def _check_once(images: Sequence[AnnotatedImage]) -> None:
    """Refuse two entries for one image."""
    taken: dict[str, str] = {}
    for image in images:
        if image.source is not None and taken.setdefault(str(image.source), image.where) != image.where:
            raise UserError(
                f"{image.where}: expected each image once, found {image.path!r} also as "
                f"{taken[str(image.source)]}."
            )


def _is_panoptic(data: dict[str, Any]) -> bool:
    return any(isinstance(each, dict) and "segments_info" in each for each in data["annotations"])


def _annotation_files(tree: Tree, only: str, pattern: str) -> list[tuple[str, Any]]:
    """The JSON files that are wanted, each with what it holds; None for what is no such file."""
    found = []
    for path in tree.files:
        if not path.lower().endswith(".json") or (only and path != only):
            continue
        if pattern and not (fnmatch(PurePosixPath(path).name, pattern) or fnmatch(path, pattern)):
            continue
        data = read_json(tree.source(path))
        if not is_coco(data) and (pattern or only):
            raise UserError(
                f"{path}: expected COCO's images, annotations and categories, found "
                f"{', '.join(data) if isinstance(data, dict) else type(data).__name__}."
            )
        found.append((path, data if is_coco(data) else None))
    return found


def _outline(segmentation: Any, where: str) -> Outline | None:
    if not segmentation:
        return None
    where = f"{where}, segmentation"
    if isinstance(segmentation, dict):
        height, width = numbers(segmentation.get("size"), 2, f"{where}, size")
        counts = segmentation.get("counts")
        if not isinstance(counts, str):
            counts = tuple(int(count) for count in numbers(counts, None, f"{where}, counts"))
        return Runs(counts, int(height), int(width))
    rings = [tuple(numbers(ring, None, where)) for ring in segmentation if isinstance(segmentation, list)]
    if not rings or any(len(ring) < 6 or len(ring) % 2 for ring in rings):
        raise UserError(
            f"{where}: expected polygons of three points or more, found {str(segmentation)[:60]}."
        )
    return Polygons(tuple(rings))
