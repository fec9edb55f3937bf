"""One folder per class: `train|val|test/<class>/...`, or `<class>/...` split by fractions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mtl_dist.data.images import IMAGE_EXTENSIONS, extension_of
from mtl_dist.data.manifest import Manifest
from mtl_dist.errors import UserError
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.made_masks import MadeMask, mask_maker
from mtl_dist.importers.packing import STANDARD, PackOptions, Progress, pack, refuse_existing, silent
from mtl_dist.importers.sources import Tree
from mtl_dist.importers.splitting import (
    DEFAULT_FRACTIONS,
    SPLIT_NAMES,
    held_out_note,
    split_by_fractions,
    split_name,
    unique_keys,
)
from mtl_dist.kinds.classification import Classification
from mtl_dist.kinds.segmentation import BACKGROUND, Segmentation
from mtl_dist.kinds.words import class_order


def prepare_folders(
    src: Path,
    out: Path,
    task: str,
    fractions: Sequence[float] | None = None,
    options: PackOptions = STANDARD,
    progress: Progress = silent,
    masks: Mapping[str, str] = {},
    val: float | None = None,
) -> Manifest:
    """Prepare the classification task `task` from a directory or a zip of class folders.

    The classes are the folders' names, sorted (by number where all are numbers). Where `src` holds no
    split folders, every class is divided by `fractions`, 0.8, 0.1, 0.1 if none are given. Files that are no
    images by name are left out and counted. `masks` says for further tasks how their masks are made from the
    pictures (see `made_masks`). `val` is the share of train to hold out where `src` has no val folder.

    Raises:
        UserError: no images, an empty class folder, a class outside train that train lacks, fractions for
            data that is split already; or what `pack` refuses.
    """
    refuse_existing(out)
    if task in masks:
        raise UserError(f"--mask: expected another name than --task {task}, found the same.")
    for how in masks.values():
        mask_maker(how)
    tree = Tree(src)
    base = _base(tree)
    files = [path.removeprefix(base) for path in tree.files if path.startswith(base)]
    folders = [path.removeprefix(base) for path in tree.directories if path.startswith(base)]
    in_splits = any(split_name(path) in SPLIT_NAMES for path in folders)
    depth = 1 if in_splits else 0
    if in_splits:
        _check_splits(tree, folders, fractions)

    images = [path for path in files if extension_of(path) in IMAGE_EXTENSIONS]
    for path in images:
        if path.count("/") <= depth:
            raise UserError(
                f"{src}/{base}{path}: expected images inside class folders, found one beside them."
            )
    _check_class_folders(tree, base, [path for path in folders if path.count("/") == depth], images)
    classes = class_order(path.split("/")[depth] for path in images)
    if len(classes) < 2:
        raise UserError(f"{src}: expected one folder per class, found {len(classes) or 'no'} with images.")

    labels = [classes.index(path.split("/")[depth]) for path in images]
    keys = unique_keys(images)
    notes = []
    if len(files) > len(images):
        notes.append(f"files that are no images by name, left out: {len(files) - len(images)}")
    if in_splits:
        splits = [split_name(path.split("/")[0]) for path in images]
        _check_known_classes(src, classes, labels, splits)
        if val is not None:
            splits = _held_out(src, keys, labels, splits, val, options.seed)
            notes.append(held_out_note(val, "class", options.seed, splits))
    else:
        if val is not None:
            raise UserError(f"{src}: expected --split for folders without splits, found --val. Use that.")
        fractions = fractions or DEFAULT_FRACTIONS
        splits = split_by_fractions(keys, labels, fractions, options.seed)
        shares = ", ".join(f"{fraction:g}" for fraction in fractions)
        notes.append(f"split by class into {shares} with seed {options.seed}")

    records: dict[str, list[Record]] = {split: [] for split in SPLIT_NAMES if split in splits}
    for path, key, label, split in zip(images, keys, labels, splits, strict=True):
        source = tree.source(base + path)
        made = {name: MadeMask(source, how) for name, how in masks.items()}
        records[split].append(Record(key, source, {task: label}, made))
    tasks = {task: TaskSource(Classification.name, tuple(classes))}
    for name, how in masks.items():
        tasks[name] = TaskSource(Segmentation.name, (BACKGROUND, name))
        notes.append(f"masks of {name} were made from the pictures by {how}")
    return pack(records, out, tasks, src.resolve().stem, notes, options, progress)


def _held_out(
    src: Path, keys: Sequence[str], labels: Sequence[int], splits: Sequence[str], val: float, seed: int
) -> list[str]:
    """The splits with a share of each class of train made val."""
    if "val" in splits:
        raise UserError(f"{src}: expected no val folder with --val, found one. Drop --val.")
    if not 0 < val < 1:
        raise UserError(f"--val: expected a share between 0 and 1, found {val:g}.")
    train = [number for number, split in enumerate(splits) if split == "train"]
    parts = split_by_fractions([keys[n] for n in train], [labels[n] for n in train], (1 - val, val), seed)
    result = list(splits)
    for number, part in zip(train, parts, strict=True):
        result[number] = part
    return result


def _base(tree: Tree) -> str:
    """The folder that everything is in, as archives often have one, with a slash at its end; or nothing."""
    base = ""
    while True:
        below = [path.removeprefix(base) for path in tree.directories if path.startswith(base)]
        top = [path for path in below if "/" not in path]
        has_files = any("/" not in path.removeprefix(base) for path in tree.files if path.startswith(base))
        if len(top) != 1 or len(below) == 1 or has_files or split_name(top[0]) in SPLIT_NAMES:
            return base
        base = f"{base}{top[0]}/"


def _check_splits(tree: Tree, folders: Sequence[str], fractions: Sequence[float] | None) -> None:
    top = [path for path in folders if "/" not in path]
    if fractions is not None:
        raise UserError(
            f"{tree}: expected class folders to split, found the splits {', '.join(top)}. Drop --split."
        )
    strangers = [path for path in top if split_name(path) not in SPLIT_NAMES]
    if strangers:
        raise UserError(
            f"{tree}: expected train, val and test side by side, found {strangers[0]!r} with them. "
            "Move it away, or keep class folders only."
        )
    names = [split_name(path) for path in top]
    if len(set(names)) < len(names):
        raise UserError(
            f"{tree}: expected one folder per split, found {', '.join(top)}. Merge the two of one split."
        )
    if "train" not in names:
        raise UserError(f"{tree}: expected a train folder, found only {', '.join(top)}.")


def _check_class_folders(tree: Tree, base: str, folders: Sequence[str], images: Sequence[str]) -> None:
    depth = folders[0].count("/") + 1 if folders else 0
    filled = {"/".join(path.split("/")[:depth]) for path in images}
    for folder in folders:
        if folder not in filled:
            raise UserError(
                f"{tree}/{base}{folder}: expected images of a class, found none. Fill or remove the folder."
            )


def _check_known_classes(
    src: Path, classes: Sequence[str], labels: Sequence[int], splits: Sequence[str]
) -> None:
    trained = {label for label, split in zip(labels, splits, strict=True) if split == "train"}
    for label, split in zip(labels, splits, strict=True):
        if label not in trained:
            raise UserError(
                f"{src}: expected the classes of train in every split, found {classes[label]!r} in {split}. "
                "Add training images of it, or remove the folder."
            )
