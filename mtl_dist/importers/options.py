"""What every importer shares: how samples are split, how many may be left out, how shards are written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mtl_dist.data.shards import DEFAULT_SHARD_BYTES, DEFAULT_SHARD_SAMPLES
from mtl_dist.errors import UserError
from mtl_dist.importers.conversion import Conversion


@dataclass(frozen=True)
class Help:
    """What the command line says of a setting, in `Annotated`: `Annotated[str, Help("The name.", "NAME")]`.

    `option` is what it is called there, where that is not the setting's name.
    """

    text: str
    metavar: str = ""
    option: str = ""


Split = str | Sequence[float] | Mapping[str, str] | None

LISTS = (".txt", ".csv", ".tsv")
"""What a file ends with that says the split of each group."""
SPLIT_COLUMN = "split"


@dataclass(frozen=True)
class PackOptions:
    """How to split and to pack, the same for every importer."""

    split: Annotated[
        Split,
        Help(
            "Fractions such as 0.8,0.1,0.1; a column; groups by split as 'val=sw;test=ne', or a file of them "
            "(.txt, .csv, .tsv), GROUP and SPLIT a line. Without it the data's own splits, else fractions.",
            "WHAT",
        ),
    ] = None
    val: Annotated[
        float | None, Help("The share of train to validate on, where the data has no val.", "SHARE")
    ] = None
    group: Annotated[
        str,
        Help(
            "What is never divided between splits: a column, or a pattern of names as '{group}_*'.",
            "COLUMN|PATTERN",
        ),
    ] = ""
    stratify: Annotated[
        str, Help("The task whose classes new splits share alike; without it the first.", "TASK")
    ] = ""
    seed: Annotated[int, Help("Decides new splits and the stored order.", "N")] = 0
    workers: Annotated[int | None, Help("Processes; without it as many as the data is worth.", "N")] = None
    max_skipped: Annotated[
        int, Help("Unreadable images that may be left out; with 0 the first one stops it.", "N")
    ] = 0
    verify: Annotated[bool, Help("Decode every image once; without it only headers are read.")] = True
    bits: Annotated[
        int | None, Help("The bits, 8 or 16, that every value is converted to (16 = 257 times 8).", "8|16")
    ] = None
    channels: Annotated[
        tuple[int, ...], Help("The channels, from 0, that are taken; without it all.", "N,...")
    ] = ()
    masks_as: Annotated[
        str,
        Help(
            "Whether masks of images turned by EXIF were drawn on the picture as displayed or as stored.",
            "displayed|stored",
        ),
    ] = ""
    shard_samples: Annotated[int, Help("A shard is closed at this many samples.", "N")] = (
        DEFAULT_SHARD_SAMPLES
    )
    shard_bytes: Annotated[int, Help("A shard is closed once it holds this many bytes.", "N")] = (
        DEFAULT_SHARD_BYTES
    )

    def __post_init__(self) -> None:
        if self.masks_as not in ("", "displayed", "stored"):
            raise UserError(f"--masks-as: expected displayed or stored, found {self.masks_as!r}.")

    @property
    def conversion(self) -> Conversion:
        """What becomes of every image.

        Raises:
            UserError: no such number of bits, or channel.
        """
        return Conversion(self.bits, tuple(self.channels))


STANDARD = PackOptions()


def fractions_in(split: Split) -> tuple[float, ...] | None:
    """The fractions that `split` states; None where it is something else."""
    if isinstance(split, str):
        try:
            return tuple(float(part) for part in split.split(","))
        except ValueError:
            return None
    return None if split is None or isinstance(split, Mapping) else tuple(split)


def names_groups(split: str) -> bool:
    """Whether a text says the split of each group, itself or in a list."""
    return "=" in split or split.lower().endswith(LISTS)


def groups_by_split(split: Split) -> dict[str, str] | None:
    """The split of each group that `val=sw,nw;test=ne` or a list names; None where it is something else.

    Raises:
        UserError: a group in two splits, a split without one, or a list that cannot be read.
    """
    if isinstance(split, Mapping):
        return dict(split)
    if isinstance(split, str) and split.lower().endswith(LISTS):
        return _groups_in(Path(split))
    if not isinstance(split, str) or "=" not in split:
        return None
    found: dict[str, str] = {}
    for part in split.split(";"):
        name, _, groups = part.partition("=")
        for group in groups.split(","):
            if not name.strip() or not group.strip():
                raise UserError(f'--split: expected SPLIT=GROUP,... with ; between splits, found "{split}".')
            if found.setdefault(group.strip(), name.strip()) != name.strip():
                raise UserError(f"--split: expected each group in one split, found {group.strip()} in two.")
    return found


def _groups_in(path: Path) -> dict[str, str]:
    """The split of each group in a list: a line has a group and its split, the first line may name them."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text in UTF-8"
        raise UserError(
            f"--split: expected a list of groups and their splits in {path}, found: {reason}."
        ) from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        parts = [part.strip().strip('"') for part in re.split(r"[,;\t]", line) if part.strip()]
        parts = line.split() if len(parts) == 1 else parts
        if not parts or parts[0].startswith("#") or (number == 1 and parts[1:2] == [SPLIT_COLUMN]):
            continue
        if len(parts) != 2:
            raise UserError(f"{path}:{number}: expected a group and its split, found {line.strip()!r}.")
        if found.setdefault(parts[0], parts[1]) != parts[1]:
            raise UserError(f"{path}:{number}: expected each group in one split, found {parts[0]} in two.")
    if not found:
        raise UserError(f"--split: expected groups and their splits in {path}, found none.")
    return found
