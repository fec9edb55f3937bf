"""Plain lists of images: `path label` a line, separated by blanks, tabs or commas, with or without a first
line of column names; and the lists train.txt, val.txt, ... that say which images are in which split.

    # image class
    00 1
    01 2
"""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from unicodedata import normalize

from mtl_dist.data.images import IMAGE_EXTENSIONS, extension_of
from mtl_dist.errors import UserError
from mtl_dist.importers.sources import Tree
from mtl_dist.importers.splitting import SPLIT_WORDS, is_split_word
from mtl_dist.importers.summary import listed

LISTS = (".txt", ".lst", ".list")
COMMENT = "left out: a comment"

_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "pipes"}
_PATH_WITH_BLANKS = re.compile(
    rf"(?P<path>\S.*?\.(?:{'|'.join(sorted(IMAGE_EXTENSIONS))}))(?:\s+(?P<rest>.*))?", re.IGNORECASE
)


@dataclass(frozen=True)
class Line:
    """One line of a list: its number from 1 on, and its cells."""

    number: int
    cells: tuple[str, ...]


@dataclass(frozen=True)
class PlainList:
    """A list that was read: column names where it states some, its lines, its comments' numbers, and what
    stands between the columns."""

    columns: tuple[str, ...]
    lines: Sequence[Line]
    comments: Sequence[int]
    separator: str


def read_list(text: str, where: str, is_there: Callable[[str], bool]) -> PlainList:
    """The lines of a list; `is_there` says of a cell whether there is a file of that name.

    Names stand in the first line, if none of its cells names a file, or in the last comment before it.

    Raises:
        UserError: a line with more cells than the others.
    """
    numbered = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    comments = [(number, line) for number, line in numbered if line.startswith("#")]
    plain = [(number, line) for number, line in numbered if not line.startswith("#")]
    cells, separator = _cells([line for _, line in plain], is_there)
    lines = [Line(number, each) for (number, _), each in zip(plain, cells, strict=True)]
    width = Counter(len(each) for each in cells).most_common(1)[0][0] if cells else 0
    for line in lines:
        if len(line.cells) > width:
            raise UserError(
                f"{where} line {line.number}: expected {width} cell(s) as in most lines, found "
                f"{len(line.cells)}. Quote cells that hold blanks or separators."
            )
    columns: tuple[str, ...] = ()

    def names_a_file(cell: str) -> bool:
        return looks_like_a_file(cell) or (bool(cell) and is_there(cell))

    if lines and len(lines[0].cells) == width and not any(map(names_a_file, lines[0].cells)):
        columns, lines = lines[0].cells, lines[1:]
    elif lines:
        before = [line.lstrip("# ") for number, line in comments if number < lines[0].number]
        stated = _cells(before[-1:], is_there)[0] if before else []
        if stated and len(stated[0]) == width and len(set(stated[0])) == width:
            columns = stated[0]
    return PlainList(columns, lines, [number for number, _ in comments], separator)


def column_names(lines: Sequence[Line], is_there: Callable[[str], bool], file: str, label: str) -> list[str]:
    """Names for the columns of a list without any: `file` for the one of files, `label` for others."""
    width = max(len(line.cells) for line in lines)
    cells = lines[0].cells
    files = [at for at, cell in enumerate(cells) if looks_like_a_file(cell)]
    files += [at for at, cell in enumerate(cells) if cell and is_there(cell)]
    first = files[0] if files else 0
    labels = [label if width == 2 else f"{label}_{number}" for number in range(1, width)]
    return [*labels[:first], file, *labels[first:]]


def _cells(lines: Sequence[str], is_there: Callable[[str], bool]) -> tuple[list[tuple[str, ...]], str]:
    """The cells of each line, and what separates them."""
    for separator, name in _SEPARATORS.items():
        if lines and sum(separator in line for line in lines) > len(lines) / 2:
            rows = csv.reader(lines, delimiter=separator, skipinitialspace=True)
            return [tuple(cell.strip() for cell in row) for row in rows], name
    split = [_words(line) for line in lines]
    widths = Counter(map(len, split))
    with_blanks = [_PATH_WITH_BLANKS.fullmatch(line) for line in lines]
    first = with_blanks[0] if with_blanks else None
    in_paths = first is not None and " " in first["path"] and is_there(first["path"])
    if len(widths) > 1 or in_paths:
        split = [
            (match["path"], *(match["rest"] or "").split())
            if match and (in_paths or len(words) > min(widths))
            else words
            for match, words in zip(with_blanks, split, strict=True)
        ]
    return split, "blanks"


def _words(line: str) -> tuple[str, ...]:
    if '"' in line:
        return tuple(next(csv.reader([line.replace("\t", " ")], delimiter=" ", skipinitialspace=True)))
    return tuple(line.split())


class SplitLists:
    """The splits of images by lists called train.txt, val.txt, ...: a name a line, with or without folders
    and extension."""

    def __init__(self, tree: Tree, files: Sequence[str]) -> None:
        self.tree, self.files = tree, files
        self._by_name: defaultdict[str, list[tuple[tuple[str, ...], str]]] = defaultdict(list)
        self._lines: dict[str, tuple[str, ...]] = {}
        for name in files:
            split = PurePosixPath(name).stem.lower()
            for number, line in enumerate(text_of(tree, name).splitlines(), 1):
                words = _words(line.strip()) if not line.strip().startswith("#") else ()
                for path in dict.fromkeys((words[0], line.strip()) if words else ()):
                    parts = _parts(path)
                    if parts:
                        self._by_name[parts[-1]].append((parts, split))
                        self._lines.setdefault(f"{name} line {number}", parts)
        self._used: set[tuple[str, ...]] = set()

    def of(self, path: str) -> str:
        """The split of the image at a path, or nothing.

        Raises:
            UserError: lists of several splits name it.
        """
        if not self._by_name:
            return ""
        found: list[tuple[tuple[str, ...], str]] = []
        for parts in dict.fromkeys((_parts(path), _parts(str(PurePosixPath(path).with_suffix(""))))):
            named = self._by_name.get(parts[-1], ())
            found += [each for each in named if _ends_alike(each[0], parts)]
        if not found:
            return ""
        longest = max(len(parts) for parts, _ in found)
        splits = sorted({split for parts, split in found if len(parts) == longest})
        if len(splits) > 1:
            raise UserError(
                f"{self.tree}: expected {path!r} in one of {', '.join(self.files)}, found it in "
                f"{' and '.join(splits)}."
            )
        self._used.update(parts for parts, _ in found if len(parts) == longest)
        return splits[0]

    @property
    def unused(self) -> list[str]:
        """The lines whose name no image had that was asked for."""
        return [where for where, parts in self._lines.items() if parts not in self._used]


def is_list_of_a_split(path: str) -> bool:
    """Whether a file is a list by its name, called as a split."""
    name = PurePosixPath(path)
    return name.suffix.lower() in LISTS and is_split_word(name.stem)


def lists_beside(tree: Tree, folder: str) -> list[str]:
    """The lists called as splits in a folder of a tree, which is not searched through."""
    known: dict[str, None] = {}
    for word in SPLIT_WORDS:
        for name in (word, word.capitalize(), word.upper()):
            for suffix in LISTS:
                if tree.find(f"{folder}{name}{suffix}") is not None:
                    known.setdefault(f"{folder}{name}{suffix}")
    return list(known)


def splits_in_lists(lists: SplitLists, paths: Sequence[str], notes: list[str]) -> list[str]:
    """The word for the split of each image in the lists, nothing where they are no lists of these images."""
    splits = [lists.of(path) for path in paths]
    if any(splits):
        notes.append(f"splits taken from the lists {', '.join(lists.files)}")
        if lists.unused:
            notes.append(f"lines of them that name no image: {len(lists.unused)} ({listed(lists.unused)})")
    return splits


def text_of(tree: Tree, name: str) -> str:
    """A text file of a tree.

    Raises:
        UserError: it is not in UTF-8.
    """
    try:
        return tree.source(name).read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{tree}/{name}: expected UTF-8 text, found {error}. Save it as UTF-8.") from None


def looks_like_a_file(cell: str) -> bool:
    """Whether a cell names an image by its extension."""
    return extension_of(cell) in IMAGE_EXTENSIONS


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(normalize("NFC", path)).parts if part not in ("/", ".", ".."))


def _ends_alike(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether the shorter path is the end of the longer one."""
    length = min(len(a), len(b))
    return length > 0 and a[-length:] == b[-length:]
