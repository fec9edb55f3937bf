"""Pascal VOC: an XML file of boxes for each image, and masks as palette PNGs.

    Annotations/*.xml   JPEGImages/   SegmentationClass/*.png   ImageSets/Main|Segmentation/train.txt, val.txt

Corners count pixels from 1 and are in the box: xmin 1 and xmax 5 are the edges 0 and 5.
http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from mtl_dist.errors import UserError
from mtl_dist.importers.finding import FileFinder
from mtl_dist.importers.options import Help
from mtl_dist.importers.outlines import Edges
from mtl_dist.importers.regions import (
    AnnotatedImage,
    Boxes,
    Categories,
    Empty,
    Masks,
    Region,
    RegionImporter,
    categories_of,
    read_xml,
    splits_by_place,
)
from mtl_dist.importers.sources import Source, Tree
from mtl_dist.importers.splitting import is_split_word
from mtl_dist.importers.summary import listed
from mtl_dist.kinds.vocabulary import plain

_IMAGES, _MASKS, _SETS = "JPEGImages", "SegmentationClass", "ImageSets"
_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)
"""Those of VOC 2007 to 2012, in the order of the values in its masks."""


class Voc(RegionImporter):
    """Pascal VOC: Annotations/*.xml, JPEGImages/, SegmentationClass/*.png, ImageSets/*/train.txt

    \b
      mtl prepare voc VOC2012/ data/voc --categories objects
      mtl prepare voc VOC2012/ data/scenes --image-set Segmentation --masks scene
      mtl prepare voc pets/ data/heads --box head=cat

    Splits are the lists in ImageSets/<image set>; without such a folder they are made, of all XML files.
    """

    def __init__(
        self,
        source: Annotated[Path, Help("A directory or a zip of XML files and images.", "SRC")],
        image_set: Annotated[str, Help("The folder of ImageSets whose lists are the splits.", "NAME")] = "",
        classes: Annotated[
            tuple[str, ...],
            Help("Class names by index, background first in masks; without it VOC's.", "NAME,..."),
        ] = (),
        difficult: Annotated[
            Literal["use", "skip"], Help("Whether objects marked as difficult count.", "use|skip")
        ] = "use",
        categories: Categories = "",
        masks: Masks = "",
        box: Boxes = {},  # noqa: B006 (never changed)
        empty: Empty = "none",
    ) -> None:
        self.ask(categories, masks, box, empty, "ignore")
        self._source, self._tree = source, Tree(source)
        self._finder = FileFinder(self._tree, "")
        self._difficult = 0
        parsed = {path: self._parse(path) for path in self._tree.files if path.lower().endswith(".xml")}
        stems = [PurePosixPath(path).stem for path in parsed]
        splits, lists = self._lists(image_set, set(stems))
        if len(set(stems)) < len(stems):
            raise UserError(f"{source}: expected each XML file's name once, found one in several folders.")
        without_xml = sorted(set(splits) - set(stems))
        unmarked = self._unmarked(without_xml, lists, bool(masks), has_xml=bool(parsed))
        names = self._names_of(parsed, classes)
        unlisted = [path for path in parsed if splits and PurePosixPath(path).stem not in splits]
        used = [path for path in parsed if path not in set(unlisted)]
        read = [self._annotated(path, parsed[path], names, difficult, bool(masks), splits) for path in used]
        pngs = [self._tree.inside(image.mask) for image in read if isinstance(image.mask, Source)]
        read += [AnnotatedImage(*at, 0, 0, (), splits[name], None, name) for name, at in unmarked.items()]
        if unmarked:
            self._noted.append(
                f"images of lists without an XML file, as of nothing marked: {len(unmarked)} "
                f"({listed(list(unmarked))})"
            )
        read, others = splits_by_place(self._tree, read, [image.where for image in read], self._noted)
        self.has(self._tree, names, read)
        images = [self._tree.inside(image.source) for image in read if image.source is not None]
        if len(set(images)) < len(images):
            raise UserError(f"{source}: expected an XML file for each image, found two for one.")
        self.enter_files(images, [*used, *lists, *others], pngs, unlisted)
        if unlisted:
            self._noted.append(
                f"XML files that no list of {_SETS} names, left out: {len(unlisted)} ({listed(unlisted)})"
            )
        if self._difficult:
            self._noted.append(f"difficult objects that do not count: {self._difficult} (--difficult)")

    @property
    def name(self) -> str:
        return self._source.resolve().stem

    def _listed(self, name: str) -> tuple[str, Source] | None:
        """The image of a name in a list."""
        return self._finder.find(f"{_IMAGES}/{name}", "") or self._finder.find(name, "")

    def _unmarked(
        self, names: Sequence[str], lists: Sequence[str], masks: bool, *, has_xml: bool
    ) -> dict[str, tuple[str, Source]]:
        """The images of names in lists that have no XML file: nothing is marked in them.

        Raises:
            UserError: an image is missing, or has a mask, so that its XML file is what is missing.
        """
        found = {name: self._listed(name) if has_xml else None for name in names}
        missing = [name for name, at in found.items() if at is None]
        if missing:
            table = f"mtl prepare table {self._source}/{PurePosixPath(lists[0]).parent} OUT"
            table += f" --root {self._source}/{_IMAGES} --segmentation NAME={self._source}/{_MASKS}"
            advice = f" Images with masks alone are a table: `{table}`." if masks and not has_xml else ""
            raise UserError(
                f"{self._source}: expected an XML file for each name in {lists[0]} and its neighbours, found "
                f"none for {len(missing)} ({listed(missing)}).{advice}"
            )
        for name in names:
            if masks or self._mask_file(name):
                raise UserError(f"{name}: expected its XML file beside its mask, found none. Unlist it.")
        return {name: at for name, at in found.items() if at is not None}

    def _annotated(
        self,
        path: str,
        root: ElementTree.Element,
        names: list[str],
        difficult: str,
        masks: bool,
        splits: Mapping[str, str],
    ) -> AnnotatedImage:
        """What an XML file says of its image.

        Raises:
            UserError: it is damaged, or a mask is wanted and missing.
        """
        stem = PurePosixPath(path).stem
        regions = self._regions(root, path, names, difficult)
        place, found = self._image(root, path)
        mask = self._mask_file(stem) if masks else None
        if masks and mask is None:
            raise UserError(
                f"{path}: expected its mask as {_MASKS}/{stem}.png, found none. Use --image-set "
                "Segmentation for the images that have one, or --categories."
            )
        return AnnotatedImage(place, found, 0, 0, regions, splits.get(stem, ""), mask, path)

    def _parse(self, path: str) -> ElementTree.Element:
        root = read_xml(self._tree.source(path))
        if root.tag != "annotation":
            raise UserError(f"{path}: expected Pascal VOC's <annotation>, found <{root.tag}>.")
        return root

    def _lists(self, image_set: str, stems: Container[str]) -> tuple[dict[str, str], list[str]]:
        """The split of each listed name, and the files of lists."""
        found = [
            path
            for path in self._tree.files
            if PurePosixPath(path).suffix == ".txt"
            and PurePosixPath(path).parent.parent.name == _SETS
            and is_split_word(PurePosixPath(path).stem)
        ]
        sets = sorted({PurePosixPath(path).parent.name for path in found})
        if image_set and image_set not in sets:
            raise UserError(
                f"--image-set: expected one of {', '.join(sets) or 'a folder of ImageSets (none is there)'}, "
                f"found {image_set!r}."
            )
        if len(sets) > 1 and not image_set:
            raise UserError(
                f"{self._source}: expected one image set, found {listed(sets)}. Choose with --image-set."
            )
        chosen = image_set or next(iter(sets), "")
        lists = [path for path in found if PurePosixPath(path).parent.name == chosen]
        splits: dict[str, str] = {}
        for path in lists:
            split = PurePosixPath(path).stem.lower()
            for line in self._tree.source(path).read().decode("utf-8-sig").splitlines():
                name = _listed_name(line.strip(), stems)
                if name and splits.setdefault(name, split) != split:
                    raise UserError(
                        f"{path}: expected {name!r} in one split, found it in {splits[name]} too."
                    )
        return splits, lists

    def _names_of(self, parsed: Mapping[str, ElementTree.Element], classes: tuple[str, ...]) -> list[str]:
        if not parsed:
            raise UserError(f"{self._source}: expected Pascal VOC's XML files, found none.")
        objects = [(each, path) for path, root in parsed.items() for each in root.iter("object")]
        named = Counter(_text(each, "name", path) for each, path in objects)
        usual = {plain(name) for name in named} <= set(_CLASSES)
        return categories_of(named, classes or (_CLASSES if usual else ()), self._noted)

    def _regions(
        self, root: ElementTree.Element, path: str, names: list[str], difficult: str
    ) -> list[Region]:
        regions = []
        for number, each in enumerate(root.findall("object"), 1):
            where = f"{path}, object {number}"
            skipped = difficult == "skip" and (each.findtext("difficult") or "").strip() == "1"
            self._difficult += skipped
            if skipped:
                self.account.found("regions", [where])
                self.account.became("regions", where, "left out: difficult")
                continue
            corners = [_number(each, f"bndbox/{side}", where) for side in ("xmin", "ymin", "xmax", "ymax")]
            edges: Edges = (corners[0] - 1, corners[1] - 1, corners[2], corners[3])
            regions.append(Region(where, names.index(plain(_text(each, "name", where))), edges))
        return regions

    def _image(self, root: ElementTree.Element, path: str) -> tuple[str, Source | None]:
        name = _text(root, "filename", path)
        return self._finder.find(name, "") or (name, None)

    def _mask_file(self, stem: str) -> Source | None:
        found = self._finder.find(f"{_MASKS}/{stem}.png", "")
        return found[1] if found else None


def _listed_name(line: str, stems: Container[str]) -> str:
    """The name in a line of a list, in which -1, 0 or 1 may follow; a name may hold blanks."""
    if line in stems:
        return line
    name, _, flag = line.rpartition(" ")
    return name.strip() if flag in ("-1", "0", "1") and name else line


def _text(element: ElementTree.Element, name: str, where: str) -> str:
    text = (element.findtext(name) or "").strip()
    if not text:
        raise UserError(f"{where}: expected <{name}>, found none.")
    return text


def _number(element: ElementTree.Element, name: str, where: str) -> float:
    text = _text(element, name, where)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: expected a number in <{name}>, found {text!r}.")
    return value
