"""YOLO's text files, a line per object: a class and a box, or a class and a polygon, in shares of the image.

    data.yaml   images/train/a.jpg   labels/train/a.txt:  0 0.5 0.5 0.2 0.1
                                                          1 0.1 0.1 0.4 0.1 0.4 0.6

Four numbers are a box (centre, width, height), six and more a polygon. An image without a file shows nothing.
https://docs.ultralytics.com/datasets/detect  https://docs.ultralytics.com/datasets/segment
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from mtl_dist.data.images import IMAGE_EXTENSIONS, UnreadableImage, examine_image, extension_of
from mtl_dist.errors import UserError
from mtl_dist.importers.lists import SplitLists, is_list_of_a_split, splits_in_lists, text_of
from mtl_dist.importers.outlines import Polygons
from mtl_dist.importers.regions import (
    AnnotatedImage,
    Region,
    TreeImporter,
)
from mtl_dist.importers.sources import Tree
from mtl_dist.importers.splitting import is_split_word, splits_of_folders
from mtl_dist.importers.summary import listed

_YAML = (".yaml", ".yml")
_NAMES = ("classes.txt", "obj.names", "classes.names", "predefined_classes.txt")
_NOT_LABELS = ("readme", "license", "requirements", "notes")
_IMAGES, _LABELS = "images", "labels"
_SLACK = 0.01
"""By how much a share of the image may lie outside of it, for tools that round."""


class Yolo(TreeImporter):
    """YOLO's text files: data.yaml, images/train/*.jpg, labels/train/*.txt; boxes or polygons.

    \b
      mtl prepare yolo coco8/ data/coco8 --categories objects
      mtl prepare yolo coco8-seg/ data/coco8 --masks scene
      mtl prepare yolo cats/ data/heads --box head=cat

    Splits are those of data.yaml, of folders called train and val, or of lists; else they are made.
    """

    def read(self, classes: tuple[str, ...]) -> None:
        source = self._source
        stated, self._settings = self._data_yaml()
        names, files = self._names_of(stated, classes)
        images = [path for path in self._tree.files if extension_of(path) in IMAGE_EXTENSIONS]
        texts = {path for path in self._tree.files if path.lower().endswith(".txt") and path not in files}
        labels = {path: named for path in images if (named := label_file(path)) in texts}
        if not labels:
            raise UserError(
                f"{source}: expected text files of YOLO beside the images, or in labels/ for images/, found "
                f"none for {len(images)} picture(s) among {listed(self._tree.files) or 'no files'}."
            )
        splits, lists = self._splits(images, stated)
        read = []
        for path in images:
            text = labels.get(path)
            lines = text_of(self._tree, text).splitlines() if text else []
            regions, size = self._regions(path, text or path, lines, len(names))
            found = self._tree.source(path)
            read.append(AnnotatedImage(path, found, *size, regions, splits[path], where=text or path))
        self.has(self._tree, names, read)
        used = [*labels.values(), *files, *lists]
        self.enter_files(images, used)
        lost = sorted(
            path
            for path in texts - set(used)
            if PurePosixPath(path).stem.lower() not in _NOT_LABELS and looks_like_labels(self._tree, path)
        )
        if lost:
            raise UserError(
                f"{source}: expected an image for each text file of labels, found none for {len(lost)} "
                f"({listed(lost)}). Add the images, or take the files away."
            )

    def _data_yaml(self) -> tuple[dict[str, Any], list[str]]:
        """What the file of settings says, and its name."""
        found = [path for path in self._tree.files if PurePosixPath(path).suffix.lower() in _YAML]
        contents = []
        for path in found:
            try:
                content = yaml.load(text_of(self._tree, path), yaml.BaseLoader)  # `no` is a name, not False
            except yaml.YAMLError as error:
                raise UserError(
                    f"{self._tree}/{path}: expected YAML, found: {error}.".replace("\n", " ")
                ) from None
            if isinstance(content, dict) and "names" in content:
                contents.append((path, content))
        if len(contents) > 1:
            raise UserError(
                f"{self._source}: expected one file of settings with names, found "
                f"{listed([path for path, _ in contents])}. Take the others away."
            )
        return (contents[0][1], [contents[0][0]]) if contents else ({}, [])

    def _names_of(self, stated: Mapping[str, Any], classes: tuple[str, ...]) -> tuple[list[str], list[str]]:
        """The class names by index, and the files that they are read from."""
        files = list(self._settings)
        names = stated.get("names")
        beside = [path for path in self._tree.files if PurePosixPath(path).name in _NAMES]
        if classes:
            return list(classes), [*files, *beside]
        if isinstance(names, dict):
            wanted = range(len(names))
            if sorted(map(str, names)) != sorted(map(str, wanted)):
                raise UserError(
                    f"{files[0]}: expected names of the classes 0 to {len(names) - 1}, found {names}."
                )
            by_index = {int(index): str(name) for index, name in names.items()}
            return [by_index[index] for index in wanted], [*files, *beside]
        if isinstance(names, list):
            return [str(name) for name in names], [*files, *beside]
        if beside:
            of_files = {path: text_of(self._tree, path).strip().splitlines() for path in beside}
            lines = [line.strip() for line in of_files[beside[0]]]
            for path, others in of_files.items():
                if [line.strip() for line in others] != lines:
                    raise UserError(
                        f"{self._source}: expected the same class names in {beside[0]} and {path}."
                    )
            if not all(lines):
                raise UserError(
                    f"{beside[0]}: expected a class name on each line, found an empty line "
                    f"{lines.index('') + 1}."
                )
            return lines, [*files, *beside]
        raise UserError(
            f"{self._source}: expected class names in data.yaml or classes.txt, found neither. Name them by "
            "their index: --classes cat,dog."
        )

    def _splits(self, images: Sequence[str], stated: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
        """The word for the split of each image, and the lists that were read."""
        base = str(stated.get("path", "")).strip("./")
        found: dict[str, str] = {}
        lists: list[str] = []
        for word in stated:
            places = stated[word] if isinstance(stated[word], list) else [stated[word]]
            if not is_split_word(str(word)) or not all(isinstance(place, str) for place in places):
                continue
            for place in places:
                parts = [part for part in PurePosixPath(place).parts if part not in ("..", ".", "/")]
                tries = ["/".join(parts[n:]) for n in range(len(parts))] if parts else []
                tries = [*(f"{base}/{each}" for each in tries if base), *tries]
                for each in tries:
                    inside = [path for path in images if path.startswith(f"{each}/")]
                    if each in self._tree.files:
                        chosen = SplitLists(self._tree, [each])
                        inside = [path for path in images if chosen.of(path)]
                        lists.append(each)
                    if inside:
                        for path in inside:
                            if found.setdefault(path, str(word)) != word:
                                raise UserError(
                                    f"{self._settings[0]}: expected {path!r} in one split, found it in "
                                    f"{found[path]} and {word}."
                                )
                        break
        if found:
            self._noted.append(f"splits taken from {self._settings[0]}")
            return {path: found.get(path, "") for path in images}, lists
        folders = splits_of_folders(images)
        if any(folders):
            self._noted.append("splits taken from the folders of the images")
            return dict(zip(images, folders, strict=True)), []
        named = SplitLists(self._tree, [path for path in self._tree.files if is_list_of_a_split(path)])
        words = splits_in_lists(named, images, self._noted)
        return dict(zip(images, words, strict=True)), list(named.files) if any(words) else []

    def _regions(
        self, image: str, where: str, lines: Sequence[str], num_classes: int
    ) -> tuple[list[Region], tuple[int, int]]:
        """The objects in the lines of a file, and the size of the image if there are any."""
        rows = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
        if not rows and not self._masks:
            return [], (0, 0)
        try:
            facts = examine_image(self._tree.source(image).read(), decode=False)
        except UnreadableImage:
            return [], (0, 0)  # packing says so
        width, height = facts.width, facts.height
        regions = []
        for number, words in rows:
            place = f"{where} line {number}"
            values = _numbers(words[1:], place)
            if not words[0].isdecimal() or int(words[0]) >= num_classes:
                raise UserError(
                    f"{place}: expected a class from 0 to {num_classes - 1} first, found {words[0]!r}."
                )
            xs = [x * width for x in values[0::2]]
            ys = [y * height for y in values[1::2]]
            if len(values) == 4:
                (x, w), (y, h) = xs, ys
                regions.append(Region(place, int(words[0]), (x - w / 2, y - h / 2, x + w / 2, y + h / 2)))
            elif len(values) >= 6 and len(values) % 2 == 0:
                ring = tuple(value for point in zip(xs, ys, strict=True) for value in point)
                outline = Polygons((ring,))
                regions.append(Region(place, int(words[0]), outline.box, outline))
            else:
                raise UserError(
                    f"{place}: expected a box (4 numbers) or a polygon (6 and more, in pairs) after the "
                    f"class, found {len(values)} number(s). Scores and key points are not read."
                )
        return regions, (width, height)


def label_file(image: str) -> str:
    """Where the labels of an image are: in labels/ for images/, else beside it."""
    parts = list(PurePosixPath(image).with_suffix(".txt").parts)
    at = [number for number, part in enumerate(parts[:-1]) if part == _IMAGES]
    if at:
        parts[at[-1]] = _LABELS
    return "/".join(parts)


def looks_like_labels(tree: Tree, path: str) -> bool:
    """Whether the lines of a file are numbers, as those of labels."""
    try:
        lines = [line.split() for line in text_of(tree, path).splitlines() if line.strip()]
        numbers = [[float(word) for word in words] for words in lines]
        return bool(lines) and all(len(row) > 4 and all(map(math.isfinite, row)) for row in numbers)
    except (ValueError, UserError):
        return False


def _numbers(words: Sequence[str], where: str) -> list[float]:
    """Shares of the image.

    Raises:
        UserError: they are none, or pixels.
    """
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = [math.nan]
    if not all(-_SLACK <= value <= 1 + _SLACK for value in values):
        raise UserError(
            f"{where}: expected shares of the image from 0 to 1, found {' '.join(words)[:60]!r}. Divide "
            "pixels by the image's width and height."
        )
    return values
