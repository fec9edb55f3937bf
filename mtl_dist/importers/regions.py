"""What formats of annotated regions share: from regions of images to labels, masks and boxes.

    --categories NAME       multilabel: the categories of the regions in an image
    --masks NAME            segmentation: background and a class for each category
    --box NAME=CATEGORY     four numbers, NAME_xmin, NAME_ymin, NAME_xmax, NAME_ymax: the box of the image's
                            largest region of the category
    --points NAME=CATEGORY  keypoints: those of the image's region of the category

An importer of such a format reads its files into `AnnotatedImage`s and says what its categories are.
"""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from mtl_dist.config.nearest import nearest
from mtl_dist.data.images import IMAGE_EXTENSIONS, extension_of
from mtl_dist.data.shards import check_task_names
from mtl_dist.errors import UserError
from mtl_dist.importers.account import IMAGE, MASK, NO_IMAGE, TABLE
from mtl_dist.importers.importer import Importer, LeftOut
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.lists import SplitLists, is_list_of_a_split, splits_in_lists
from mtl_dist.importers.options import Help
from mtl_dist.importers.outlines import Edges, Outline, Polygons, Rectangle, RegionMask
from mtl_dist.importers.sources import Readable, Source, Tree
from mtl_dist.importers.splitting import splits_of_folders
from mtl_dist.importers.summary import listed
from mtl_dist.kinds.keypoints import Keypoints, labelled
from mtl_dist.kinds.kind import Label
from mtl_dist.kinds.multilabel import Multilabel
from mtl_dist.kinds.regression import Regression
from mtl_dist.kinds.segmentation import BACKGROUND, Segmentation
from mtl_dist.kinds.vocabulary import Declared, class_order, plain, vocabulary
from mtl_dist.specs import IGNORE

Categories: TypeAlias = Annotated[
    str, Help("A multilabel task of this name: the categories that an image shows.", "NAME")
]
Masks: TypeAlias = Annotated[
    str, Help("A segmentation task of this name: background and a class for each category.", "NAME")
]
Boxes: TypeAlias = Annotated[
    dict[str, str],
    Help("Four numbers NAME_xmin, ...: the box of an image's largest region of CATEGORY.", "NAME=CATEGORY"),
]
Points: TypeAlias = Annotated[
    dict[str, str],
    Help("A task of points by name: those of an image's region of CATEGORY.", "NAME=CATEGORY"),
]
Several: TypeAlias = Annotated[
    Literal["refuse", "largest"],
    Help("What an image with the points of several regions is: refused, or that of the largest.", "WHAT"),
]
Empty: TypeAlias = Annotated[
    Literal["none", "unknown"],
    Help("What an image without regions means: that it shows none, or that nobody looked.", "none|unknown"),
]
Crowds: TypeAlias = Annotated[
    Literal["ignore", "class"],
    Help("What a crowd's pixels are in a mask: ignored, or of its category.", "ignore|class"),
]

SIDES = ("xmin", "ymin", "xmax", "ymax")
REGIONS, FILES = "regions", "files"
_USED, _CROWD = "label", "label: a crowd"
_NO_IMAGE = "left out: its image is not there"
_NO_AREA = "left out: a point or a line, which has no area"
NO_AREA = Polygons(())
"""The outline of a point or a line."""
_NO_EXTENT = "left out: a box without extent"
_NOT_ASKED = "left out: no task is made of it"
_NOT_LARGEST = "left out: not the largest of its category in its image"
_NO_POINT = "left out: none of its points is labelled"
_UNLISTED = "left out: in no list of a split"
_NOT_NAMED = "left out: no annotation names it"


@dataclass(frozen=True, slots=True)
class Region:
    """One annotated region: its name for messages, its category's index, where it is."""

    name: str
    category: int
    box: Edges | None
    outline: Outline | None = None
    crowd: bool = False
    points: Sequence[Sequence[float]] = ()
    """(x, y, visibility) of each of the category's points, where it has some."""

    @property
    def area(self) -> float:
        """Of its box, in pixels; 0 where it has none."""
        if self.box is None:
            return 0.0
        left, top, right, bottom = self.box
        return max(0.0, right - left) * max(0.0, bottom - top)


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """An image and its regions; `source` is None where its file is not there, `mask` a ready one.

    `where` names it in the annotations. Its width and height are for masks that are drawn.
    """

    path: str
    source: Source | None
    width: int
    height: int
    regions: Sequence[Region] = ()
    split: str = ""
    mask: Readable | None = None
    where: str = ""
    columns: Mapping[str, str | list[str]] = field(default_factory=dict)


class RegionImporter(Importer):
    """An importer of annotated regions; the constructor of one gives `images` and their categories."""

    mask_classes: tuple[str, ...] = ()
    """The classes of ready masks; else background and the categories."""
    point_names: Mapping[str, tuple[str, ...]] = {}
    """The names of the points of each category that has some."""
    skeletons: Mapping[str, Sequence[tuple[str, str]]] = {}
    """The pairs of them that are joined, by category."""

    def ask(
        self,
        categories: str,
        masks: str,
        box: Mapping[str, str],
        empty: str,
        crowds: str,
        points: Mapping[str, str] | None = None,
        several: str = "refuse",
    ) -> None:
        """What tasks are to be made.

        Raises:
            UserError: none, or two of one name.
        """
        names = [name for name in (categories, masks) if name]
        names += [f"{name}_{side}" for name in box for side in SIDES]
        names += points or {}
        if not names:
            last = "--box NAME=CATEGORY" if points is None else "--box or --points NAME=CATEGORY"
            raise UserError(f"tasks: expected --categories NAME, --masks NAME or {last}, found none of them.")
        if len(set(names)) < len(names):
            raise UserError(f"tasks: expected each name once, found {', '.join(names)}.")
        check_task_names(names)
        self._multilabel, self._masks, self._boxes = categories, masks, box
        self._points, self._several = points or {}, several
        self._empty, self._crowds = empty, crowds
        self._noted: list[str] = []

    def has(self, tree: Tree, categories: Sequence[str], images: Sequence[AnnotatedImage]) -> None:
        """What was read: the categories' names, and every image in its order.

        Raises:
            UserError: a box of no category, or masks of regions that have no outlines.
        """
        self._tree, self._names, self._images = tree, tuple(map(plain, categories)), images
        if len(set(self._names)) < len(self._names):
            twice = [name for name, number in Counter(self._names).items() if number > 1]
            raise UserError(f"{tree}: expected each category once, found {listed(twice)} several times.")
        for option, wanted in (("box", self._boxes), ("points", self._points)):
            for name, category in wanted.items():
                if category not in self._names:
                    near = nearest(category, self._names)
                    raise UserError(
                        f"--{option} {name}: expected a category of {', '.join(self._names)}, found "
                        f"{category!r}.{f' Did you mean {near!r}?' if near else ''}"
                    )
        for name, category in self._points.items():
            if category not in self.point_names:
                having = ", ".join(self.point_names) or "no category has some"
                raise UserError(
                    f"--points {name}: expected a category with points ({having}), found {category!r}."
                )
        regions = [region for image in images for region in image.regions]
        ready = any(image.mask is not None for image in images)
        if self._masks and not ready and regions and all(region.outline is None for region in regions):
            raise UserError(
                f"--masks {self._masks}: expected regions with outlines, found boxes alone in {tree}. "
                "Use --categories or --box."
            )
        self.account.found(REGIONS, (region.name for region in regions))

    def tasks(self) -> Mapping[str, TaskSource]:
        tasks: dict[str, TaskSource] = {}
        if self._multilabel:
            tasks[self._multilabel] = TaskSource(Multilabel.name, self._names)
        if self._masks:
            classes = self.mask_classes or (BACKGROUND, *self._names)
            values = {index: index for index in range(len(classes))}
            tasks[self._masks] = TaskSource(Segmentation.name, classes, mask_values=values)
        for name in self._boxes:
            for side in SIDES:
                tasks[f"{name}_{side}"] = TaskSource(Regression.name, unit="px")
        for name, category in self._points.items():
            joined = [list(pair) for pair in self.skeletons.get(category, ())]
            facts = {"skeleton": joined} if joined else {}
            tasks[name] = TaskSource(Keypoints.name, self.point_names[category], facts=facts)
        return tasks

    def records(self) -> Iterator[Record | LeftOut]:
        self._chosen: Counter[str] = Counter()
        empties = 0
        for image in self._images:
            if image.source is None:
                for region in image.regions:
                    self.account.became(REGIONS, region.name, _NO_IMAGE)
                yield LeftOut(f"{self._tree}: expected the image {image.path!r}, found no such file.")
                continue
            known = bool(image.regions) or image.mask is not None
            empties += not known
            if not known and self._empty == "unknown":
                yield Record("", image.source, {}, {}, image.split, path=image.path, columns=image.columns)
                continue
            labels: dict[str, Label] = {}
            if self._multilabel:
                labels[self._multilabel] = sorted({region.category for region in image.regions})
            for name, category in self._boxes.items():
                labels |= self._box(name, category, image)
            for name, category in self._points.items():
                label = self._points_of(name, category, image)
                labels |= {} if label is None else {name: label}
            masks: dict[str, Readable] = {}
            if self._masks:
                masks[self._masks] = image.mask or self._drawn(image)
            self._end(image)
            yield Record("", image.source, labels, masks, image.split, path=image.path, columns=image.columns)
        if empties:
            meant = "they show none" if self._empty == "none" else "unlabelled"
            self._noted.append(f"images without regions: {empties}, {meant} (--empty)")

    def notes(self) -> Iterator[str]:
        yield from self._noted
        for what, number in sorted(self._chosen.items()):
            yield f"{what}: {number}"

    def enter_files(
        self,
        images: Sequence[str],
        annotations: Sequence[str],
        masks: Sequence[str] = (),
        unlisted: Sequence[str] = (),
    ) -> None:
        """Account for every file of the tree; `unlisted` are annotations that are in no split."""
        tree, account = self._tree, self.account
        tree.enter(account)
        for fate, names in (
            (IMAGE, images),
            (MASK, masks),
            (TABLE, annotations),
            (_UNLISTED, unlisted),
        ):
            account.found(FILES, names)
            for name in names:
                account.became(FILES, name, fate)
        rest = account.rest(FILES, "")
        pictures = [name for name in rest if extension_of(name) in IMAGE_EXTENSIONS]
        for name in pictures:
            account.became(FILES, name, _NOT_NAMED)
        account.rest(FILES, NO_IMAGE)
        if pictures:
            self._noted.append(
                f"pictures that no annotation names, left out: {len(pictures)} ({listed(pictures)})"
            )

    def _box(self, name: str, category: str, image: AnnotatedImage) -> dict[str, float]:
        """The four numbers of the largest region of a category; nothing where there is none."""
        of_category = [r for r in image.regions if r.category == self._names.index(category) and not r.crowd]
        regions = [region for region in of_category if region.area > 0]
        for region in of_category:
            if not region.area:
                self._chosen[f"regions of {category} without extent, which are no box {name}"] += 1
                if not self._uses_all:
                    self.account.became(REGIONS, region.name, _NO_EXTENT)
        if not regions:
            return {}
        largest = max(regions, key=lambda region: region.area)
        self.account.became(REGIONS, largest.name, _USED)
        if len(regions) > 1:
            self._chosen[f"images of several {category}, whose largest is the box {name}"] += 1
        for region in regions:
            if region is not largest and not self._uses_all:
                self.account.became(REGIONS, region.name, _NOT_LARGEST)
        assert largest.box is not None
        return {f"{name}_{side}": float(edge) for side, edge in zip(SIDES, largest.box, strict=True)}

    def _points_of(self, name: str, category: str, image: AnnotatedImage) -> Label | None:
        """The points of the region of a category that has some; None where there is none.

        Raises:
            UserError: there are several, and nothing is said of them.
        """
        of_category = [r for r in image.regions if r.category == self._names.index(category) and not r.crowd]
        regions = [region for region in of_category if any(visibility for _, _, visibility in region.points)]
        if len(regions) > 1 and self._several == "refuse":
            raise UserError(
                f"{image.where or image.path}: expected the points of one {category}, found those of "
                f"{len(regions)}. Say --several largest, or cut the images out first."
            )
        chosen = max(regions, key=lambda region: region.area, default=None)
        if len(regions) > 1:
            self._chosen[f"images with the points of several {category}, whose largest is {name}"] += 1
        for region in of_category if not self._uses_all else ():
            fate = _USED if region is chosen else _NOT_LARGEST if region in regions else _NO_POINT
            self.account.became(REGIONS, region.name, fate)
        return None if chosen is None else labelled(chosen.points)

    @property
    def _uses_all(self) -> bool:
        return bool(self._multilabel or self._masks)

    def _drawn(self, image: AnnotatedImage) -> RegionMask:
        drawn: list[tuple[int, Outline]] = []
        for region in image.regions:
            value = region.category + 1
            outline = region.outline
            if region.box is None and outline == NO_AREA:
                if not self._multilabel:
                    self.account.became(REGIONS, region.name, _NO_AREA)
                continue
            if region.crowd and self._crowds == "ignore":
                value = IGNORE
                self._chosen["crowds whose pixels are ignored in masks (--crowds)"] += 1
            if outline is None:
                if region.box is None:
                    raise UserError(f"{region.name}: expected an outline or a box, found neither.")
                value, outline = IGNORE, Rectangle(region.box)
                self._chosen["regions without an outline, whose boxes are ignored in masks"] += 1
            drawn.append((value, outline))
        return RegionMask(tuple(drawn), image.height, image.width, image.path)

    def _end(self, image: AnnotatedImage) -> None:
        """The fate of the regions of an image that have none yet."""
        for region in image.regions:
            used = _CROWD if region.crowd else _USED
            self.account.became(REGIONS, region.name, used if self._uses_all else _NOT_ASKED)


class TreeImporter(RegionImporter):
    """An importer whose annotations lie in a folder or a zip with their images; it writes `read`."""

    def __init__(
        self,
        source: Annotated[Path, Help("A directory or a zip of images and their annotations.", "SRC")],
        classes: Annotated[
            tuple[str, ...], Help("Class names by index; without it those that the files have.", "NAME,...")
        ] = (),
        categories: Categories = "",
        masks: Masks = "",
        box: Boxes = {},  # noqa: B006 (never changed)
        empty: Empty = "none",
    ) -> None:
        self.ask(categories, masks, box, empty, "ignore")
        self._source, self._tree = source, Tree(source)
        self.read(classes)

    @property
    def name(self) -> str:
        return self._source.resolve().stem

    @abstractmethod
    def read(self, classes: tuple[str, ...]) -> None:
        """Find the annotations and their images, and say by `has` and `enter_files` what was found."""

    def has_images(
        self,
        names: Sequence[str],
        images: list[AnnotatedImage],
        files: Sequence[str],
        places: Sequence[str],
    ) -> None:
        """What was read where every image has annotations of its own; `files` are those with annotations, and
        `places` are where they say each image's, as a path.

        Raises:
            UserError: two annotations for one image.
        """
        images, lists = splits_by_place(self._tree, images, places, self._noted)
        self.has(self._tree, names, images)
        found = [self._tree.inside(image.source) for image in images if image.source is not None]
        if len(set(found)) < len(found):
            twice = [place for place, number in Counter(found).items() if number > 1]
            raise UserError(f"{self._source}: expected each image once, found {listed(twice)} several times.")
        self.enter_files(found, [*files, *lists])


def categories_of(labels: Mapping[str, int], classes: Sequence[str], notes: list[str]) -> list[str]:
    """The categories by index: those that are stated, else those that regions name, in their usual order.

    `labels` are counted; several texts for one are added to `notes`.

    Raises:
        UserError: a region names none, or one that is not stated.
    """
    named, classes = {plain(label) for label in labels}, tuple(dict.fromkeys(map(plain, classes)))
    if "" in named:
        raise UserError("regions: expected a label on each, found none on some.")
    if len(named) < len(labels):
        forms = vocabulary(Declared(sorted(named)))
        notes += [f"labels: {said}" for said in forms.spellings(labels)]
    if not classes:
        return class_order(named)
    names = [name for name in classes if name != BACKGROUND]
    if others := sorted(named - set(names)):
        raise UserError(
            f"classes: expected all labels of regions ({', '.join(names)}), found {listed(others)} too."
        )
    return names


def splits_by_place(
    tree: Tree, images: Sequence[AnnotatedImage], places: Sequence[str], notes: list[str]
) -> tuple[list[AnnotatedImage], list[str]]:
    """The images with the splits that they have, those of their folders, of those of their annotations (at
    `places`), or of lists; and the lists."""
    if any(image.split for image in images):
        return list(images), []
    folders, whose = splits_of_folders([image.path for image in images]), "images"
    if not any(folders):
        folders, whose = splits_of_folders(places), "annotations"
    lists = SplitLists(tree, [path for path in tree.files if is_list_of_a_split(path)])
    if any(folders):
        notes.append(f"splits taken from the folders of the {whose}")
        words, used = folders, []
    else:
        words = splits_in_lists(lists, [image.path for image in images], notes)
        used = list(lists.files) if any(words) else []
    return [replace(image, split=word) for image, word in zip(images, words, strict=True)], used


def read_xml(source: Source) -> ElementTree.Element:
    """The root of an XML file.

    Raises:
        UserError: it is none, or declares a document type, which may refer to other files.
    """
    data = source.read()
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise UserError(f"{source}: expected plain XML, found a document type. Remove its declaration.")
    try:
        return ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise UserError(f"{source}: expected XML, found: {error}.") from None


def read_json(source: Source) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: it is none.
    """
    try:
        return json.loads(source.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: expected a JSON file, found: {error}.") from None


def item(owner: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A field of a JSON object.

    Raises:
        UserError: it is not there, or something else.
    """
    if not isinstance(owner, dict):
        raise UserError(f"{where}: expected an object, found {type(owner).__name__}.")
    value = owner.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = kind.__name__ if isinstance(kind, type) else " or ".join(each.__name__ for each in kind)
        found = "nothing" if name not in owner else repr(value)[:40]
        raise UserError(f"{where}: expected {name!r} ({wanted}), found {found}.")
    return value


def numbers(values: Any, length: int | None, where: str) -> list[float]:
    """A list of finite numbers.

    Raises:
        UserError: it is something else.
    """
    good = isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in values
    )
    if not good or (length is not None and len(values) != length):
        raise UserError(f"{where}: expected {length or 'a list of'} numbers, found {str(values)[:60]}.")
    return [float(value) for value in values]
