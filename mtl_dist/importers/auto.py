"""What data is, by its files: the importer that reads it, why it is taken for that, and what has to be said.

    mtl prepare auto photos/ data/photos
    taken for class folders, because its 744 pictures are in 24 folders: mtl prepare folders

What cannot be known (which column is learnt, how many labels a record has a name for) is asked for, by naming
the options; settings that are given are handed on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

from mtl_dist.data.images import IMAGE_EXTENSIONS, extension_of
from mtl_dist.data.manifest import MANIFEST_NAME
from mtl_dist.errors import UserError
from mtl_dist.importers import cifar, idx
from mtl_dist.importers.finding import FileFinder
from mtl_dist.importers.importer import Importer, LeftOut
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.lists import LISTS, looks_like_a_file
from mtl_dist.importers.options import Help
from mtl_dist.importers.regions import Categories, Masks, read_json
from mtl_dist.importers.road import LABELS, make
from mtl_dist.importers.sources import Tree
from mtl_dist.importers.summary import listed
from mtl_dist.importers.table_files import TABLES, Table, read_table
from mtl_dist.importers.tiff import has_pages
from mtl_dist.importers.wanted import Classes, Labels
from mtl_dist.importers.yolo import label_file, looks_like_labels
from mtl_dist.kinds.registry import KINDS

if TYPE_CHECKING:
    from mtl_dist.data.manifest import Manifest
    from mtl_dist.importers.options import PackOptions
    from mtl_dist.importers.packing import Progress

_TIFF = ("tif",)
_FEW, _FEW_NUMBERS = 50, 10  # different texts, and numbers, in a column of classes
_LOOKED_AT = 3  # files of a sort


@dataclass(frozen=True)
class Guess:
    """An importer by its name, what the data is taken for and why, and the settings that follow from it."""

    importer: str
    what: str
    because: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def said(self) -> str:
        """In one line."""
        return f"taken for {self.what}, because {self.because}: mtl prepare {self.importer}"


class Auto(Importer):
    """Data of a form that is found out: what it is taken for is said with the reason, the unknown asked for.

    \b
      mtl prepare auto photos.zip data/photos
      mtl prepare auto labels.csv data/skin --classification diagnosis=dx

    It knows class folders, tables and lists, IDX files, CIFAR records, TIFF stacks, COCO, VOC, YOLO, LabelMe,
    CVAT, parquet and tars. `mtl prepare NAME` with the name that it says has all the settings.
    """

    def __init__(
        self,
        source: Annotated[Path, Help("A directory, an archive or a file.", "SRC")],
        task: Annotated[str, Help("Of class folders and IDX files: the task's name.", "NAME")] = "",
        levels: Annotated[
            tuple[str, ...], Help("Of folders in folders: the task of each level.", "NAME,...")
        ] = (),
        heads: Annotated[tuple[str, ...], Help("Of CIFAR records: the name of each label.", "NAME,...")] = (),
        image: Annotated[str, Help("Of tables: the column of images, or a pattern.", "COLUMN")] = "",
        root: Annotated[Path | None, Help("Of tables: where the files are.", "DIR")] = None,
        labels: Labels = {},  # noqa: B006 (never changed)
        classes: Classes = {},  # noqa: B006
        categories: Categories = "",
        masks: Masks = "",
    ) -> None:
        given: dict[str, Any] = {
            "task": task,
            "levels": levels,
            "heads": heads,
            "image": image,
            "root": root,
            LABELS: labels,
            "classes": classes,
            "categories": categories,
            "masks": masks,
        }
        given = {name: value for name, value in given.items() if value}
        self.guess = guess(source, given)
        settings = {**self.guess.settings, **given}
        if "levels" in given:
            settings.pop("task", None)
        try:
            self.chosen = make(self.guess.importer, {"source": _of(self.guess.importer, source), **settings})
        except UserError as error:
            raise UserError(f"{source} is {self.guess.said}. {error}") from None
        for name in ("fractions", "val", "verify", "repacks"):
            setattr(self, name, getattr(self.chosen, name))
        self.__dict__["account"] = self.chosen.account

    @property
    def name(self) -> str:
        return self.chosen.name

    @property
    def stratify(self) -> str:
        return self.chosen.stratify

    def tasks(self) -> Mapping[str, TaskSource]:
        return self.chosen.tasks()

    def records(self) -> Iterable[Record | LeftOut]:
        return self.chosen.records()

    def notes(self) -> Iterator[str]:
        yield self.guess.said
        yield from self.chosen.notes()

    def ungrouped(self) -> frozenset[str]:
        return self.chosen.ungrouped()

    def index(self, out: Path, options: PackOptions, progress: Progress) -> Manifest:
        return self.chosen.index(out, options, progress)


def _of(importer: str, source: Path) -> Any:
    return [str(source)] if importer == "tars" else source


def guess(source: Path, given: Mapping[str, Any]) -> Guess:
    """What a source is taken for.

    Raises:
        UserError: it is nothing that is known, or something has to be said first.
    """
    if not source.exists():
        raise UserError(f"{source}: expected data, found nothing there.")
    if (source / MANIFEST_NAME).is_file():
        raise UserError(
            f"{source}: expected data to prepare, found a dataset that is prepared. Train on it, or look at "
            f"it with: mtl inspect {source}"
        )
    suffix = source.suffix.lower()
    if source.is_file() and suffix == ".tar":
        return Guess("tars", "tars of samples", f"{source.name} is one", _asked_of_tars(source, given))
    if source.is_file() and suffix in (".parquet", ".arrow"):
        return _of_parquet(source, [source.name], given)
    if source.is_file() and suffix in (*TABLES, *LISTS) and not _is_coco(Tree(source.parent), [source.name]):
        return _of_table(source, given)
    if source.is_file() and suffix != ".zip":
        raise UserError(
            f"{source}: expected a directory, a zip, a table, a tar or a parquet file, found a file "
            f"{suffix!r}."
        )
    tree = Tree(source)
    names = [PurePosixPath(path).name for path in tree.files]
    pairs = [name for name in names if idx.is_idx(name)]
    if pairs:
        return Guess("idx", "IDX files", f"it holds {listed(pairs)}", {"task": "label"})
    records = [path for path in tree.files if cifar.is_records(path)]
    if records:
        return _of_cifar(source, tree, records, given)
    by_suffix: dict[str, list[str]] = {}
    for path in tree.files:
        by_suffix.setdefault(PurePosixPath(path).suffix.lower(), []).append(path)
    frames = [*by_suffix.get(".parquet", ()), *by_suffix.get(".arrow", ())]
    if frames:
        return _of_parquet(source, frames, given)
    if ".tar" in by_suffix:
        because = f"it holds {listed(by_suffix['.tar'])}"
        return Guess("tars", "tars of samples", because, _asked_of_tars(source, given))
    regions = _of_regions(tree, by_suffix)
    if regions is not None:
        asked = {} if {"categories", "masks"} & set(given) else {"categories": "objects"}
        return Guess(regions.importer, regions.what, regions.because, asked)
    pictures = [path for path in tree.files if extension_of(path) in IMAGE_EXTENSIONS]
    if not pictures:
        packed = by_suffix.get(".zip", ())
        advice = f" Give one archive, such as {source / packed[0]}." if packed and not tree.is_archive else ""
        raise UserError(
            f"{source}: expected pictures, records, tables or tars, found "
            f"{listed(tree.files) or 'none'}.{advice}"
        )
    if all(extension_of(path) in _TIFF for path in pictures):
        paged = [path for path in pictures[:_LOOKED_AT] if has_pages(tree.source(path).read())]
        if paged:
            return _of_stacks(source, paged, by_suffix, given)
    if any(suffix in by_suffix for suffix in (*TABLES, *LISTS)):
        table = _table_in(source, given)
        if table is not None:
            return _of_table(source, given, table)
    folders = {str(PurePosixPath(path).parent) for path in pictures}
    if len(folders) > 1:
        because = f"its {len(pictures):,} pictures are in {len(folders)} folders"
        return Guess("folders", "class folders", because, {} if "levels" in given else {"task": "label"})
    raise UserError(
        f"{source}: expected labels, found {len(pictures):,} pictures in one folder alone. Put them into a "
        "folder for each class, or name a table: mtl prepare table labels.csv OUT."
    )


def _of_cifar(source: Path, tree: Tree, records: Sequence[str], given: Mapping[str, Any]) -> Guess:
    number = cifar.num_labels(tree.source(records[0]))
    if number is None:
        raise UserError(
            f"{source}: taken for CIFAR's records, because it holds {listed(records)}; expected records of "
            "32x32x3 bytes and labels, found files of another size."
        )
    stems = [PurePosixPath(path).name.removesuffix("_label_names.txt") for path in tree.files]
    named = [stem for stem in stems if stem not in map(_name_of, tree.files)]
    usual = [name for name in ("coarse", "fine") if name in named]
    heads = ["label"] if number == 1 else usual if len(usual) == number else []
    because = f"it holds {listed(records)}, whose records have {number} label(s)"
    if not heads and "heads" not in given:
        raise UserError(
            f"{source}: taken for CIFAR's records, because {because}: expected a name for each. Say "
            f"--heads {','.join(f'NAME{n}' for n in range(1, number + 1))}."
        )
    return Guess("cifar", "CIFAR's records", because, {"heads": heads} if heads else {})


def _name_of(path: str) -> str:
    return PurePosixPath(path).name


def _asked_of_tars(source: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    if LABELS not in given:
        raise UserError(
            f"{source}: taken for tars of samples: expected the fields that are tasks. Say which, such as "
            "--classification label=cls or --regression age=json:age."
        )
    return {"image": ()} if "image" not in given else {}


def _of_regions(tree: Tree, by_suffix: Mapping[str, Sequence[str]]) -> Guess | None:
    """What the text, JSON and XML files say, if they are annotations of regions."""
    settings = [*by_suffix.get(".yaml", ()), *by_suffix.get(".yml", ())]
    texts = set(by_suffix.get(".txt", ()))
    pictures = [path for path in tree.files if extension_of(path) in IMAGE_EXTENSIONS]
    labels = [label_file(path) for path in pictures]
    named = [path for path in labels if path in texts]
    if any(looks_like_labels(tree, path) for path in named[:_LOOKED_AT]):
        beside = f" and {settings[0]}" if settings else ""
        return Guess("yolo", "YOLO's text files", f"there are {len(named):,} beside the pictures{beside}")
    for path in by_suffix.get(".xml", ())[:_LOOKED_AT]:
        head = tree.source(path).read()[:4096]
        if b"<annotations" in head:
            return Guess("cvat", "CVAT's XML", f"{path} holds <annotations>")
        if b"<annotation" in head:
            return Guess("voc", "Pascal VOC", f"{path} holds <annotation>")
    found = by_suffix.get(".json", ())
    if _is_coco(tree, found):
        return Guess("coco", "COCO's JSON", f"{found[0]} holds images, annotations and categories")
    for path in found[:_LOOKED_AT]:
        content = read_json(tree.source(path))
        if isinstance(content, dict) and {"shapes", "imagePath"} <= set(content):
            return Guess("labelme", "LabelMe's JSON", f"{path} holds shapes and imagePath")
    return None


def _is_coco(tree: Tree, paths: Sequence[str]) -> bool:
    for path in [path for path in paths if path.lower().endswith(".json")][:_LOOKED_AT]:
        content = read_json(tree.source(path))
        if isinstance(content, dict) and {"images", "annotations", "categories"} <= set(content):
            return True
    return False


def _of_stacks(
    source: Path, pictures: Sequence[str], by_suffix: Mapping[str, Sequence[str]], given: Mapping[str, Any]
) -> Guess:
    because = f"TIFFs of it ({listed(pictures)}) have several pages"
    tables = [path for suffix in TABLES for path in by_suffix.get(suffix, ())]
    raise UserError(
        f"{source}: taken for stacks, because {because}: expected what is learnt from their pages. Say it: "
        f"mtl prepare stacks {source} OUT --stacks 'stack_*.tif'{f' --table {tables[0]}' if tables else ''} "
        "--regression NAME=COLUMN --segmentation NAME='mask_*.tif'."
    )


def _of_parquet(source: Path, files: Sequence[str], given: Mapping[str, Any]) -> Guess:
    if LABELS not in given:
        raise UserError(
            f"{source}: taken for parquet or Arrow files, because it holds {listed(files)}: expected the "
            "columns that are tasks. Say which, such as --classification NAME=label."
        )
    return Guess("parquet", "parquet or Arrow files of images", f"it holds {listed(files)}")


# ---------------------------------------------------------------- tables
def _table_in(source: Path, given: Mapping[str, Any]) -> Table | None:
    """The table in a directory or an archive, if it is one of these images."""
    try:
        table = read_table(source, given.get("root"))
    except UserError:
        return None
    return table if _image_column(table) or "image" in given else None


def _image_column(table: Table) -> str:
    """The column whose first cells name files that are there."""
    finder = FileFinder(table.tree, table.folder)
    for column in table.columns:
        cells = [row.cells[column] for row in table.rows[:_LOOKED_AT]]
        texts = [cell for cell in cells if isinstance(cell, str) and cell]
        if texts and all(finder.holds(cell) for cell in texts):
            return column
    return ""


def _of_table(source: Path, given: Mapping[str, Any], table: Table | None = None) -> Guess:
    table = table or read_table(source, given.get("root"))
    image = str(given.get("image", "")) or _image_column(table)
    if not image:
        raise UserError(
            f"{source}: taken for a table: expected a column of files that are there, found none of "
            f"{', '.join(table.columns)}. Say --image COLUMN or --image '{{COLUMN}}.jpg', and --root DIR."
        )
    because = (
        f"{PurePosixPath(table.files[0]).name} has {len(table.rows):,} rows that name pictures by {image}"
    )
    if LABELS not in given:
        options = [_proposed(table, column) for column in table.columns if column != image]
        folders = [name for name in table.tree.directories if "mask" in name.lower() and "/" not in name]
        options += [f"--segmentation {name}={name}" for name in folders]
        raise UserError(
            f"{source}: taken for a table, because {because}: expected which columns are learnt. Say it, "
            f"such as {' '.join(filter(None, options)) or '--classification NAME=COLUMN'}."
        )
    return Guess("table", "a table", because, {"image": image})


def _proposed(table: Table, column: str) -> str:
    """The option for a column by its cells; nothing where they look like neither classes nor numbers."""
    name = "".join(sign if sign.isalnum() else "_" for sign in column.lower()).strip("_") or "task"
    cells = [cell for row in table.rows if isinstance(cell := row.cells[column], str) and cell]
    of_one_class = next(kind.name for kind in KINDS.values() if kind.is_one_class)
    if not cells or any(map(looks_like_a_file, cells[:_LOOKED_AT])):
        return ""
    different = len(set(cells))
    if different > _FEW_NUMBERS and all(_is_number(cell) for cell in cells):
        number = next(kind.name for kind in KINDS.values() if kind.is_number)
        return f"--{number} {name}={column}"
    if 1 < different <= min(_FEW, max(2, len(cells) // 2)) and column != "split":
        return f"--{of_one_class} {name}={column}"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
