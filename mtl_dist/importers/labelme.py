"""LabelMe's JSON, a file for each image: polygons, rectangles, circles and masks with a name each.

    {"imagePath": "a.jpg", "imageHeight": 375, "imageWidth": 500,
     "shapes": [{"label": "cat", "shape_type": "polygon", "points": [[x, y], ...]}]}

https://github.com/wkentaro/labelme
"""

from __future__ import annotations

import base64
import binascii
import math
from collections import Counter
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from mtl_dist.data.images import UnreadableImage, open_image
from mtl_dist.errors import UserError
from mtl_dist.importers.finding import FileFinder
from mtl_dist.importers.outlines import Bitmap, Ellipse, Outline, Polygons
from mtl_dist.importers.regions import (
    NO_AREA,
    AnnotatedImage,
    Region,
    TreeImporter,
    categories_of,
    item,
    numbers,
    read_json,
)
from mtl_dist.kinds.vocabulary import plain


class LabelMe(TreeImporter):
    """LabelMe's JSON files beside their images: polygons, rectangles, circles, masks.

    \b
      mtl prepare labelme photos/ data/photos --masks scene
      mtl prepare labelme photos/ data/photos --categories objects --box head=cat --classes cat,dog

    Splits are folders called train and val, of the images or else of their JSON files, or lists train.txt and
    val.txt; else they are made. Points and lines have no area, and are left out of masks and boxes.
    """

    def read(self, classes: tuple[str, ...]) -> None:
        source = self._source
        files = {path: self._content(path) for path in self._tree.files if path.lower().endswith(".json")}
        read = {path: content for path, content in files.items() if content is not None}
        if not read:
            raise UserError(
                f"{source}: expected LabelMe's JSON files, with 'shapes' and 'imagePath', found none of "
                f"{len(files)} JSON file(s)."
            )
        shapes = [
            (path, shape) for path, content in read.items() for shape in item(content, "shapes", list, path)
        ]
        labels = Counter(item(shape, "label", str, path) for path, shape in shapes)
        names = categories_of(labels, classes, self._noted)
        images: list[AnnotatedImage] = []
        for path, content in read.items():
            name = item(content, "imagePath", str, path).replace("\\", "/")
            size = item(content, "imageHeight", int, path), item(content, "imageWidth", int, path)
            folder = PurePosixPath(path).parent.as_posix()
            finder = FileFinder(self._tree, "" if folder == "." else f"{folder}/")
            place, found = finder.find(name, "") or (name, None)
            regions = [
                self._region(shape, f"{path}, shape {number}", names, size)
                for number, shape in enumerate(content["shapes"], 1)
            ]
            images.append(AnnotatedImage(place, found, size[1], size[0], regions, where=path))
        self.has_images(names, images, list(read), list(read))

    def _content(self, path: str) -> dict[str, Any] | None:
        content = read_json(self._tree.source(path))
        return content if isinstance(content, dict) and {"shapes", "imagePath"} <= set(content) else None

    def _region(self, shape: Any, where: str, names: list[str], size: tuple[int, int]) -> Region:
        label = names.index(plain(item(shape, "label", str, where)))
        kind = shape.get("shape_type") or "polygon"
        points = [numbers(point, 2, where) for point in item(shape, "points", list, where)]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        outline: Outline
        if kind == "polygon" and len(points) >= 3:
            outline = Polygons((tuple(value for point in points for value in point),))
            return Region(where, label, outline.box, outline)
        if kind == "mask" and len(points) == 2:
            inside = _bitmap(item(shape, "mask", str, where), where)
            outline = Bitmap(
                inside.tobytes(), inside.shape[0], inside.shape[1], round(min(ys)), round(min(xs))
            )
            return Region(where, label, outline.box, outline)
        if kind == "rectangle" and len(points) == 2:
            edges = (min(xs), min(ys), max(xs), max(ys))
            corners = (edges[0], edges[1], edges[2], edges[1], edges[2], edges[3], edges[0], edges[3])
            return Region(where, label, edges, Polygons((corners,)))
        if kind == "circle" and len(points) == 2:
            radius = math.hypot(xs[1] - xs[0], ys[1] - ys[0])
            outline = Ellipse(xs[0], ys[0], radius, radius)
            return Region(where, label, outline.box, outline)
        if kind in ("point", "points", "line", "linestrip"):
            return Region(where, label, None, NO_AREA)
        raise UserError(
            f"{where}: expected a polygon of 3 points, a rectangle, a circle or a mask of 2, or points and "
            f"lines, found {kind!r} of {len(points)}."
        )


def _bitmap(text: str, where: str) -> np.ndarray:
    """The booleans (H, W) of a mask in a shape."""
    try:
        with open_image(base64.b64decode(text, validate=True)) as image:
            return np.asarray(image.convert("L")) > 0
    except (binascii.Error, UnreadableImage) as error:
        raise UserError(f"{where}: expected a mask as a PNG in base64, found: {error}.") from None
