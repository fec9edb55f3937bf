"""Whose code is imported: a run or dataset of somebody else names classes, and importing one runs its code.

    with parts_of(folder, "recipe.yaml"):       what is loaded within was written by whoever made the folder
        load_recipe(folder / "recipe.yaml")

Within, only what is built in is imported, unless the folder is the user's own, or the user trusts it: by
`--trust`, or when asked in a terminal. Own are those that were marked when they were made: the mark is a
keyed hash of the file, and the key is in the user's state folder, so nobody else can make one, and a folder
may be moved or copied.
"""

from __future__ import annotations

import hmac
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from mtl_dist.durable import write_text
from mtl_dist.printable import printable

MARK = ".mark"

BUILT_IN = ("mtl_dist", "torch", "torchvision", "torchmetrics")

VARIABLE = "MTL_TRUST"
"""Set to 1 in the environment it says `--trust` to this process and those that it starts."""

_FOLDERS = "MTL_TRUSTED_FOLDERS"
"""What the user said yes to when asked, for the processes that this one starts."""


@dataclass(frozen=True)
class _Origin:
    folder: Path
    file: str


_origin: ContextVar[_Origin | None] = ContextVar("origin", default=None)
_trusting: ContextVar[bool] = ContextVar("trusting", default=False)
_answers: dict[Path, bool] = {}
"""What the user said of each folder when asked."""


def state_folder() -> Path:
    """Where this user's state lies: `$XDG_STATE_HOME/mtl_dist`, or `~/.local/state/mtl_dist`."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "mtl_dist"


def mark(folder: Path, file: str) -> None:
    """Mark a folder as the user's own, with this file as it is now.

    Where there is no state folder to keep a key in (a home that is read-only), nothing is marked.
    """
    with suppress(OSError, RuntimeError, ValueError):
        write_text(folder / MARK, _mark_of(folder / file, _key(make=True)), sync=False)


def is_own(folder: Path, file: str) -> bool:
    """Whether the file is as it was when this user marked the folder."""
    try:
        stated = (folder / MARK).read_text(encoding="ascii")
        return hmac.compare_digest(stated, _mark_of(folder / file, _key(make=False)))
    except (OSError, RuntimeError, ValueError):
        return False


@contextmanager
def parts_of(folder: Path, file: str) -> Iterator[None]:
    """What is imported within is named by a file of this folder."""
    token = _origin.set(_Origin(folder, file))
    try:
        yield
    finally:
        _origin.reset(token)


@contextmanager
def parts_of_recipe(path: Path) -> Iterator[None]:
    """What is imported within is named by a recipe: by the user, or by who made the run in which it lies."""
    is_of_run = path.name == "recipe.yaml" and os.path.isfile(path.parent / "data.json")
    if not is_of_run or _origin.get() is not None:
        yield
        return
    with parts_of(path.parent, path.name):
        yield


@contextmanager
def trusted(trust: bool = True) -> Iterator[None]:
    """Within, whatever a run or dataset names is imported."""
    token = _trusting.set(trust or _trusting.get())
    try:
        yield
    finally:
        _trusting.reset(token)


def may_unpickle() -> bool:
    """Whether the user has said to trust whatever is opened now."""
    return _trusting.get() or os.environ.get(VARIABLE) == "1"


def refusal(path: str) -> str:
    """Why the import path may not be imported, or the stream be opened, now; nothing if it may."""
    origin = _origin.get()
    if origin is None or may_unpickle():
        return ""
    if path.partition(".")[0] in BUILT_IN or path.rpartition(".")[0] in sys.modules:
        return ""  # nothing new would run
    if is_own(origin.folder, origin.file) or str(origin.folder.resolve()) in _trusted_folders():
        return ""
    if _asked(origin.folder, path):
        return ""
    return (
        f"expected built-in parts alone in {origin.folder}, which you did not make, found {path}. Opening "
        "it runs its code: look at it, then add --trust."
    )


def _asked(folder: Path, path: str) -> bool:
    """What the user says of the folder, if there is a terminal to ask in; asked once."""
    if folder not in _answers:
        if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()) or "RANK" in os.environ:
            return False
        print(
            f"{printable(str(folder))} was not made by you, and names {printable(path)}. Opening it runs "
            "its code. Trust this folder? [y/N] ",
            end="",
            file=sys.stderr,
            flush=True,
        )
        _answers[folder] = sys.stdin.readline().strip().lower() in ("y", "yes")
        if _answers[folder]:
            os.environ[_FOLDERS] = os.pathsep.join([*_trusted_folders(), str(folder.resolve())])
    return _answers[folder]


def _trusted_folders() -> list[str]:
    return [folder for folder in os.environ.get(_FOLDERS, "").split(os.pathsep) if folder]


def _key(*, make: bool) -> bytes:
    path = state_folder() / "key"
    with suppress(FileNotFoundError):
        return path.read_bytes()
    if not make:
        raise FileNotFoundError(path)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Made once, whoever is first: two runs may start together.
    temporary = path.with_name(f".key.{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(32))
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    return path.read_bytes()


def _mark_of(file: Path, key: bytes) -> str:
    return hmac.new(key, file.read_bytes(), "sha256").hexdigest()
