"""External tars, written by others and named in a recipe: one process indexes them once, at first use.

    data:
      train:
        - path: data/web/*.tar
          fields: {breed: {kind: classification, from: cls}, age: {kind: regression, from: json:age}}

The index is a dataset like any other, which names the tars by path. Whoever opens it first makes it, under a
lock for which the other ranks wait, and gives it its name when it is whole. What it was made of is kept with
it: other fields, or other tars in the same place, are refused and not passed over.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mtl_dist.data.external import FieldSettings, Indexing, expanded
from mtl_dist.data.manifest import read_manifest
from mtl_dist.data.remote import Location, Url, beside
from mtl_dist.data.settings import DataSettings, EvaluationSourceSettings, SourceSettings
from mtl_dist.data.streams import REQUEST, first_samples
from mtl_dist.data.task_infos import merge_task_infos, source_facts, training_facts
from mtl_dist.durable import locked, write_text
from mtl_dist.errors import UserError
from mtl_dist.importers.map_style import indexed_dataset
from mtl_dist.importers.options import PackOptions
from mtl_dist.importers.tars import Tars, index

log = logging.getLogger(__name__)

_WILD = "*?["
_HEAD = 1024
"""The samples of a stream that are looked at beforehand."""


def with_indexes(data: DataSettings, root: Path | None = None) -> DataSettings:
    """The same data with a dataset in place of each source that names external tars or a Dataset, made if
    need be.

    Paths are relative to `root`, or to the working directory.

    Raises:
        UserError: an index cannot be made.
    """
    evaluated = [*(data.val or ()), *(data.test or ())]
    if all(source.fields is None and source.dataset is None for source in [*data.train, *evaluated]):
        return data
    root = root or Path.cwd()
    data = data.with_absolute_paths(root)
    train = tuple(_with_index(source, root) for source in data.train)
    like = next(
        ((stated, made) for stated, made in zip(data.train, train, strict=True) if stated.dataset), None
    )
    changes: dict[str, Any] = {"train": train}
    for split in ("val", "test"):
        sources = getattr(data, split)
        if sources is not None:
            changes[split] = tuple(_evaluated(source, split, like, root) for source in sources)
    return data.model_copy(update=changes)


_UNINDEXED: dict[str, Any] = {"dataset": None, "fields": None, "image": None, "index": None}


def _with_index(source: SourceSettings, root: Path) -> SourceSettings:
    if source.fields is None:
        return source
    how = source.indexing or Indexing()
    if source.dataset is not None:
        path = indexed_dataset(
            source.dataset, source.fields, source.image or "", source.index, how, source.split, root
        )
    else:
        head = min(source.epoch_samples or _HEAD, _HEAD) if source.stream else 0
        path = indexed(source.location, source.fields, source.image, source.index, how, head)
    return source.model_copy(update={**_UNINDEXED, "path": path, "indexing": None})


def _evaluated(
    source: EvaluationSourceSettings,
    split: str,
    like: tuple[SourceSettings, SourceSettings] | None,
    root: Path,
) -> EvaluationSourceSettings:
    """A source of val or test with its index; class names are those of the training Dataset `like`."""
    if source.dataset is None:
        return source
    fields, how = source.fields, Indexing()
    if like is not None:
        stated, made = like
        known = read_manifest(made.location).tasks
        fields = fields or stated.fields
        how = (stated.indexing or how).model_copy(update={"val": None})
        fields = {
            name: each.model_copy(update={"classes": known[name].classes or None})
            if each.classes is None and name in known
            else each
            for name, each in (fields or {}).items()
        }
    if not fields:
        raise UserError(
            f"data.{split}: expected the fields of {source.dataset.path}, found none. State them."
        )
    path = indexed_dataset(source.dataset, fields, source.image or "", source.index, how, split, root)
    return source.model_copy(update={**_UNINDEXED, "path": path, "split": split})


def check_present(data: DataSettings, tasks: Collection[str]) -> None:
    """Refuse data that is not there, as far as names and sizes tell; what is at URLs is not asked for.

    Raises:
        UserError: a dataset, split, shard or tar is missing, or a task is in no dataset.
    """
    evaluated: Sequence[EvaluationSourceSettings] = [*(data.val or ()), *(data.test or ())]
    sources: list[SourceSettings | EvaluationSourceSettings] = [*data.train, *evaluated]
    for source in sources:
        if isinstance(source.path, Url) or source.dataset is not None:
            continue
        if isinstance(source, SourceSettings) and source.fields is not None:
            for tar in _tars_of(source.location):
                if "{" not in tar and not Path(tar).exists():
                    raise UserError(f"{tar}: expected a tar, found none. Correct data.train's path.")
            continue
        assert source.split is not None, "settings of a path state it"
        found = source_facts(source.location, source.split)
        for shard in found.info.shards:
            place = beside(source.location, shard.path)
            if isinstance(place, Path) and not place.is_file():
                raise UserError(f"{place}: expected a shard, found none. Copy or prepare the dataset again.")
    if all(source.fields is None and not isinstance(source.path, Url) for source in data.train):
        merge_task_infos(tasks, training_facts(data))


def indexed(
    path: Location,
    fields: Mapping[str, FieldSettings],
    image: str | None,
    place: Path | None,
    indexing: Indexing,
    head: int = 0,
) -> Path:
    """The dataset over the tars that `path` names, which is made if it is not there.

    Args:
        path: a tar, a directory of them, or a name with * or {000..099} in it; for URLs without *.
        image: the image's extension, where there are several.
        place: where the dataset is to be; by default in `.mtl` beside the tars.
        indexing: how samples are split, and what is a label.
        head: of a stream: its first samples, so many, become the dataset.

    Raises:
        UserError: tars or fields that are not there or not understood, an index that was made of other tars,
            or a place that cannot be written.
    """
    tars = _tars_of(path)
    request: dict[str, Any] = {
        "tars": [_described(tar) for tar in tars],
        "image": image,
        "fields": {name: settings.model_dump(mode="json") for name, settings in fields.items()},
        "indexing": indexing.model_dump(mode="json"),
    } | ({"head": head} if head else {})
    place = place if place is not None else _beside(path, request)
    if not _is_made(place, request):
        with _locked(place):
            if not _is_made(place, request):
                _make(place, tars, request, fields, image, indexing, head)
    return place


def _tars_of(path: Location) -> list[str]:
    """The tars, or what `mtl index` takes for them, with every * replaced by what is there."""
    if isinstance(path, Url):
        return [str(path)]
    wild = _first_part_with(_WILD, path)
    if wild is not None:
        found = sorted(Path(*path.parts[:wild]).glob("/".join(path.parts[wild:])))
    elif path.is_dir():
        found = sorted(path.glob("*.tar")) or sorted(path.glob("*/*.tar"))
    else:
        found = [path]
    if not found:
        raise UserError(f"{path}: expected tars, found none. Correct data.train's path.")
    return [str(name) for name in found]


def _described(tar: str) -> str | list[Any]:
    """What distinguishes a local tar from another that takes its place."""
    path = Path(tar)
    return [tar, path.stat().st_size] if path.is_file() else tar


def _beside(path: Location, request: Mapping[str, Any]) -> Path:
    if isinstance(path, Url):
        raise UserError(
            f"{path}: expected `index`, a directory for the index of tars at a URL, found none. "
            "Name one that every process of the run can reach."
        )
    wild = _first_part_with(_WILD + "{", path)
    folder = path if wild is None else Path(*path.parts[:wild])
    folder = folder.parent if folder.is_file() else folder
    made_of = [str(path), *(request[what] for what in ("image", "fields", "indexing"))]
    made_of += [order] if (order := _order(request)) else []
    identity = json.dumps(made_of, sort_keys=True)
    return folder / ".mtl" / f"{folder.name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def _first_part_with(signs: str, path: Path) -> int | None:
    return next((i for i, part in enumerate(path.parts) if set(signs) & set(part)), None)


def _order(request: Mapping[str, Any]) -> dict[str, list[str]]:
    """The values of classes in the order in which they are stated, which is that of the classes' indices."""
    fields = request.get("fields") or {}
    return {name: list(each["classes"]) for name, each in fields.items() if isinstance(each["classes"], dict)}


def _is_made(place: Path, request: Mapping[str, Any]) -> bool:
    """Whether the index is there.

    Raises:
        UserError: it is, but was made of something else.
    """
    if not place.exists():
        return False
    try:
        made_of = json.loads((place / REQUEST).read_text(encoding="utf-8"))
        if not isinstance(made_of, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError):
        raise UserError(
            f"{place}: expected an index that a recipe made, found something else. Name another `index`."
        ) from None
    for what in ("fields", "image", "indexing", "tars", "head"):
        if made_of.get(what) != request.get(what) or _order(made_of) != _order(request):
            raise UserError(
                f"{place}: expected an index of the {what} in the recipe, found one of others. "
                "Remove it to index them again, or name another `index`."
            )
    return True


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    with ExitStack() as held:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(place.with_name(f".{place.name}.lock")))
        except OSError as error:
            raise UserError(
                f"{place}: expected a place for the index that can be written, found: {error.strerror}. "
                "Name another with `index`."
            ) from None
        yield


def _make(
    place: Path,
    tars: Sequence[str],
    request: Mapping[str, Any],
    fields: Mapping[str, FieldSettings],
    image: str | None,
    indexing: Indexing,
    head: int,
) -> None:
    """Write the index under another name, and rename it when it is whole."""
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that died
    if head:
        log.warning("%s: reading the first %s samples of the stream, once", place, f"{head:,}")
        names = [name for tar in tars for name in expanded(tar)]
        tars = [str(_head_of(names, head, partial / place.name))]
    else:
        log.warning("%s: indexing the tars, once", place)
    found = Tars(
        tuple(tars),
        tuple(image.split(",")) if image else (),
        {name: f"{settings.kind}:{getattr(settings, 'from')}" for name, settings in fields.items()},
        {name: settings.classes for name, settings in fields.items() if settings.classes},
        {name: settings.unit for name, settings in fields.items() if settings.unit},
        indexing.separator,
        indexing.missing,
        indexing.strict,
    )
    options = PackOptions(
        "train" if head else indexing.split,
        indexing.val,
        indexing.group,
        indexing.stratify,
        indexing.seed,
        max_skipped=indexing.max_skipped,
        verify=indexing.verify,
    )
    index(found, partial / place.name, options)
    write_text(partial / place.name / REQUEST, json.dumps(request, indent=1))
    os.rename(partial / place.name, place)
    partial.rmdir()


def _head_of(tars: Sequence[str], number: int, folder: Path) -> Path:
    """The first samples of a stream as a tar in `folder`."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "head.tar", "w") as tar:
        for sample in first_samples(tars, number):
            for extension, data in sample.items():
                if not extension.startswith("__"):
                    member = tarfile.TarInfo(f"{sample['__key__']}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder / "head.tar"
