"""The one road from an importer to a dataset: read, split, pack.

    settings -> importer -> stream of records -> (spool) -> splits -> shards, index, manifest with its account

What stays in memory per sample is its labels and where its image lies.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

from pydantic import ValidationError

from mtl_dist.config.errors import explain
from mtl_dist.config.nearest import nearest
from mtl_dist.config.settings import Settings
from mtl_dist.config.user_defined import PartError, UserDefined, UserDefinedSettings
from mtl_dist.data.manifest import Manifest
from mtl_dist.data.shards import MAX_KEY_LENGTH
from mtl_dist.errors import UserError
from mtl_dist.importers.groups import check_whole, groups_of, split_groups, unnoticed_groups
from mtl_dist.importers.importer import Importer, LeftOut
from mtl_dist.importers.jobs import Record, TaskSource, check_skipped
from mtl_dist.importers.options import STANDARD, PackOptions, fractions_in, groups_by_split
from mtl_dist.importers.packing import SPOOL, Progress, pack_into, partial_directory, refuse_existing, silent
from mtl_dist.importers.registry import IMPORTERS
from mtl_dist.importers.split_columns import check_folds, split_column, split_words
from mtl_dist.importers.splitting import (
    SPLIT_WORDS,
    held_out_note,
    is_split_word,
    split_by_fractions,
    split_name,
    split_names,
    unique_keys,
)
from mtl_dist.importers.spool import Spool
from mtl_dist.importers.summary import listed
from mtl_dist.kinds.registry import KINDS, kind_of

LABELS = "labels"
"""The setting of an importer that takes tasks of any kind, where it is a dict as `wanted.Labels` is."""

_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_LENGTH}}}")
_REPORT_EVERY = 100


class ImporterSettings(UserDefinedSettings):
    """The settings of an importer: the arguments of its constructor."""

    part_base = "mtl_dist.importers.importer.Importer"


PARTS = UserDefined((ImporterSettings,), only=True)


class _Request(Settings):
    importer: Annotated[ImporterSettings, PARTS]


def path_of(importer: str | type[Importer]) -> str:
    """The import path of an importer, given as a built-in one's name, an import path, or a class."""
    if not isinstance(importer, str):
        return f"{importer.__module__}.{importer.__qualname__}"
    return IMPORTERS[importer].path if importer in IMPORTERS else importer


def importer_class(importer: str | type[Importer]) -> type[Importer]:
    """The class of an importer.

    Raises:
        UserError: there is none.
    """
    try:
        settings = PARTS.settings_class(path_of(importer))
    except PartError as error:
        raise UserError(f"importer: {error}") from None
    assert issubclass(settings, ImporterSettings)
    found: type[Importer] = settings.part_class
    return found


def takes_labels(importer: type[Importer]) -> bool:
    """Whether an importer has a setting for tasks of any kind; what is called so and no dict is its own."""
    return get_origin(get_type_hints(importer.__init__).get(LABELS)) is dict


def own_settings(importer: type[Importer]) -> dict[str, inspect.Parameter]:
    """The arguments of an importer's constructor, by name."""
    return dict(list(inspect.signature(importer.__init__).parameters.items())[1:])


def kinds_in_short(importer: type[Importer]) -> list[str]:
    """The kinds whose names stand for labels of them; a setting of the importer's own goes before."""
    own = own_settings(importer)
    return [kind for kind in KINDS if kind not in own] if takes_labels(importer) else []


def make(importer: str | type[Importer], settings: Mapping[str, Any]) -> Importer:
    """The importer with these settings. The name of a kind stands for labels of it: `regression={...}`.

    Raises:
        UserError: no such importer, or settings that do not fit; one line for each.
    """
    kinds = kinds_in_short(importer_class(importer))
    data = {name: value for name, value in settings.items() if name not in kinds}
    for kind in kinds:
        for task, column in (settings.get(kind) or {}).items():
            labels = data.setdefault(LABELS, {})
            if task in labels:
                raise UserError(f"tasks: expected each name once, found {task!r} twice.")
            data[LABELS] = {**labels, task: f"{kind}:{column}"}
    text = json.dumps({"importer": {**data, "kind": path_of(importer)}}, default=str)
    try:
        request = _Request.model_validate_json(text)
    except ValidationError as error:
        raise UserError(
            "\n".join(line.removeprefix("importer.") for _, line in explain(error, _Request))
        ) from None
    made: Importer = request.importer.make()
    return made


def prepare(
    importer: Importer, out: Path, options: PackOptions = STANDARD, progress: Progress = silent
) -> Manifest:
    """Prepare what the importer reads as the dataset `out`.

    Raises:
        UserError: `out` is taken, the data cannot be used or split as asked, or the disk is full.
    """
    if not importer.repacks:
        return importer.index(out, options, progress)
    refuse_existing(out)
    with partial_directory(out) as partial:
        spool = Spool(partial.directory / SPOOL)
        try:
            tasks = importer.tasks()
            records = _read(importer, spool, options, progress)
            records = _with_keys(records)
            names, notes = splits_of(importer, records, tasks, options)
            splits: dict[str, list[Record]] = {}
            for record, name in zip(records, names, strict=True):
                splits.setdefault(name, []).append(record)
            spool.flush()
            if not importer.verify:
                options = replace(options, verify=False)
            name = importer.name or out.resolve().name
            said = [*importer.notes(), *notes]
            return pack_into(partial, splits, tasks, name, said, options, progress, importer.account)
        finally:
            spool.close()


# ---------------------------------------------------------------- reading
def _read(importer: Importer, spool: Spool, options: PackOptions, progress: Progress) -> list[Record]:
    """All records, their bytes put aside."""
    records: list[Record] = []
    left_out: list[str] = []
    for found in importer.records():
        if isinstance(found, LeftOut):
            left_out.append(found.reason)
            check_skipped(left_out, options.max_skipped)
            continue
        records.append(_spooled(found, spool))
        if len(records) % _REPORT_EVERY == 0:
            progress(len(records), 0)
    if not records:
        raise UserError(f"{type(importer).__name__}: expected samples, found none.")
    return records


def _spooled(record: Record, spool: Spool) -> Record:
    image = record.image
    if isinstance(image, bytes):
        image = spool.add(image, record.place)
    masks = record.masks
    if any(isinstance(mask, bytes) for mask in masks.values()):
        masks = {
            task: spool.add(mask, f"{task} of {record.place}") if isinstance(mask, bytes) else mask
            for task, mask in masks.items()
        }
    return (
        record
        if image is record.image and masks is record.masks
        else replace(record, image=image, masks=masks)
    )


def _with_keys(records: Sequence[Record]) -> list[Record]:
    """The records with a key each, made from their paths where they have none.

    Raises:
        UserError: a key that cannot be one, or comes twice.
    """
    unnamed = [record.path for record in records if not record.key]
    made = iter(unique_keys(unnamed))
    keyed = [record if record.key else replace(record, key=next(made)) for record in records]
    taken: set[str] = set()
    for record in keyed:
        if not _KEY.fullmatch(record.key):
            raise UserError(
                f"key {record.key!r}: expected 1 to {MAX_KEY_LENGTH} letters, digits, '_' and '-', found "
                "others. Give the record a `path` instead, from which one is made."
            )
        if record.key in taken:
            raise UserError(f"expected each key once, found {record.key!r} twice.")
        taken.add(record.key)
    return keyed


# ---------------------------------------------------------------- splitting
def splits_of(
    importer: Importer, records: Sequence[Record], tasks: Mapping[str, TaskSource], options: PackOptions
) -> tuple[list[str], list[str]]:
    """The split of each record, and what is to be said of it.

    Raises:
        UserError: splits that the data lacks or has, or groups that they divide.
    """
    by, strata = _strata(importer, records, tasks, options.stratify)
    groups = groups_of(records, options.group)
    division = _Division([record.key for record in records], groups, strata, by, options.seed)
    brought, notes = _brought(importer, records, groups, options)
    if any(brought):
        splits, renamed = _splits_of_the_data(records, brought, options)
        notes += renamed
        check_whole(groups, splits, records)
        share = _share_held_out(importer, splits, options)
        if not share:
            return splits, notes
        splits, note = division.with_val(splits, share)
        notes.append(note)
    else:
        if options.val is not None:
            raise UserError("--val: expected data that has splits, found none. Use --split 0.9,0.1.")
        shares = fractions_in(options.split) or importer.fractions
        splits = division.parts(range(len(records)), shares)
        stated = ", ".join(f"{share:g}" for share in shares)
        notes.append(f"split {_balanced_by(by, division.grouped)} into {stated} with seed {options.seed}")
    if division.grouped:
        notes.append(_group_note(groups, splits))
    else:
        notes.extend(unnoticed_groups(records, strata, importer.ungrouped()))
    return splits, notes


@dataclass(frozen=True)
class _Division:
    """How samples are divided: groups stay whole, and the strata, which are `by` something, balanced."""

    keys: Sequence[str]
    groups: Sequence[str]
    strata: Sequence[Hashable]
    by: str
    seed: int

    @property
    def grouped(self) -> bool:
        return any(self.groups)

    def parts(self, positions: Sequence[int], shares: Sequence[float]) -> list[str]:
        """The split of each of these samples, by the shares of train, val and test."""
        keys, strata = [self.keys[i] for i in positions], [self.strata[i] for i in positions]
        if not self.grouped:
            return split_by_fractions(keys, strata, shares, self.seed)
        return split_groups([self.groups[i] or self.keys[i] for i in positions], strata, shares, self.seed)

    def with_val(self, splits: Sequence[str], share: float) -> tuple[list[str], str]:
        """The splits with so much of train held out as val, and a note of it."""
        train = [i for i, split in enumerate(splits) if split == "train"]
        parts = self.parts(train, (1 - share, share))
        found = list(splits)
        for position, part in zip(train, parts, strict=True):
            found[position] = part
        if self.grouped and "val" not in parts:
            return found, "nothing of train held out as val: train is one group, and groups stay whole"
        how = f"{self.by or 'name'}{', groups whole' if self.grouped else ''}"
        return found, held_out_note(share, how, self.seed, parts)


def _splits_of_the_data(
    records: Sequence[Record], brought: Sequence[str], options: PackOptions
) -> tuple[list[str], list[str]]:
    """The splits by their usual names, from the words that the data has for them, and notes.

    Raises:
        UserError: some samples have none, or `--split` wants new ones.
    """
    lacking = [record.place for record, split in zip(records, brought, strict=True) if not split]
    if lacking:
        raise UserError(
            f"splits: expected one for every sample, since the data has them, found none for "
            f"{len(lacking)} ({listed(lacking)})."
        )
    if fractions_in(options.split) is not None:
        raise UserError(
            f"--split: expected data without splits, found {', '.join(sorted(set(brought)))}. They are "
            "used as they are: drop --split."
        )
    names = split_names(brought)
    renamed = [f"{word} = {name}" for word, name in names.items() if word != name]
    notes = [f"splits by their names: {', '.join(renamed)}"] if renamed else []
    return [names[word] for word in brought], notes


def _share_held_out(importer: Importer, splits: Sequence[str], options: PackOptions) -> float:
    """The share of the data's own train that becomes val; 0 where there is a val, or no train.

    Raises:
        UserError: it is no share, or was asked of data that has a val.
    """
    share = importer.val if options.val is None else options.val
    if not 0 <= share < 1:
        raise UserError(f"--val: expected a share from 0 up to 1, found {share:g}.")
    if "val" in splits and options.val is not None:
        raise UserError("--val: expected data without val, found some. Drop --val.")
    return 0.0 if "val" in splits or "train" not in splits else share


def _balanced_by(by: str, grouped: bool) -> str:
    return f"by {by}{', groups whole' if grouped else ''}" if by else "by group" if grouped else "by name"


def _group_note(groups: Sequence[str], splits: Sequence[str]) -> str:
    sizes = Counter(split for split, _ in set(zip(splits, groups, strict=True)))
    return f"groups: {', '.join(f'{number} in {split}' for split, number in sorted(sizes.items()))}"


def _strata(
    importer: Importer, records: Iterable[Record], tasks: Mapping[str, TaskSource], asked: str
) -> tuple[str, list[Hashable]]:
    """By which tasks' classes new splits are balanced, in words, and what they are for each record.

    It is one task; where none is named, samples without its label are balanced by the next that they have.
    """
    suitable = [name for name, task in tasks.items() if kind_of(task.kind).is_one_class]
    if asked and asked not in suitable:
        raise UserError(
            f"--stratify: expected a task of one class per image ({', '.join(suitable) or 'there is none'}), "
            f"found {asked!r}."
        )
    order = [named] if (named := asked or importer.stratify) else suitable
    if not order:
        return "", ["" for _ in records]
    used, strata = {order[0]: True}, list[Hashable]()
    for record in records:
        task = next((name for name in order if name in record.labels), order[0])
        used[task] = True
        label = str(record.labels.get(task))
        strata.append(label if task == order[0] else (task, label))
    return ", ".join(used), strata


def _brought(
    importer: Importer, records: Sequence[Record], groups: Sequence[str], options: PackOptions
) -> tuple[list[str], list[str]]:
    """The word for each record's split that the data has or `--split` takes from it, else ""; and notes."""
    by_group = groups_by_split(options.split)
    if by_group is not None:
        for group, word in by_group.items():
            if not is_split_word(word):
                near = nearest(word, SPLIT_WORDS)
                raise UserError(
                    f"--split, group {group}: expected train, val or test, found {word!r}. "
                    + (f"Did you mean {near!r}?" if near else "Correct it.")
                )
        known = set(groups)
        if not options.group and not any(known):
            raise UserError(
                f"--split: expected data in groups, since it names {listed(list(by_group))}, found none. Say "
                "what the groups are: add --group COLUMN, or a pattern of names as --group '{group}_*'."
            )
        for group in by_group:
            if group not in known:
                raise UserError(
                    f"--split: expected one of the groups {listed(sorted(known - {''})) or '(there is none)'}"
                    f", found {group!r}."
                )
        unnamed = sorted(known - {""} - set(by_group))
        if unnamed and "train" in map(split_name, by_group.values()):
            raise UserError(
                f"--split: expected a split for every group, since those of train are named, found none for "
                f"{listed(unnamed)}. Name them, or leave train out: it is the rest."
            )
        return [split_word(by_group.get(group, "train"), f"--split, group {group}") for group in groups], []
    if isinstance(options.split, str) and fractions_in(options.split) is None:
        return _in_column(records, options.split), []
    brought = [record.split for record in records]
    if any(brought) or options.split is not None or not records:
        return brought, []
    unused = [name for name in records[0].columns if name not in (importer.ungrouped() | {options.group})]
    columns = {name: [record.columns.get(name, "") for record in records] for name in unused}
    if column := split_column(columns):
        return _in_column(records, column), [f"splits taken from the column {column!r}"]
    check_folds(columns)
    return brought, []


def _in_column(records: Sequence[Record], column: str) -> list[str]:
    """The word for each record's split that a column says."""
    for record in records:
        if column not in record.columns:
            raise UserError(
                f"--split: expected fractions or a column ({', '.join(record.columns) or 'there is none'}), "
                f"found {column!r}."
            )
    words = split_words(column, [record.columns[column] for record in records])
    return [
        split_word(word, f"{record.place}, column {column!r}")
        for word, record in zip(words, records, strict=True)
    ]


def split_word(cell: str | list[str], where: str) -> str:
    """The split that a cell names.

    Raises:
        UserError: it is no word.
    """
    name = split_name(cell) if isinstance(cell, str) else ""
    if name.isdigit():
        raise UserError(
            f"{where}: expected a word for a split (train, val, test), found {cell!r}. Say what each number "
            "is: --group COLUMN --split 'val=1;test=2'"
        )
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise UserError(
            f"{where}: expected a split (train, val, test or another word), found {cell or 'nothing'!r}."
        )
    return cell.strip().lower() if isinstance(cell, str) else ""
