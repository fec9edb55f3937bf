"""One folder per class: `<class>/...`, with folders of splits above or below them, or without."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated
from unicodedata import normalize

from mtl_dist.config.nearest import nearest
from mtl_dist.data.images import IMAGE_EXTENSIONS, extension_of
from mtl_dist.errors import UserError
from mtl_dist.importers.account import IMAGE, NO_IMAGE, TABLE
from mtl_dist.importers.importer import Importer
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.lists import SplitLists, is_list_of_a_split, splits_in_lists
from mtl_dist.importers.made_masks import MadeMask, mask_maker
from mtl_dist.importers.options import Help
from mtl_dist.importers.sources import Tree
from mtl_dist.importers.splitting import is_bare_split_word, is_split_word, split_name, split_names
from mtl_dist.importers.summary import listed
from mtl_dist.importers.wanted import Missing, Strict
from mtl_dist.kinds.classification import Classification
from mtl_dist.kinds.segmentation import BACKGROUND, Segmentation
from mtl_dist.kinds.vocabulary import MISSING, Declared, plain, vocabulary

SKIP = "-"
"""In place of a level's task: folders that say nothing."""


class Folders(Importer):
    """One folder per class: CLASS/..., train|val|test/CLASS/... or CLASS/train|val|test/...

    \b
      mtl prepare folders photos/ data/breeds --task breed
      mtl prepare folders photos.zip data/breeds --task breed --split 0.8,0.1,0.1
      mtl prepare folders birds/ data/birds --levels order,species
      mtl prepare folders cifar10.zip data/cifar10 --task object --mask shape=otsu --val 0.1

    The classes are the folders' names, sorted (by number where all are numbers). Files that are no images
    by name are left out and counted. Lists train.txt, val.txt, test.txt of images are their splits.
    """

    def __init__(
        self,
        source: Annotated[Path, Help("A directory or a zip of class folders.", "SRC")],
        task: Annotated[str, Help("The task's name.", "NAME")] = "",
        levels: Annotated[
            tuple[str, ...],
            Help(
                "Where class folders lie in class folders: the task of each level, from the outermost; "
                "- for a level that is none.",
                "NAME,...",
            ),
        ] = (),
        mask: Annotated[
            dict[str, str],
            Help(
                "Masks made from the pictures: otsu, or the import path of a function of yours.", "TASK=HOW"
            ),
        ] = {},  # noqa: B006 (never changed)
        missing: Missing = MISSING,
        strict: Strict = False,
    ) -> None:
        if bool(task) == bool(levels):
            raise UserError(
                "--task: expected one of --task NAME and --levels NAME,..., found "
                f"{'both' if task else 'neither'}."
            )
        self._levels = tuple(levels) or (task,)
        named = [level for level in self._levels if level != SKIP]
        if not named or len(set(named)) < len(named):
            raise UserError(f"--levels: expected each task once, found {', '.join(self._levels)}.")
        for name in mask:
            if name in named:
                raise UserError(f"--mask: expected another name than the task {name}, found the same.")
        for how in mask.values():
            mask_maker(how)
        self._masks = mask
        self._missing, self._strict = frozenset(map(plain, missing)), strict
        self._tree = Tree(source)
        self._source = source
        self._notes: list[str] = []
        self._used_lists: frozenset[str] = frozenset()
        self._base = _base(self._tree)
        self._images = self._find_images()
        self._splits, folders = self._layout()
        self._enter_others()
        self._classes, self._labels = self._classes_of(folders)
        self._check_known_classes()

    @property
    def name(self) -> str:
        return self._source.resolve().stem

    def tasks(self) -> Mapping[str, TaskSource]:
        tasks = {name: TaskSource(Classification.name, classes) for name, classes in self._classes.items()}
        for name in self._masks:
            tasks[name] = TaskSource(Segmentation.name, (BACKGROUND, name))
        return tasks

    @property
    def stratify(self) -> str:
        return list(self._classes)[-1]  # the finest

    def records(self) -> Iterator[Record]:
        for number, path in enumerate(self._images):
            source = self._tree.source(self._base + path)
            self.account.became("files", self._base + path, IMAGE)
            labels = {task: column[number] for task, column in self._labels.items() if column[number] >= 0}
            made = {name: MadeMask(source, how) for name, how in self._masks.items()}
            yield Record("", source, labels, made, self._splits[number], path=path)

    def notes(self) -> Iterator[str]:
        yield from self._notes
        for name, how in self._masks.items():
            yield f"masks of {name} were made from the pictures by {how}"

    def _find_images(self) -> list[str]:
        tree = self._tree
        tree.enter(self.account)
        images = []
        for path in tree.files:
            if path.startswith(self._base) and extension_of(path) in IMAGE_EXTENSIONS:
                images.append(path.removeprefix(self._base))
        return images

    def _enter_others(self) -> None:
        """Account for the files that are neither images nor lists of splits."""
        images = {self._base + path for path in self._images}
        others = [path for path in self._tree.files if path not in images and path not in self._used_lists]
        for path in others:
            self.account.became("files", path, NO_IMAGE)
        if others:
            self._notes.append(f"files that are no images by name, left out: {len(others)}")

    def _layout(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """The word of each image's split, "" where there is none, and its class folders from the outside."""
        tree, base = self._tree, self._base
        folders = [path.removeprefix(base) for path in tree.directories if path.startswith(base)]
        above = self._has_splits_above = _has_splits_above(folders)
        if above:
            self._check_splits(folders)
        depth = 1 if above else 0
        for path in self._images:
            if path.count("/") <= depth:
                raise UserError(
                    f"{self._source}/{base}{path}: expected images inside class folders, found one beside "
                    "them. Move it away, or into a folder of its class (a folder NA has no label)."
                )
        if not above and any(map(is_split_word, (top := {path.split("/")[0] for path in self._images}))):
            named = sorted(filter(is_split_word, top))
            self._notes.append(f"taken for classes, since no folder is called train: {', '.join(named)}")
        self._check_filled([path for path in folders if path.count("/") == depth])
        parts = [path.split("/")[:-1] for path in self._images]
        if above:
            return [part[0] for part in parts], [tuple(part[1:]) for part in parts]
        below = bool(parts) and all(len(part) > 1 and is_split_word(part[-1]) for part in parts)
        if below and len({part[-1] for part in parts}) > 1:
            self._notes.append("splits taken from the folders below the classes")
            return [part[-1] for part in parts], [tuple(part[:-1]) for part in parts]
        lists = SplitLists(tree, [path for path in tree.files if is_list_of_a_split(path)])
        splits = splits_in_lists(lists, self._images, self._notes)
        if any(splits):
            self._used_lists = frozenset(lists.files)
            for path in lists.files:
                self.account.became("files", path, TABLE)
        return splits, [tuple(part) for part in parts]

    def _classes_of(
        self, folders: Sequence[tuple[str, ...]]
    ) -> tuple[dict[str, tuple[str, ...]], dict[str, list[int]]]:
        """The classes and the labels of each level that is a task."""
        levels = self._levels
        open_end = levels[-1] == SKIP
        for path, inside in zip(self._images, folders, strict=True):
            advice = ",".join([*levels, *["TASK"] * (len(inside) - len(levels))])
            if len(inside) != len(levels) and not (open_end and len(inside) >= len(levels) - 1):
                raise UserError(
                    f"{self._source}/{self._base}{path}: expected {len(levels)} folder(s) of classes "
                    f"above an image, found {len(inside)} ({'/'.join(inside)}). Name a task for each "
                    f"level, or - for one that is none: --levels {advice}.{_unknown_splits(folders)}"
                )
        classes: dict[str, tuple[str, ...]] = {}
        labels: dict[str, list[int]] = {}
        for depth, task in enumerate(levels):
            if task == SKIP:
                continue
            named = [at for at, level in enumerate(levels[: depth + 1]) if level != SKIP]
            paths = [tuple(plain(inside[at]) for at in named) for inside in folders]
            parents: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
            for names_above in paths:
                parents[names_above[-1]].add(names_above[:-1])
            texts = [each[-1] if len(parents[each[-1]]) == 1 else "/".join(each) for each in paths]
            is_labelled = [each[-1] not in self._missing | {""} for each in paths]
            unlabelled = Counter(
                each[-1] for each, labelled in zip(paths, is_labelled, strict=True) if not labelled
            )
            if unlabelled:
                words = ", ".join(f"{word!r} ({number:,})" for word, number in sorted(unlabelled.items()))
                self._notes.append(f"{task}: read as no label: {words}")
            if shared := sorted(name for name, where in parents.items() if len(where) > 1):
                self._notes.append(
                    f"{task}: one name in several folders, distinguished by them: {listed(shared)}"
                )
            written = self._written(depth)
            terms = Counter(
                f"{text.rpartition('/')[0]}/{name}" if "/" in text else name
                for text, name, labelled in zip(texts, written, is_labelled, strict=True)
                if labelled
            )
            vocab = vocabulary(Declared(), terms)
            if len(vocab.names) < 2:
                raise UserError(
                    f"{self._source}: expected one folder per class, found {len(vocab.names) or 'none'} with "
                    "images."
                )
            if self._strict and (alike := vocab.merged(terms)):
                raise UserError(
                    f"{self._source}: expected one folder for each class, found "
                    f"{' and '.join(map(ascii, alike))}. Merge them, or leave out --strict."
                )
            self._notes += [f"{task}: {said}" for said in vocab.spellings(terms)]
            classes[task] = vocab.names
            labels[task] = [
                vocab.index(text) if labelled else -1
                for text, labelled in zip(texts, is_labelled, strict=True)
            ]
        return classes, labels

    def _written(self, depth: int) -> list[str]:
        """The folder of each image at a depth, as it is written where it lies."""
        above = self._base.count("/") + int(self._has_splits_above) + depth
        return [self._tree.written(self._base + path).split("/")[above] for path in self._images]

    def _check_splits(self, folders: Sequence[str]) -> None:
        top = [path for path in folders if "/" not in path]
        others = [path for path in top if not is_split_word(path)]
        if others:
            raise UserError(
                f"{self._tree}: expected train, val and test side by side, found {others[0]!r} with them. "
                "Move it away, or keep class folders only."
            )
        if "train" not in split_names(top).values():
            raise UserError(f"{self._tree}: expected a train folder, found only {', '.join(top)}.")

    def _check_filled(self, folders: Sequence[str]) -> None:
        depth = folders[0].count("/") + 1 if folders else 0
        filled = {normalize("NFC", "/".join(path.split("/")[:depth])) for path in self._images}
        for folder in folders:
            if normalize("NFC", folder) not in filled:
                raise UserError(
                    f"{self._tree}/{self._base}{folder}: expected images of a class, found none. Fill or "
                    "remove the folder."
                )

    def _check_known_classes(self) -> None:
        """Refuse a class outside train that train lacks."""
        if not any(self._splits):
            return
        names = split_names(self._splits)
        splits = [names[word] for word in self._splits]
        for task, labels in self._labels.items():
            trained = {label for label, split in zip(labels, splits, strict=True) if split == "train"}
            for label, split in zip(labels, splits, strict=True):
                if label >= 0 and label not in trained:
                    name = self._classes[task][label]
                    near = nearest(name, [self._classes[task][known] for known in sorted(trained)])
                    raise UserError(
                        f"{self._source}: expected the classes of train in every split, found {name!r} in "
                        f"{split}.{f' Did you mean {near!r}?' if near else ''} Add training images of it, or "
                        "remove the folder."
                    )


def _has_splits_above(folders: Sequence[str]) -> bool:
    """Whether the outermost folders are splits: one is called train, or all are words for splits.

    A class `test` beside a class `control` is a class.
    """
    top = [path for path in folders if "/" not in path]
    usual = any(is_bare_split_word(path) and split_name(path) == "train" for path in top)
    return usual or (len(top) > 1 and all(is_split_word(path) for path in top)) or _is_lone_split(top)


def _unknown_splits(folders: Sequence[tuple[str, ...]]) -> str:
    """How to say that the outermost folders are splits, where each holds the same classes."""
    inside: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for names in folders:
        inside[names[0]].add(names[1:])
    if len(inside) < 2 or len({frozenset(classes) for classes in inside.values()}) > 1:
        return ""
    group = "{group}" + "/*" * max(map(len, folders))
    return (
        f" If {', '.join(sorted(inside)[:5])} are splits, name them: --levels -,TASK --group '{group}' "
        "--split 'train=...;test=...'."
    )


def _is_lone_split(top: Sequence[str]) -> bool:
    """Whether everything is in one folder called as a split and nothing more: `train`, not `train_images`."""
    return len(top) == 1 and is_bare_split_word(top[0])


def _base(tree: Tree) -> str:
    """The folder that everything is in, as archives often have one, with a slash at its end; or nothing."""
    base = ""
    while True:
        below = [path.removeprefix(base) for path in tree.directories if path.startswith(base)]
        top = [path for path in below if "/" not in path]
        has_files = any("/" not in path.removeprefix(base) for path in tree.files if path.startswith(base))
        if len(top) != 1 or len(below) == 1 or has_files or _is_lone_split(top):
            return base
        base = f"{base}{PurePosixPath(top[0])}/"
