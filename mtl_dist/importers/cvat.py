"""CVAT's XML "for images": polygons, boxes, ellipses, masks and tags of each image, with their labels.

    <image name="a.jpg" width="500" height="375" subset="Train">
      <polygon label="cat" points="1.0,2.0;30.5,2.0;30.5,40.0"/> <box label="dog" xtl= ytl= xbr= ybr=/>
    </image>

https://docs.cvat.ai/docs/manual/advanced/xml_format/
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections import Counter

import numpy as np

from mtl_dist.errors import UserError
from mtl_dist.importers.finding import FileFinder
from mtl_dist.importers.outlines import Bitmap, Ellipse, Outline, Polygons
from mtl_dist.importers.regions import (
    NO_AREA,
    AnnotatedImage,
    Region,
    TreeImporter,
    categories_of,
    read_xml,
)
from mtl_dist.importers.splitting import is_split_word
from mtl_dist.kinds.vocabulary import plain

_SHAPES = ("polygon", "box", "ellipse", "mask", "tag", "polyline", "points", "cuboid", "skeleton")


class Cvat(TreeImporter):
    """CVAT's XML for images: polygons, boxes, ellipses, masks, tags.

    \b
      mtl prepare cvat export/ data/photos --masks scene
      mtl prepare cvat export.zip data/photos --categories objects

    Splits are the subsets of the images, where all have one, the folders of images, files such as train.xml
    and val.xml, or lists; else they are made. Classes are the labels in their order there. Points and lines
    have no area, and are left out of masks and boxes; a tag counts in --categories.
    """

    def read(self, classes: tuple[str, ...]) -> None:
        source = self._source
        found = [path for path in self._tree.files if path.lower().endswith(".xml")]
        roots = {
            path: root for path in found if (root := read_xml(self._tree.source(path))).tag == "annotations"
        }
        if not roots:
            raise UserError(
                f"{source}: expected CVAT's XML for images, with <annotations>, found none of {len(found)} "
                "XML file(s)."
            )
        stated = [
            (label.findtext("name") or "").strip()
            for root in roots.values()
            for label in root.iterfind(".//meta//labels/label")
        ]
        used = Counter(
            shape.get("label", "")
            for root in roots.values()
            for image in root.iter("image")
            for shape in image
        )
        names = categories_of(used, classes or tuple(filter(None, stated)), self._noted)
        finder = FileFinder(self._tree, "")
        images: list[AnnotatedImage] = []
        places: list[str] = []
        for path, root in roots.items():
            if root.find("track") is not None:
                raise UserError(
                    f"{path}: expected CVAT's XML for images, found tracks of a video. Export it so."
                )
            for image in root.iter("image"):
                name = image.get("name", "")
                where = f"{path}, image {name or image.get('id', '')!r}"
                place, file = finder.find(name, image.get("subset", "").lower()) or (name, None)
                size = round(_number(image, "height", where)), round(_number(image, "width", where))
                regions = [
                    _region(shape, f"{where}, {shape.tag} {number}", names, size)
                    for number, shape in enumerate(image, 1)
                ]
                subset = image.get("subset", "").strip().lower()
                split = subset if is_split_word(subset) else ""
                images.append(AnnotatedImage(place, file, size[1], size[0], regions, split, where=where))
                # Of several files each may be a split: train.xml, val.xml.
                places.append(f"{path.rpartition('.')[0] if len(roots) > 1 else '.'}/{name}")
        self.has_images(names, images, list(roots), places)


def _region(shape: ElementTree.Element, where: str, names: list[str], size: tuple[int, int]) -> Region:
    label = names.index(plain(shape.get("label", "")))
    outline: Outline
    if shape.tag == "polygon":
        outline = Polygons((_points(shape, where),))
        return Region(where, label, outline.box, outline)
    if shape.tag == "box":
        corners = [_number(shape, side, where) for side in ("xtl", "ytl", "xbr", "ybr")]
        left, top, right, bottom = corners
        ring = (left, top, right, top, right, bottom, left, bottom)
        outline = Polygons((_turned(ring, _number(shape, "rotation", where, "0")),))
        return Region(where, label, outline.box, outline)
    if shape.tag == "ellipse":
        at = [_number(shape, side, where) for side in ("cx", "cy", "rx", "ry")]
        outline = Ellipse(at[0], at[1], at[2], at[3], _number(shape, "rotation", where, "0"))
        return Region(where, label, outline.box, outline)
    if shape.tag == "mask":
        left, top, width, height = (
            round(_number(shape, side, where)) for side in ("left", "top", "width", "height")
        )
        runs = [int(run) for run in shape.get("rle", "").replace(" ", "").split(",") if run.isdecimal()]
        if sum(runs) != width * height:
            raise UserError(f"{where}: expected runs of {width}x{height} pixels, found {sum(runs)} in all.")
        inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        outline = Bitmap(inside.tobytes(), height, width, top, left)
        return Region(where, label, outline.box, outline)
    if shape.tag in _SHAPES:
        return Region(where, label, None, NO_AREA)
    raise UserError(f"{where}: expected one of {', '.join(_SHAPES)}, found <{shape.tag}>.")


def _points(shape: ElementTree.Element, where: str) -> tuple[float, ...]:
    try:
        values = tuple(
            float(value) for point in shape.get("points", "").split(";") for value in point.split(",")
        )
    except ValueError:
        values = ()
    if len(values) < 6 or len(values) % 2 or not all(map(math.isfinite, values)):
        raise UserError(f"{where}: expected points as x,y;x,y;x,y, found {shape.get('points', '')[:60]!r}.")
    return values


def _turned(ring: tuple[float, ...], degrees: float) -> tuple[float, ...]:
    """A ring turned clockwise, as the image shows it, about the middle of its corners."""
    if not degrees:
        return ring
    x, y = np.array(ring[::2]), np.array(ring[1::2])
    mid_x, mid_y, angle = x.mean(), y.mean(), math.radians(degrees)
    dx, dy = x - mid_x, y - mid_y
    turned_x = mid_x + dx * math.cos(angle) - dy * math.sin(angle)
    turned_y = mid_y + dx * math.sin(angle) + dy * math.cos(angle)
    return tuple(np.stack([turned_x, turned_y], axis=1).ravel().tolist())


def _number(element: ElementTree.Element, name: str, where: str, default: str = "") -> float:
    text = element.get(name, default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: expected a number as {name!r}, found {text!r}.")
    return value
