"""Tars that cannot be indexed: read from their beginning to their end, by the package webdataset.

    data:
      train:
        - path: pipe:aws s3 cp s3://bucket/web-{000..099}.tar -
          stream: true
          epoch_samples: 100000
          fields: {breed: {kind: classification, from: cls, classes: [cat, dog]}}
          index: data/web-head

What a run has to know of its data is measured on the stream's first samples, its head, which is kept as a
dataset in `index`. Every worker of every rank reads tars of its own, again and again, through a shuffle
buffer. So which samples a step sees depends on ranks, workers and where the run was resumed, and an epoch is
so many samples, not each of them once.
"""

from __future__ import annotations

import importlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mtl_dist.data.external import FieldSettings, Indexing, LabelField, expanded, image_extensions
from mtl_dist.data.mixing import Samples
from mtl_dist.data.reader import Sample, SplitReader, UnreadableSample, restored
from mtl_dist.data.settings import SourceSettings
from mtl_dist.errors import UserError
from mtl_dist.kinds.cells import parse_cells
from mtl_dist.kinds.kind import Label
from mtl_dist.kinds.registry import kind_of, scalar_kind
from mtl_dist.kinds.vocabulary import Cell, Declared
from mtl_dist.plural import plural
from mtl_dist.randomness import derive_key
from mtl_dist.specs import TaskInfo

_ENDED = re.compile(r"exit (-?\d+) \(read\)")
REQUEST = "request.json"
"""Beside an index that a recipe made: what it was made of."""
_BUFFER = 1000


def raw_samples(tars: Sequence[str], shuffled: int = 0, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The samples of these tars as webdataset makes them, once: bytes by extension, `__key__` and `__url__`.

    Raises:
        UserError: one cannot be read; whatever webdataset and what it starts raise.
    """
    from webdataset import WebDataset

    _wait_for_commands()
    pipeline = WebDataset(
        list(tars),
        shardshuffle=len(tars) if shuffled else False,
        nodesplitter=None,
        workersplitter=None,
        empty_check=False,
        seed=seed,
    )
    if shuffled:
        pipeline = pipeline.shuffle(shuffled, initial=shuffled, rng=random.Random(seed))
    samples = iter(pipeline)
    while True:
        try:
            sample = next(samples)
        except StopIteration:
            return
        except Exception as error:  # of tarfile, of a shell, of a server
            # webdataset adds where it was reading to what a command or a tar says.
            said = " ".join(str(error.args[0] if error.args else error).split())
            ended = _ENDED.search(said)
            reason = f"exit code {ended[1]} of the command" if ended else said[:300] or type(error).__name__
            which = tars[0] if len(tars) == 1 else f"{tars[0]} and {len(tars) - 1} more"
            raise UserError(f"{which}: expected a stream of whole tars, found: {reason}.") from None
        yield sample


@cache
def _wait_for_commands() -> None:
    """Let webdataset's pipes wait for the exit code of a command, at the end of what it says.

    By themselves they only look whether there is one yet: of a command that fails the samples that did not
    come would often be missing without a word.
    """
    opening: Any = importlib.import_module("webdataset.gopen")  # a function hides it
    pipe: Any = opening.Pipe

    class Waiting(pipe):
        def read(self, size: int = -1) -> bytes:
            data: bytes = super().read(size)
            if not data and size:
                self.wait_for_child()
            return data

    opening.Pipe = Waiting


def first_samples(tars: Sequence[str], number: int) -> Iterator[dict[str, Any]]:
    """The first samples of a few of the tars, `number` in all where they hold as many."""
    few = tars[:: max(1, len(tars) // 16)][:16]
    for tar in few:
        with closing(raw_samples([tar])) as samples:  # type: ignore[type-var]
            yield from islice(samples, -(-number // len(few)))


@dataclass
class StreamOrder:
    """The order of a stream's samples: as they come. A sample's row is its position."""

    num_samples: int

    def samples(self, positions: np.ndarray) -> Samples:
        """The samples at these positions."""
        return Samples(np.zeros_like(positions), positions // self.num_samples, positions)


@dataclass
class _Taken:
    """A sample of the stream, its labels read; `problem` where one cannot be."""

    key: str
    url: str
    members: Mapping[str, bytes]
    labels: dict[str, Label] = field(default_factory=dict)
    problem: str = ""


class StreamReader:
    """The samples of a stream for one rank, in place of the reader of indexed ones.

    The rows of a batch that have not been asked for before are the next samples of the process that asks.
    """

    is_remote = False
    has_blocks = False

    def __init__(
        self,
        head: SplitReader,
        directory: Path,
        task_infos: Mapping[str, TaskInfo],
        source: SourceSettings,
        *,
        rank: int,
        world_size: int,
        workers: int,
        seed: int,
    ) -> None:
        request = json.loads((directory / REQUEST).read_text(encoding="utf-8"))
        self.tars = [
            name for tar in request["tars"] for name in expanded(tar if isinstance(tar, str) else tar[0])
        ]
        parts = world_size * max(1, workers)
        if len(self.tars) < parts:
            raise UserError(
                f"data.train: expected a tar for each of {plural(world_size, 'rank')} x "
                f"{plural(max(1, workers), 'worker')}, found {len(self.tars)} in the stream. Lower "
                "data.workers, or name more tars."
            )
        self._head = head
        self._task_infos = task_infos
        self._first, self._workers, self._parts = rank * max(1, workers), workers, parts
        self._seed = seed
        self._buffer = source.shuffle_buffer or _BUFFER
        fields = {
            name: FieldSettings.model_validate(stated, strict=False)
            for name, stated in request["fields"].items()
        }
        places = {name: LabelField.parse(getattr(stated, "from")) for name, stated in fields.items()}
        self._images = image_extensions((request["image"] or "").split(",") if request["image"] else ())
        self._scalars = {
            name: place for name, place in places.items() if not kind_of(fields[name].kind).is_map
        }
        self._maps = {name: place.extension for name, place in places.items() if name not in self._scalars}
        self._values = {name: Declared(fields[name].class_names).class_values for name in self._maps}
        self._by_value = {
            name: stated.class_names for name, stated in fields.items() if isinstance(stated.classes, dict)
        }
        self._indexing = Indexing.model_validate(request["indexing"], strict=False)
        self._held: dict[int, _Taken] = {}
        self._stream: Iterator[_Taken] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": {}, "_stream": None}  # for workers that are not forked

    def labelled(self, task: str, rows: np.ndarray) -> np.ndarray:
        """Which of the rows have a label for the task, bool (N,).

        Raises:
            UserError: the stream cannot be read.
        """
        taken = self._take(rows.tolist())
        extension = self._maps.get(task)
        return np.array([task in one.labels or extension in one.members for one in taken], dtype=bool)

    def spans(self, part: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """No offsets, and the sizes of the images."""
        sizes = [len(self._image(one)[1]) for one in self._take(rows.tolist())]
        return np.zeros(len(sizes), np.int64), np.array(sizes, np.int64)

    def read(self, row: int, masks: tuple[str, ...] = ()) -> Sample:
        """The sample of a row that was taken.

        Raises:
            UnreadableSample: it has no image, several, or a label that is none.
        """
        (taken,) = self._take([row])
        found, image = self._image(taken)
        if len(found) != 1:
            raise UnreadableSample(f"expected one image of .{', .'.join(self._images)}, found {len(found)}")
        if taken.problem:
            raise UnreadableSample(taken.problem.rstrip("."))
        maps = {name: memoryview(bytearray(taken.members[self._maps[name]])) for name in masks}
        for name in maps:
            if values := self._values[name]:
                maps[name] = restored(name, maps[name], self._task_infos[name], values)
        return Sample(taken.key, memoryview(bytearray(image)), dict(taken.labels), maps)

    def with_derived(self, labels: dict[str, Any], row: int) -> dict[str, Any]:
        """The labels: those of derived tasks are among them already."""
        return labels

    def check_tables(self) -> None:
        """Nothing: a stream has no index."""

    def block(self, shard: int, begin: int, size: int) -> bytes:
        """Nothing: no tar of a stream is there as a whole."""
        return b""

    def shard_of(self, row: int) -> int:
        """All are one."""
        return 0

    def prefetch(self, rows: Sequence[int], masks: Sequence[tuple[str, ...]]) -> None:
        """Nothing: they are here."""

    def where(self, row: int) -> str:
        """The sample's tar and key in words, for messages."""
        (taken,) = self._take([row])
        return f"{taken.url}, sample {taken.key}"

    def _image(self, taken: _Taken) -> tuple[list[str], bytes]:
        found = [extension for extension in self._images if extension in taken.members]
        return found, taken.members[found[0]] if found else b""

    def _take(self, rows: Sequence[int]) -> list[_Taken]:
        if any(row not in self._held for row in rows):
            if self._stream is None:
                self._stream = self._samples()
            new = list(dict.fromkeys(rows))
            taken = list(islice(self._stream, len(new)))
            self._label(taken)
            self._held = dict(zip(new, taken, strict=True))
        return [self._held[row] for row in rows]

    def _samples(self) -> Iterator[_Taken]:
        """What this process reads, again and again."""
        from torch.utils.data import get_worker_info  # settings are read without torch

        worker = get_worker_info()
        part = self._first + (0 if worker is None else worker.id)
        tars, again = self.tars[part :: self._parts], 0
        while True:
            empty = True
            for sample in raw_samples(tars, self._buffer, derive_key(self._seed, part, again)):
                empty = False
                members = {name: data for name, data in sample.items() if not name.startswith("__")}
                yield _Taken(sample["__key__"], sample["__url__"], members)
            if empty:
                raise UserError(f"{tars[0]}: expected samples in the stream, found none.")
            again += 1

    def _label(self, taken: Sequence[_Taken]) -> None:
        for task, place in self._scalars.items():
            try:
                labels = self._parsed(task, place, taken)
            except UserError:  # one of them has a label that is none: the others keep theirs
                labels = []
                for one in taken:
                    try:
                        labels += self._parsed(task, place, [one])
                    except UserError as error:
                        one.problem = str(error)
                        labels.append(None)
            for one, label in zip(taken, labels, strict=True):
                if label is not None:
                    one.labels[task] = label
        for one in taken:
            one.labels = self._head.with_derived(one.labels, 0)  # none is made of images

    def _parsed(self, task: str, place: LabelField, taken: Sequence[_Taken]) -> Sequence[Label | None]:
        info, how = self._task_infos[task], self._indexing
        names = self._by_value.get(task, info.classes or None)
        declared = Declared(names, info.unit, how.separator, info.facts, missing=how.missing)
        cells: list[Cell] = []
        for one in taken:
            try:
                cells.append(place.cell(one.members, nested=kind_of(info.kind).has_place))
            except ValueError as error:
                raise UserError(f"its label {task}: {error}.") from None
        return parse_cells(scalar_kind(info.kind), cells, lambda at: f"its field {place}", declared).labels
