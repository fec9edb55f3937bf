"""Which of the columns that come with samples says their splits.

cohort     train, test, train       words for splits, whatever the column is called
is_train   1, 0, 1                  truths: what is not for training is test
fold       0, 1, 2, 3, 4            folds: which are held out is for the user to say
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mtl_dist.errors import UserError
from mtl_dist.importers.splitting import SPLIT_WORDS, is_split_word, split_name
from mtl_dist.kinds.vocabulary import Cell

SPLIT = "split"
_USUAL = (SPLIT, "set", "subset", "partition", "phase")
_TRUTHS = {**dict.fromkeys(("1", "1.0", "true", "t", "yes", "y"), True)}
_TRUTHS |= dict.fromkeys(("0", "0.0", "false", "f", "no", "n"), False)
_TRUTH_NAME = re.compile(
    rf"(?:(?:is|in|for|use)_?(?P<word>{'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})"
    r"(?:_?(?:set|image|data|flag))?|(?P<alone>train|training))",
    re.IGNORECASE,
)
_FOLD_NAME = re.compile(r"(?:k_?|cv_?)?folds?(?:_?(?:id|no|number|index))?|cv", re.IGNORECASE)
_FEWEST_FOLDS, _MOST_FOLDS = 2, 20


def split_column(columns: Mapping[str, Sequence[Cell]]) -> str:
    """The column that says the split of each row; nothing where none does.

    It is `split` whatever it holds, else one whose cells are words for splits, or truths as of `is_train`.

    Raises:
        UserError: several columns say different splits.
    """
    if SPLIT in columns:
        return SPLIT
    named = [name for name in _USUAL if name in columns and _are_words(columns[name])]
    named += [name for name, cells in columns.items() if name not in named and _says_splits(name, cells)]
    if not named:
        return ""
    first = named[0]
    if first in _USUAL:
        return first
    meant = [split_name(str(word)) for word in split_words(first, columns[first])]
    for other in named[1:]:
        if [split_name(str(word)) for word in split_words(other, columns[other])] != meant:
            raise UserError(
                f"splits: expected one column of them, found {first} and {other}, which differ. Name one: "
                f"--split {first}"
            )
    return first


def split_words(name: str, cells: Sequence[Cell]) -> list[Cell]:
    """The cells of a column of splits as words: truths are those that its name says."""
    match = _TRUTH_NAME.fullmatch(name)
    if match is None or not _are_truths(cells):
        return list(cells)
    word = match["word"] or match["alone"]
    others = "test" if split_name(word) == "train" else "train"
    return [word.lower() if _TRUTHS[str(cell).strip().lower()] else others for cell in cells]


def check_folds(columns: Mapping[str, Sequence[Cell]]) -> None:
    """Refuse a column that seems to say what is held out, without the splits.

    Raises:
        UserError: a column of folds, or one as `is_valid`, which may mean that its rows are sound.
    """
    for name, cells in columns.items():
        values = sorted({str(cell).strip() for cell in cells})
        match = _TRUTH_NAME.fullmatch(name)
        if match and (match["word"] or "").lower() == "valid" and _are_truths(cells) and len(values) > 1:
            raise UserError(
                f"column {name}: expected to know whether it says which samples are val. If so: --split "
                f"{name}; if not, say how to split: --split 0.8,0.1,0.1"
            )
        few = _FEWEST_FOLDS <= len(values) <= _MOST_FOLDS and "" not in values
        if few and _FOLD_NAME.fullmatch(name) and all(re.fullmatch(r"\D{0,6}\d+(\.0)?", v) for v in values):
            raise UserError(
                f"column {name}: expected to know which folds are held out, found {', '.join(values)}. Say "
                f"it: --group {name} --split 'val={values[-2]};test={values[-1]}'; or split without regard "
                "to them: --split 0.8,0.1,0.1"
            )


def _says_splits(name: str, cells: Sequence[Cell]) -> bool:
    """Whether the cells are words for train and others, or truths of one of them."""
    if _are_words(cells):
        return "train" in {split_name(str(cell)) for cell in cells}
    match = _TRUTH_NAME.fullmatch(name)
    word = (match["word"] or match["alone"]).lower() if match else ""
    return bool(word) and word != "valid" and _are_truths(cells) and len(set(map(str, cells))) > 1


def _are_words(cells: Sequence[Cell]) -> bool:
    return (
        all(isinstance(cell, str) and is_split_word(cell) for cell in cells) and len(set(map(str, cells))) > 1
    )


def _are_truths(cells: Sequence[Cell]) -> bool:
    return all(isinstance(cell, str) and cell.strip().lower() in _TRUTHS for cell in cells)
