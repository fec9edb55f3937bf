"""Names, splits and order of samples: pure functions of names and a seed.

Everything is decided by the hash of a sample's key, so a file that is added later moves no other one.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from mtl_dist.data.shards import MAX_KEY_LENGTH
from mtl_dist.errors import UserError

SPLIT_NAMES = ("train", "val", "test")
_ALIASES = {
    **dict.fromkeys(("train", "training", "fit"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "development"), "val"),
    **dict.fromkeys(("test", "testing", "privatetest"), "test"),
    **dict.fromkeys(("eval", "evaluation", "publictest"), "val"),
    **dict.fromkeys(("hold", "holdout", "hold_out", "hold-out", "heldout", "held_out", "held-out"), "test"),
}
SPLIT_WORDS = tuple(_ALIASES)
"""The words by which splits are usually called."""
_EITHER = frozenset(("eval", "evaluation", "hold", "holdout", "hold_out", "heldout", "held_out", "dev"))
"""What is called so is val in some places and test in others: it gives way where its usual name is taken."""
_DEVELOPED = frozenset(("dev", "development"))
"""What is called so is train where nothing else is."""
_OTHER_WORDS = "images?|imgs?|data|dataset|set|split|labels?|list"
_DECORATED = re.compile(
    rf"(?:(?:{_OTHER_WORDS})[_. -]?)?(?P<word>{'|'.join(sorted(_ALIASES, key=len, reverse=True))})"
    rf"(?:[_. -]?(?:{_OTHER_WORDS}|(?:19|20)\d\d))*"
)


def is_split_word(text: str) -> bool:
    """Whether a word is one by which splits are usually called: `train`, `train2017`, `test_images`."""
    return bool(_DECORATED.fullmatch(text.strip().lower()))


def is_bare_split_word(text: str) -> bool:
    """Whether a word is one by which splits are called and nothing more."""
    return text.strip().lower() in _ALIASES


def _bare(text: str) -> str:
    """The word for a split without what stands around it: `train` of `Train_images`."""
    name = text.strip().lower()
    match = _DECORATED.fullmatch(name)
    return match["word"] if match else name


def split_name(text: str) -> str:
    """The split's usual name: `valid` and `Validation` are `val`."""
    name = _bare(text)
    return _ALIASES.get(name, name)


def split_names(words: Iterable[str]) -> dict[str, str]:
    """The split that each word of a dataset means; `eval` beside `val` is `test`.

    Raises:
        UserError: two words mean the same split.
    """
    unique = sorted(set(words))
    names = {word: split_name(word) for word in unique if _bare(word) not in _EITHER}
    developed = [word for word in unique if _bare(word) in _DEVELOPED]
    if len(developed) == 1 and len(unique) > 1 and "train" not in names.values():
        names[developed[0]] = "train"
    for word in unique:
        if word not in names:
            usual = split_name(word)
            other = "test" if usual == "val" else "val"
            names[word] = other if usual in names.values() and other not in names.values() else usual
    meanings: dict[str, str] = {}
    for word in unique:
        before = meanings.setdefault(names[word], word)
        if before != word and before.strip().lower() != word.strip().lower():
            raise UserError(
                f"splits: expected one name for {names[word]}, found {before} and {word}. Merge the two."
            )
    return names


def split_folder(path: str) -> str:
    """The word for a split in whose folder a file is, or nothing."""
    return next((part for part in reversed(PurePosixPath(path).parts[:-1]) if is_split_word(part)), "")


def splits_of_folders(paths: Iterable[str]) -> list[str]:
    """The word for the split of each file by its folders; nothing for all where they say none.

    One folder of everything says little if it is called `train_images`; if `train`, it is a split.
    Where some files lie in folders of splits and others beside them, those have none, which the road refuses.
    """
    words = [split_folder(path) for path in paths]
    meanings = set(map(split_name, filter(None, words)))
    several = len(meanings) > 1 and "train" in meanings
    are_splits = several or (all(words) and (len(meanings) > 1 or all(map(is_bare_split_word, words))))
    return words if are_splits else [""] * len(words)


def unique_keys(paths: Sequence[str]) -> list[str]:
    """A sample key for each path: its stem where all stems differ, else its whole path.

    Keys hold only ASCII letters, digits, `_` and `-` (WebDataset splits names at dots and slashes). Where
    that makes two alike, or a name is too long, the hash of the path is appended; of two that are the same
    the second counts as `PATH#2`.
    """
    stems = [_sanitised(PurePosixPath(path).stem) for path in paths]
    bases = stems if len(set(stems)) == len(stems) else [_sanitised(_without_suffix(path)) for path in paths]
    keys, taken, seen = [], set(), Counter[str]()
    for base, path in zip(bases, paths, strict=True):
        key = base
        seen[path] += 1
        if len(key) > MAX_KEY_LENGTH or key in taken:
            place = path if seen[path] == 1 else f"{path}#{seen[path]}"
            key = f"{base[: MAX_KEY_LENGTH - 9]}-{key_hash(place).hex()[:8]}"
        taken.add(key)
        keys.append(key)
    return keys


def shuffled(keys: Sequence[str], seed: int) -> list[int]:
    """The positions of `keys` in an order that depends on each key and the seed alone.

    Samples are stored in this order: a folder's files come sorted by class, and a training run that
    shuffles within a window of shards would see few classes at a time.
    """
    return sorted(range(len(keys)), key=lambda i: (key_hash(f"{seed}/order/{keys[i]}"), keys[i]))


def check_fractions(fractions: Sequence[float]) -> None:
    """Refuse fractions that are not 2 or 3 positive numbers with the sum 1.

    Raises:
        UserError: they are not.
    """
    if (
        len(fractions) not in (2, 3)
        or min(fractions) <= 0
        or not math.isclose(sum(fractions), 1, abs_tol=1e-6)
    ):
        raise UserError(
            "split: expected fractions for train,val or train,val,test, each above 0 and with the sum 1, "
            f"found {','.join(f'{fraction:g}' for fraction in fractions)}. Example: 0.8,0.1,0.1"
        )


def split_by_fractions(
    keys: Sequence[str], strata: Sequence[Hashable], fractions: Sequence[float], seed: int
) -> list[str]:
    """The split of each key; every stratum (class) is divided by the same fractions.

    A stratum has at least one sample in train. Where all are so small that a split would have no sample, they
    are rounded by turns, so that each split has its share of all; val comes before test.
    """
    check_fractions(fractions)
    members: dict[Hashable, list[int]] = defaultdict(list)
    for position, stratum in enumerate(strata):
        members[stratum].append(position)
    for positions in members.values():
        positions.sort(key=lambda i: (key_hash(f"{seed}/split/{keys[i]}"), keys[i]))
    splits = _divided(members, fractions, len(keys), [round] * len(members))
    if len(set(splits)) < len(fractions):
        turns = [_rounding((n + 0.5) / len(members)) for n in range(len(members))]
        splits = _divided(members, fractions, len(keys), turns)
    if "val" not in splits:
        splits = ["val" if split == "test" else split for split in splits]
    return splits


def _divided(
    members: Mapping[Hashable, Sequence[int]],
    fractions: Sequence[float],
    num_keys: int,
    roundings: Sequence[Callable[[float], int]],
) -> list[str]:
    """The split of each position, with a way of rounding for each stratum."""
    splits = [SPLIT_NAMES[0]] * num_keys
    for positions, rounded in zip(members.values(), roundings, strict=True):
        start = max(1, rounded(fractions[0] * len(positions)))
        for name, upto in zip(SPLIT_NAMES[1:], _cumulative(fractions)[1:], strict=False):
            end = max(start, rounded(upto * len(positions)))
            for position in positions[start:end]:
                splits[position] = name
            start = end
    return splits


def _rounding(offset: float) -> Callable[[float], int]:
    return lambda value: math.floor(value + offset)


def held_out_note(share: float, by: str, seed: int, splits: Iterable[str]) -> str:
    """What was held out as val, or that nothing could be."""
    if "val" in splits:
        return f"{share:g} of train held out as val, by {by}, with seed {seed}"
    return f"nothing of train held out as val: too few samples of each {by} for {share:g} of them"


def _cumulative(fractions: Sequence[float]) -> list[float]:
    return [sum(fractions[: count + 1]) for count in range(len(fractions))]


def key_hash(text: str) -> bytes:
    """By which names are put into an order that nobody chose."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _sanitised(name: str) -> str:
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii")
    return re.sub(r"[^A-Za-z0-9-]+", "_", ascii_name).strip("_") or "sample"


def _without_suffix(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))
