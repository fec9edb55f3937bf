"""Builds batches: reads, decodes and transforms samples straight into one block of memory.

The pixels of a batch, images and masks, lie in one block that is allocated once, in shared memory when a
worker process builds it and page-locked where a GPU waits for it. Nothing is stacked or made float on the
way. The few numbers beside the pixels travel by value: a tensor costs a worker more than they do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from mtl_dist.batch import Batch, WholeMaps
from mtl_dist.data.blend import Blended, Blender
from mtl_dist.data.boxes import BoxTasks
from mtl_dist.data.decode import decode_map, open_picture
from mtl_dist.data.images import UnreadableImage
from mtl_dist.data.manifest import ImageDtype
from mtl_dist.data.mixing import Samples
from mtl_dist.data.reader import SampleReader, UnreadableSample
from mtl_dist.data.small_images import read_small_images
from mtl_dist.data.transforms import BatchTransform, Transform
from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import MapKind, ScalarKind
from mtl_dist.kinds.registry import kind_of
from mtl_dist.kinds.vocabulary import LabelError
from mtl_dist.randomness import Draws, derive_key
from mtl_dist.specs import TaskInfo

_OF_BATCH = 1 << 40  # in a key, where a sample's has the number of its source
_GROUP, _GROUP_BYTES = 8, 1 << 20  # samples, and bytes of image files, that are decoded side by side


@dataclass(frozen=True)
class Layout:
    """The parts of a block: the images, channels last, then the maps of each task that has some."""

    batch_size: int
    size: tuple[int, int]
    channels: int
    dtype: torch.dtype
    maps: Mapping[str, MapKind]

    @property
    def num_bytes(self) -> int:
        """The size of the whole block."""
        return self._image_bytes + sum(map(self._map_bytes, self.maps))

    @property
    def _image_bytes(self) -> int:
        """Of the images, with room behind them: numbers of several bytes begin at multiples of these."""
        num_bytes = self._num_pixels * self.channels * self.dtype.itemsize
        return num_bytes if all(kind.dtype == "uint8" for kind in self.maps.values()) else _even(num_bytes)

    @property
    def _num_pixels(self) -> int:
        return self.batch_size * math.prod(self.size)

    def _map_bytes(self, task: str) -> int:
        kind = self.maps[task]
        num_bytes = self._num_pixels * max(1, kind.channels) * np.dtype(kind.dtype).itemsize
        return num_bytes if all(kind.dtype == "uint8" for kind in self.maps.values()) else _even(num_bytes)

    def images_BHWC(self, block: Tensor) -> Tensor:
        """The images in a block, as a view."""
        pixels = block[: self._num_pixels * self.channels * self.dtype.itemsize].view(self.dtype)
        return pixels.view(self.batch_size, *self.size, self.channels)

    def map_of(self, block: Tensor, task: str) -> Tensor:
        """The maps of a task in a block, as a view (B, H, W) or (B, C, H, W)."""
        kind = self.maps[task]
        before = itertools.takewhile(lambda name: name != task, self.maps)
        begin = self._image_bytes + sum(map(self._map_bytes, before))
        dtype: torch.dtype = getattr(torch, kind.dtype)
        end = begin + self._num_pixels * max(1, kind.channels) * dtype.itemsize
        planes = (kind.channels,) if kind.channels else ()
        return block[begin:end].view(dtype).view(self.batch_size, *planes, *self.size)


def _even(num_bytes: int) -> int:
    return -(-num_bytes // 8) * 8


@dataclass(frozen=True)
class Loaded:
    """A batch on its way to the training process, and a line for each of its samples that was bad.

    The block may hold more samples than the batch, behind them: those that were needed for blending.
    """

    layout: Layout
    block: Tensor
    targets: dict[str, np.ndarray]
    labelled: dict[str, np.ndarray]
    valid: np.ndarray
    positions: np.ndarray
    keys: list[str]
    bad: tuple[str, ...]
    blended: Blended | None
    whole: dict[str, WholeMaps]

    def pin_memory(self) -> Loaded:
        """The same with its block in page-locked memory (the DataLoader calls this)."""
        whole = {name: replace(maps, values=maps.values.pin_memory()) for name, maps in self.whole.items()}
        return replace(self, block=self.block.pin_memory(), whole=whole)

    def batch(self) -> Batch:
        """The batch, on the block's memory."""
        size, blended = len(self.positions), self.blended
        targets = {name: torch.from_numpy(values) for name, values in self.targets.items()}
        maps = {name: self.layout.map_of(self.block, name)[:size] for name in self.layout.maps}
        return Batch(
            images_BCHW=self.layout.images_BHWC(self.block)[:size].permute(0, 3, 1, 2),
            targets={name: maps[name] if name in maps else targets[name] for name in self.labelled},
            labelled={name: torch.from_numpy(mask) for name, mask in self.labelled.items()},
            valid_B=torch.from_numpy(self.valid),
            positions_B=torch.from_numpy(self.positions),
            keys=self.keys,
            num_bad=len(self.bad),
            lam_B=None if blended is None else torch.from_numpy(blended.lam_B),
            partners={}
            if blended is None
            else {name: torch.from_numpy(values) for name, values in blended.partners.items()},
            whole=self.whole,
        )


@dataclass(frozen=True)
class _Arrays:
    """What the samples of a batch are written into."""

    images_BHWC: Tensor
    maps: dict[str, Tensor]
    targets: dict[str, np.ndarray]
    labelled: dict[str, np.ndarray]
    keys: list[str]
    whole: dict[str, dict[int, Tensor]]
    """Per task that is measured so: the maps in their own size, by sample."""


@dataclass(frozen=True)
class BatchBuilder:
    """Builds batches from the rows of some sources.

    `key` seeds the augmentation; `fail_on_bad` decides whether a sample that cannot be read ends the run or
    is masked; `pin_memory` asks for page-locked blocks, which workers cannot have (the DataLoader copies what
    they return into one). With `keeps_whole`, for evaluation, maps that are measured in their own size come
    along in it.
    """

    readers: Sequence[SampleReader]
    task_infos: Mapping[str, TaskInfo]
    channels: int
    image_dtype: ImageDtype
    transform: Transform
    key: int
    fail_on_bad: bool
    blender: Blender | None = None
    boxes: Mapping[str, BoxTasks] = field(default_factory=dict)
    pin_memory: bool = False
    keeps_whole: bool = False
    of_batches: Sequence[BatchTransform] = ()
    """The user's steps on the images together."""

    @cached_property
    def _scalars(self) -> dict[str, ScalarKind]:
        """The kinds of the tasks whose labels are no maps."""
        kinds = {name: kind_of(info.kind) for name, info in self.task_infos.items()}
        return {name: kind for name, kind in kinds.items() if isinstance(kind, ScalarKind)}

    @cached_property
    def _maps(self) -> dict[str, MapKind]:
        """The kinds of those whose labels are."""
        kinds = {name: kind_of(info.kind) for name, info in self.task_infos.items()}
        return {name: kind for name, kind in kinds.items() if isinstance(kind, MapKind)}

    def build(self, samples: Samples, positions: np.ndarray, real: np.ndarray, size: int) -> Loaded:
        """The batch of the first `size` of these samples; those that are not `real` only fill it.

        The samples behind are there for the first ones to be blended with.

        Raises:
            UserError: a sample cannot be read, and that ends the run.
        """
        layout = self._layout(len(positions))
        block = _allocate(layout.num_bytes, self.pin_memory)
        images_BHWC = layout.images_BHWC(block)
        maps = {name: layout.map_of(block, name) for name in layout.maps}
        targets = self._targets(len(positions))
        labelled = self._labelled(samples)
        valid, keys, bad = real.copy(), [""] * len(positions), []
        done = self._build_small(samples, images_BHWC, labelled, targets, keys)
        self._prefetch(samples, labelled, ~done)
        each = list(samples)
        measured = {name for name, kind in self._maps.items() if kind.measured_whole}
        if not (self.keeps_whole and self.transform.shows_whole):
            measured = set()
        into = _Arrays(images_BHWC, maps, targets, labelled, keys, {name: {} for name in measured})
        for group in self._groups(samples, np.flatnonzero(~done)):
            for i, error in _in_turns({i: self._fill(into, i, *each[i]) for i in group}):
                source, _, row = each[i]
                problem = f"{self.readers[source].where(row)}: {error}."
                if self.fail_on_bad:
                    advice = "Fix the dataset, or set `data.on_bad_sample: {kind: skip}`."
                    raise UserError(f"{problem} {advice}") from None
                if real[i] and i < size:
                    bad.append(problem)
                valid[i] = False
                images_BHWC[i] = 0
                for name, target in maps.items():
                    target[i] = layout.maps[name].missing
        labelled = {name: mask & valid for name, mask in labelled.items()}
        blended = None
        if self.blender is not None:
            blended = self.blender.blend(positions, valid, images_BHWC, maps, targets, labelled)
            blended = Blended(blended.lam_B[:size], _first(size, blended.partners))
        for step in self.of_batches:
            self._transform(step, images_BHWC[:size].permute(0, 3, 1, 2), int(positions[0]))
        return Loaded(
            layout,
            block,
            _first(size, targets),
            _first(size, labelled),
            valid[:size],
            positions[:size],
            keys[:size],
            tuple(bad),
            blended,
            self._whole(into.whole, labelled, size),
        )

    def _transform(self, step: BatchTransform, images_BCHW: Tensor, position: int) -> None:
        """Let a step of the user's act on the images together, in place.

        Raises:
            UserError: it fails, or returns others than it is to.
        """
        where = f"data.transforms: {type(step).__module__}.{type(step).__qualname__}"
        try:
            made = step(images_BCHW.clone(), Draws(derive_key(self.key, _OF_BATCH, position)))
        except Exception as error:  # whatever the user's code raises
            words = f"{type(error).__name__}: {error}"
            raise UserError(f"{where} fails on images {tuple(images_BCHW.shape)}: {words}.") from error
        if not isinstance(made, Tensor) or (made.shape, made.dtype) != (images_BCHW.shape, images_BCHW.dtype):
            found = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise UserError(
                f"{where}: expected images of {images_BCHW.dtype} {tuple(images_BCHW.shape)}, found {found}. "
                "Return them in the same shape."
            )
        images_BCHW.copy_(made)

    def _build_small(
        self,
        samples: Samples,
        images_BHWC: Tensor,
        labelled: dict[str, np.ndarray],
        targets: dict[str, np.ndarray],
        keys: list[str],
    ) -> np.ndarray:
        """Fill in the small samples that need no transform, bool (B,): which of them are done."""
        done = np.zeros(len(keys), dtype=bool)
        has_maps = len(targets) < len(self.task_infos)
        if (
            has_maps
            or self.boxes
            or any(kind.moves for kind in self._scalars.values())
            or self.image_dtype != "uint8"
            or not self.transform.keeps(self.transform.size)
        ):
            return done
        tasks = list(labelled)
        flags = list(zip(*(has.tolist() for has in labelled.values()), strict=True))
        for source in np.unique(samples.sources).tolist():
            mine = np.flatnonzero(samples.sources == source)
            small = read_small_images(
                self.readers[source], samples.rows[mine], (*self.transform.size, self.channels)
            )
            if small is None:
                continue
            known: dict[tuple[int, tuple[bool, ...]], dict[str, Any]] = {}  # equal labels are one object
            for i, read, key, found in zip(
                mine.tolist(), small.read.tolist(), small.keys, small.labels, strict=True
            ):
                if read:
                    at = id(found), flags[i]
                    if at not in known:
                        try:
                            known[at] = self._labels(found, list(itertools.compress(tasks, flags[i])))
                        except UnreadableSample:
                            continue  # it is read again, and judged
                    for name, value in known[at].items():
                        targets[name][i] = value
                    keys[i], done[i] = key, True
            images_BHWC[torch.from_numpy(mine)] = torch.from_numpy(small.images_BHWC)
        return done

    def _labels(self, labels: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
        found = {}
        for name in tasks:
            if name not in labels:
                raise UnreadableSample(f"its labels lack {name}, which the index says it has")
            try:
                found[name] = self._scalars[name].target(labels[name], self.task_infos[name])
            except LabelError as error:
                raise UnreadableSample(
                    f"its label {name} is {error.found}, where {error.expected} is expected"
                ) from None
        return found

    def _groups(self, samples: Samples, wanted: np.ndarray) -> Iterator[list[int]]:
        """The `wanted` samples, a few at a time: what these are decoded to shall not fill the memory."""
        sizes = np.zeros(len(samples.rows), dtype=np.int64)
        for source, reader in enumerate(self.readers):
            mine = samples.sources == source
            sizes[mine] = reader.spans("image", samples.rows[mine])[1]
        group: list[int] = []
        num_bytes = 0
        for i in wanted.tolist():
            if group and (len(group) == _GROUP or num_bytes + sizes[i] > _GROUP_BYTES):
                yield group
                group, num_bytes = [], 0
            group.append(i)
            num_bytes += sizes[i]
        if group:
            yield group

    def _fill(self, into: _Arrays, i: int, source: int, epoch: int, row: int) -> Iterator[None]:
        """Fill in sample `i`, in steps; boxes among the labels move along with the pixels, or out.

        Raises:
            UnreadableSample, UnreadableImage: it cannot be read; nothing was written.
        """
        tasks = [name for name, has in into.labelled.items() if has[i]]
        sample = self.readers[source].read(row, tuple(name for name in tasks if name in into.maps))
        draws = Draws(derive_key(self.key, source, epoch, row))
        labels = self._labels(sample.labels, [name for name in tasks if name in into.targets])
        yield
        picture = open_picture(sample.image, self.channels, self.image_dtype)
        masks = {name: self._map(name, data) for name, data in sample.masks.items()}
        for name, mask in masks.items():
            if mask.shape[-2:] != picture.size:
                sizes = [f"{width}x{height}" for height, width in (mask.shape[-2:], picture.size)]
                raise UnreadableSample(f"its mask {name} is {sizes[0]}, its image {sizes[1]}")
        boxes = {
            name: [labels[task] for task in tasks]
            for name, tasks in self.boxes.items()
            if all(task in labels for task in tasks)
        }
        for task in itertools.chain.from_iterable(self.boxes.values()):
            labels.pop(task, None)
        whole = {name: mask for name, mask in masks.items() if name in into.whole}
        shown = self.transform.source(picture.size, draws)
        yield
        resizing = self.transform.decode(picture, shown)
        yield
        image_CHW, masks, seen, view = self.transform.finish(
            resizing, shown, picture.size, masks, boxes, draws
        )
        for name, edges in seen.items():
            labels.update(zip(self.boxes[name], edges, strict=True))
        for name, mask in masks.items():
            kind, info = self._maps[name], self.task_infos[name]
            try:
                kind.check(whole.get(name, mask).numpy(), info)
            except LabelError as error:
                raise UnreadableSample(
                    f"its mask {name} holds {error.found}, where {error.expected} are expected"
                ) from None
            if kind.moves:
                masks[name] = torch.from_numpy(kind.moved(mask.numpy(), view(), info))
        for name in list(labels):
            if self._scalars[name].moves:
                moved = self._scalars[name].moved(labels.pop(name), view(), self.task_infos[name])
                labels |= {} if moved is None else {name: moved}
                into.labelled[name][i] &= moved is not None
        for name, scalar in self._scalars.items():
            if scalar.moves and name not in labels:
                blank = scalar.without_label(view(), self.task_infos[name])
                labels |= {} if blank is None else {name: blank}
        for name, mask in whole.items():
            into.whole[name][i] = mask
        into.keys[i] = sample.key
        into.images_BHWC[i] = image_CHW.permute(1, 2, 0)
        for name, target in into.maps.items():
            target[i] = masks.get(name, self._maps[name].missing)
        for name, value in labels.items():
            into.targets[name][i] = value
        for name in itertools.chain.from_iterable(self.boxes.values()):
            into.labelled[name][i] &= name in labels

    def _whole(
        self, kept: Mapping[str, Mapping[int, Tensor]], labelled: Mapping[str, np.ndarray], size: int
    ) -> dict[str, WholeMaps]:
        """The maps that are not all in the batch's size already."""
        whole = {}
        for name, maps in kept.items():
            shown = {row: maps[row] for row in np.flatnonzero(labelled[name][:size]).tolist()}
            if any(one.shape != self.transform.size for one in shown.values()):
                sizes = [
                    (shown[row].shape[0], shown[row].shape[1]) if row in shown else (0, 0)
                    for row in range(size)
                ]
                values = torch.cat([one.flatten() for one in shown.values()])
                whole[name] = WholeMaps(values, sizes, self.transform.restored)
        return whole

    def _prefetch(self, samples: Samples, labelled: Mapping[str, np.ndarray], wanted: np.ndarray) -> None:
        """Let each reader ask for what it will be asked for, all at once where that is worth it."""
        maps = [name for name in labelled if name in self._maps]
        for source, reader in enumerate(self.readers):
            if reader.is_remote:
                mine = np.flatnonzero((samples.sources == source) & wanted)
                rows = samples.rows[mine].tolist()
                reader.prefetch(rows, [tuple(name for name in maps if labelled[name][i]) for i in mine])

    def _map(self, name: str, data: memoryview) -> Tensor:
        """A stored map as its kind means it."""
        try:
            return torch.from_numpy(self._maps[name].values(decode_map(data), self.task_infos[name]))
        except LabelError as error:
            raise UnreadableSample(
                f"its mask {name} holds {error.found}, where {error.expected} are expected"
            ) from None

    def _layout(self, batch_size: int) -> Layout:
        dtype = torch.uint8 if self.image_dtype == "uint8" else torch.float32
        return Layout(batch_size, self.transform.output_size, self.channels, dtype, self._maps)

    def _labelled(self, samples: Samples) -> dict[str, np.ndarray]:
        labelled = {name: np.zeros(len(samples.rows), dtype=bool) for name in self.task_infos}
        for source, reader in enumerate(self.readers):
            reader.check_tables()
            mine = samples.sources == source
            for name, mask in labelled.items():
                mask[mine] = reader.labelled(name, samples.rows[mine])
        return labelled

    def _targets(self, batch_size: int) -> dict[str, np.ndarray]:
        """Room for every target that is not a map, holding what stands for a missing one."""
        return {name: kind.targets(batch_size, self.task_infos[name]) for name, kind in self._scalars.items()}


def _in_turns(
    samples: dict[int, Iterator[None]],
) -> Iterator[tuple[int, UnreadableSample | UnreadableImage]]:
    """Take these samples through their steps side by side; those that fail come back with the error.

    Sample by sample, every step would find that the others have driven its code out of the processor's
    caches: that costs a photograph a tenth of its time.
    """
    while samples:
        for i, steps in list(samples.items()):
            try:
                next(steps)
            except StopIteration:
                del samples[i]
            except (UnreadableSample, UnreadableImage) as error:
                del samples[i]
                yield i, error


def _first(size: int, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values[:size] for name, values in columns.items()}


def _allocate(num_bytes: int, pin_memory: bool) -> Tensor:
    if get_worker_info() is None:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pin_memory)
    # As torch's own collate function does: what a worker returns is moved to shared memory otherwise.
    storage = torch.UntypedStorage._new_shared(num_bytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage)
