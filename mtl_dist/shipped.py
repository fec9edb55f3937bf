"""What travels in the package beside its code: recipes, launcher presets and cluster profiles.

In a checkout they are the folders configs/, launch/ and slurm/, to which the folders here are links; a wheel
holds their files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mtl_dist.config.errors import suggest
from mtl_dist.errors import UserError

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Shelf:
    """One kind of file: what it is for, and where it is."""

    title: str
    directory: Path

    def files(self) -> dict[str, Path]:
        """The files by their name without `.yaml`."""
        return {path.stem: path for path in sorted(self.directory.glob("*.yaml"))}


SHELVES = (
    Shelf("recipes, for `mtl train`", _HERE / "recipes"),
    Shelf("presets, for `accelerate launch --config_file`", _HERE / "presets"),
    Shelf("cluster profiles, for `mtl submit --cluster`", _HERE / "profiles"),
)


def shipped_files() -> dict[str, Path]:
    """Every file by its name; the names of the shelves differ."""
    return {name: path for shelf in SHELVES for name, path in shelf.files().items()}


def headline(file: Path) -> str:
    """The first sentence of a file's heading."""
    heading = file.read_text(encoding="utf-8").partition("#\n")[0].replace("\n#", "")
    return heading.removeprefix("#").strip().partition(". ")[0].removesuffix(".").partition(": copy it")[0]


def copy_of(name: str, out: Path) -> Path:
    """Copy the file called `name` to `out`, or into it where it is a directory.

    Raises:
        UserError: no such file, or the place is taken.
    """
    files = shipped_files()
    if name not in files and (found := _instead_of_a_dataset(name)):
        raise UserError(f"init: expected a prepared dataset, or a name that mtl init lists, found {found}")
    if name not in files:
        raise UserError(
            f"init: expected a prepared dataset or one of the files below, found {name!r}. "
            f"{suggest(name, files, 'Files')}"
        )
    place = out / f"{name}.yaml" if out.is_dir() else out
    write_new(place, files[name].read_text(encoding="utf-8"))
    return place


def _instead_of_a_dataset(name: str) -> str:
    """What is at a path, and what to do with it; nothing where the name is no path."""
    path = Path(name)
    if path.exists():
        form = "table" if path.suffix.lower() in (".csv", ".tsv") else "auto"
        tasks = " --classification TASK=COLUMN" if form == "table" else ""
        found = f"the folder {name}, which is none" if path.is_dir() else f"the file {name}"
        return f"{found}. Prepare it first: mtl prepare {form} {name} data/NAME{tasks}"
    return f"no folder {name}." if len(path.parts) > 1 else ""


def write_new(place: Path, text: str) -> None:
    """Write a file that does not exist yet.

    Raises:
        UserError: the place is taken, or cannot be written.
    """
    try:
        with open(place, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(
            f"{place}: expected a new file, found one. Name another place as second argument."
        ) from None
    except OSError as error:
        raise UserError(f"{place}: expected a place that can be written, found: {error.strerror}.") from None
