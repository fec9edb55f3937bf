"""From datasets to the batches of one rank.

    positions -> samples (order, mixing) -> bytes (reader) -> pixels (decode, transforms) -> Batch (batches)

A batch is a pure function of its number, so worker processes hold no state: they only compute early, and
their number changes nothing. The state of the data in training is one integer, the position.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtl_dist.config.errors import suggest
from mtl_dist.data.balanced import BalancedStream
from mtl_dist.data.batch_loader import Batches, BatchLoader
from mtl_dist.data.batches import BatchBuilder
from mtl_dist.data.blend import Blender, check_blend, partnered
from mtl_dist.data.boxes import check_boxes, with_seen_edges
from mtl_dist.data.cache import Cache
from mtl_dist.data.derived import IMAGE, OfImages
from mtl_dist.data.manifest import ImageDtype, PixelScale
from mtl_dist.data.map_style import split_reader
from mtl_dist.data.mixing import Concatenation, Schedule, Stream
from mtl_dist.data.order import Order
from mtl_dist.data.partition import EvaluationPartition, TrainingPartition
from mtl_dist.data.reader import SplitReader
from mtl_dist.data.settings import (
    DataSettings,
    EvaluationSourceSettings,
    SamplingSettings,
    SourceSettings,
)
from mtl_dist.data.shard_prefetch import ShardPrefetch
from mtl_dist.data.streams import StreamOrder, StreamReader
from mtl_dist.data.task_infos import (
    SourceFacts,
    disagreements,
    merge_task_infos,
    pixel_scale,
    source_facts,
    training_facts,
)
from mtl_dist.data.transform_steps import LibraryTransformSettings
from mtl_dist.data.transforms import PRESETS, Transform, size_after
from mtl_dist.errors import UserError
from mtl_dist.kinds.kind import MapKind
from mtl_dist.kinds.registry import kind_of
from mtl_dist.plural import plural
from mtl_dist.randomness import derive_key
from mtl_dist.specs import TaskInfo

_ORDER, _AUGMENT, _BLEND = 1, 2, 3  # what a key made from the seed is for


# ---------------------------------------------------------------- the datasets
@dataclass(frozen=True)
class Source:
    """One split of one dataset, opened."""

    facts: SourceFacts
    reader: SplitReader


@dataclass(frozen=True)
class Data:
    """The datasets of a recipe, opened and checked, and what they know of its tasks."""

    settings: DataSettings
    task_infos: dict[str, TaskInfo]
    channels: int
    image_dtype: ImageDtype
    sources: dict[str, tuple[Source, ...]]
    schedule: Schedule
    pixels: PixelScale | None = None
    """What the training images are like, where all datasets have measured it."""
    left_out: tuple[str, ...] = ()
    """The training datasets that know none of the tasks: they would only be looked at."""
    not_learnt: tuple[str, ...] = ()
    """The tasks of the training datasets that the recipe does not name."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the batches' images."""
        return size_after(self.settings.user_transforms(training=True), self.settings.size)

    @property
    def fills(self) -> dict[str, float]:
        """What a map says where there is no label, by task."""
        kinds = {name: kind_of(info.kind) for name, info in self.task_infos.items()}
        return {name: kind.missing for name, kind in kinds.items() if isinstance(kind, MapKind)}

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of train, val and test that hold samples."""
        return tuple(self.sources)

    @property
    def num_train_samples(self) -> int:
        """The length of an epoch."""
        stream = self.settings.stream
        if stream is not None and stream.epoch_samples is not None:
            return stream.epoch_samples
        return self.num_samples("train")

    def num_samples(self, split: str) -> int:
        """The samples of a split, over all its sources."""
        return sum(source.reader.num_samples for source in self.sources[split])

    def describe(self) -> str:
        """The data in one line: samples per split, and how several training sources are mixed."""
        parts = [f"{split} {self.num_samples(split):,}" for split in self.splits]
        if self.settings.stream is not None:
            parts[0] = f"train a stream, {self.num_train_samples:,} to the epoch"
        val, test = (
            [(s.facts.path, s.facts.split) for s in self.sources.get(name, ())] for name in ("val", "test")
        )
        if test and val == test:
            parts[-1] += " (the same as val)"
        sampling = self.settings.sampling
        if sampling.kind == "class_balanced":
            num_classes = sum(count > 0 for count in self.task_infos[sampling.task].class_counts)
            parts[0] += f", balanced over {plural(num_classes, 'class', 'classes')} of {sampling.task}"
        elif len(self.sources["train"]) > 1:
            shares = [
                f"{source.facts.path.name} {weight / self.schedule.period:.1%}"
                for source, weight in zip(self.sources["train"], self.schedule.weights, strict=True)
            ]
            parts.append(f"training mix {self.settings.mixing.kind}: {', '.join(shares)}")
        if self.left_out:
            parts.append(f"left out, with no label of these tasks: {', '.join(self.left_out)}")
        return "; ".join(parts)


def open_data(settings: DataSettings, tasks: Collection[str], root: Path | None = None) -> Data:
    """Open the datasets that `settings` names, relative to `root`, for these tasks.

    Raises:
        UserError: a dataset, split or shard is missing or damaged, a task is in no source, or the sources
            do not fit together.
    """
    settings = settings.with_absolute_paths(root or Path.cwd())
    _check_stream(settings, tasks)
    training = training_facts(settings)
    for source in training:
        if source.info.num_samples == 0:
            raise UserError(f"{source.path}: expected samples in the split {source.split}, found none.")
    task_infos = merge_task_infos(tasks, training)
    known = dict.fromkeys(name for source in training for name in source.tasks)
    not_learnt = tuple(name for name in known if name not in task_infos)
    settings, training, left_out = _with_labels(settings, training, task_infos)
    check_blend(settings.blending, task_infos)
    problem = settings.blend_problem([len(task_infos[name].classes) for name in partnered(task_infos)])
    if problem:
        raise UserError(problem)
    _check_sizes(settings, task_infos)
    mixes = settings.blending is not None and settings.blending.mixup is not None
    check_boxes(settings.boxes, task_infos, mixes)
    facts = {"train": training}
    for split, stated in (("val", settings.val), ("test", settings.test)):
        facts[split] = _evaluation_facts(settings, stated, split, training)
        problems = disagreements(task_infos, facts[split])
        if problems:
            raise UserError("\n".join(problems))
    channels, image_dtype = _image_kind([source for group in facts.values() for source in group])
    cache = None if settings.cache is None else Cache(settings.cache)
    sources = {
        split: tuple(Source(s, _reader_of(s, task_infos, cache)) for s in group)
        for split, group in facts.items()
        if group
    }
    _check_sampling(settings.sampling, task_infos, sources["train"])
    lengths = [source.info.num_samples for source in training]
    schedule = Schedule(settings.mixing.weights(settings.train, lengths))
    task_infos = with_seen_edges(task_infos, settings.boxes, settings.size)
    pixels = pixel_scale(training, channels)
    return Data(settings, task_infos, channels, image_dtype, sources, schedule, pixels, left_out, not_learnt)


def _reader_of(source: SourceFacts, tasks: Collection[str], cache: Cache | None) -> SplitReader:
    """The samples of a source, with those derived labels that are learnt, known before workers are forked."""
    learnt = {name: derivation for name, derivation in source.derived.items() if name in tasks}
    reader = split_reader(source.path, source.manifest, source.split, cache, learnt)
    reader.know({n: source.image_classes(n) for n, d in learnt.items() if isinstance(d, OfImages)})
    return reader


def _check_stream(settings: DataSettings, tasks: Collection[str]) -> None:
    """Refuse classes of images that are not there before training."""
    for name, wish in settings.derive.items():
        if settings.stream is not None and wish.source == IMAGE and name in tasks:
            raise UserError(
                f"data.derive.{name}.from: expected a task, because the images of a stream are not known "
                "before they are read, found image. Write the label into the tars."
            )


def _with_labels(
    settings: DataSettings, training: Sequence[SourceFacts], tasks: Collection[str]
) -> tuple[DataSettings, list[SourceFacts], tuple[str, ...]]:
    """The training sources that know a task of the recipe, and the names of the others."""
    knows = [any(task in source.tasks for task in tasks) for source in training]
    kept = tuple(stated for stated, known in zip(settings.train, knows, strict=True) if known)
    left_out = tuple(source.path.name for source, known in zip(training, knows, strict=True) if not known)
    facts = [source for source, known in zip(training, knows, strict=True) if known]
    return settings.model_copy(update={"train": kept}), facts, left_out


def _check_sampling(
    sampling: SamplingSettings, task_infos: Mapping[str, TaskInfo], sources: Sequence[Source]
) -> None:
    """Refuse to balance what has no classes."""
    if sampling.kind == "uniform":
        return
    suitable = [name for name, info in task_infos.items() if kind_of(info.kind).is_one_class]
    if sampling.task not in suitable:
        raise UserError(
            f"data.sampling.task: expected a classification task of the recipe ({', '.join(suitable)}), "
            f"found {sampling.task!r}."
        )
    if not any((source.reader.classes(sampling.task) >= 0).any() for source in sources):
        raise UserError(f"data.sampling.task: expected labels of {sampling.task} in training, found none.")


def _check_sizes(settings: DataSettings, task_infos: Mapping[str, TaskInfo]) -> None:
    """Refuse steps of the user's that make images of another size in training than in evaluation, and such
    that change the size where pixels are predicted or boxes move."""
    trained, evaluated = (
        size_after(settings.user_transforms(training), settings.size) for training in (True, False)
    )
    if trained != evaluated:
        raise UserError(
            f"data.transforms: expected the same size in training and in evaluation, found {trained[0]} x "
            f"{trained[1]} and {evaluated[0]} x {evaluated[1]}. Set training_only = False in a step that "
            "makes this size, or add one."
        )
    placed = [
        name for name, info in task_infos.items() if (kind := kind_of(info.kind)).is_map or kind.has_place
    ]
    placed += list(settings.boxes)
    if trained != settings.size and placed:
        raise UserError(
            f"data.transforms: expected steps that keep {settings.size[0]} x {settings.size[1]}, because "
            f"{', '.join(placed)} has a place in the image's own pixels, found {trained[0]} x {trained[1]}. "
            "Use data.image_size and data.resize."
        )
    _check_library_steps(settings, task_infos, placed)


def _check_library_steps(
    settings: DataSettings, task_infos: Mapping[str, TaskInfo], placed: Sequence[str]
) -> None:
    """Refuse transforms of torchvision that move pixels where somebody who must hear of it does not: boxes,
    labels that change with the view, and the masks that are predicted."""
    if not any(isinstance(step, LibraryTransformSettings) for step in settings.transforms):
        return
    maps = [name for name, info in task_infos.items() if kind_of(info.kind).is_map]
    deaf = [*settings.boxes]
    deaf += [name for name, info in task_infos.items() if kind_of(info.kind).moves]
    size = settings.size
    for stated in settings.transforms:
        if stated.of_batches or stated.blends is not None:
            continue
        step: Any = stated.make()
        found = f"found {stated.path.rpartition('.')[2]}"
        if isinstance(stated, LibraryTransformSettings) and step.effect(size).moves:
            if deaf:
                raise UserError(
                    "data.transforms: expected no step of torchvision that moves pixels, because the labels "
                    f"of {', '.join(deaf)} change with the view, {found}. Use data.augment."
                )
            if maps and not step.effect(size).takes_maps:
                raise UserError(
                    "data.transforms: expected steps that take maps along, because there is "
                    f"{', '.join(maps)}, {found}, which does not. Use data.augment."
                )
            if placed and not stated.only_trains:
                raise UserError(
                    "data.transforms: expected steps of evaluation that leave pixels where they are, because "
                    f"{', '.join(placed)} has a place in the image's own, {found} with training_only: false. "
                    "Remove that."
                )
        size = step.size_after(size)


def _evaluation_facts(
    settings: DataSettings,
    stated: Sequence[EvaluationSourceSettings] | None,
    split: str,
    training: Sequence[SourceFacts],
) -> list[SourceFacts]:
    """The sources of val or test that hold samples; where none are stated, those of the training datasets."""
    if stated is not None:
        found = [source_facts(s.location, s.split or split, settings.derive, settings.facts) for s in stated]
    else:
        datasets = {source.path: replace(source, split=split) for source in training}
        found = [source for source in datasets.values() if split in source.manifest.splits]
    return [source for source in found if source.info.num_samples > 0]


def _image_kind(sources: Sequence[SourceFacts]) -> tuple[int, ImageDtype]:
    """The channels and the depth of the batches: colour where some source has it and the others are grey."""
    channels = max(source.manifest.channels for source in sources)
    dtype = sources[0].manifest.image_dtype
    for source in sources:
        manifest = source.manifest
        if manifest.image_dtype != dtype:
            raise UserError(
                f"{source.path}: expected {dtype} images as in {sources[0].path}, found "
                f"{manifest.image_dtype}. Prepare one of them again, or leave it out."
            )
        if manifest.channels != channels and (manifest.channels, channels) != (1, 3):
            raise UserError(
                f"{source.path}: expected images of {channels} channels as in other sources, found "
                f"{manifest.channels}. Prepare one of them again, or leave it out."
            )
    return channels, dtype


# ---------------------------------------------------------------- the loaders
def train_loader(
    data: Data,
    *,
    seed: int,
    global_batch: int,
    accumulation: int,
    rank: int,
    world_size: int,
    start_position: int,
    end_position: int,
    workers: int,
    pin_memory: bool,
) -> BatchLoader:
    """The micro-batches of a rank, in order, for the positions from `start_position` up to `end_position`.

    Epoch e is the positions [e * N, (e + 1) * N) for N = data.num_train_samples; a batch may hold the end of
    one epoch and the beginning of the next. Another partition of the same positions (ranks, accumulation,
    workers, another start) sees the same samples in the same views.

    Raises:
        UserError: the global batch does not divide into the ranks' micro-batches.
    """
    partition = TrainingPartition(global_batch, accumulation, rank, world_size, start_position, end_position)
    settings = data.settings
    blender = (
        None
        if settings.blending is None
        else Blender(settings.blending, derive_key(seed, _BLEND), partnered(data.task_infos))
    )
    user_defined = settings.user_transforms(training=True)
    transform = Transform(settings.size, settings.resize, settings.augmentation, user_defined, data.fills)
    key = derive_key(seed, _AUGMENT)
    builder = _builder(data, "train", transform, key, blender, pin_memory)
    builder = replace(builder, of_batches=settings.batch_transforms)
    if settings.stream is not None:
        reader = _stream_reader(
            data, settings.stream, rank, world_size, workers, derive_key(seed, _ORDER, start_position)
        )
        builder = replace(builder, readers=[reader])
        stream = Batches(partition, StreamOrder(data.num_train_samples), builder)
        return BatchLoader(stream, workers, pin_memory, settings.on_bad_sample)
    readers = [source.reader for source in data.sources["train"]]
    shard_prefetch = None if settings.cache is None else ShardPrefetch(readers, settings.cache)
    batches = Batches(partition, _stream(data, seed), builder, shard_prefetch)
    return BatchLoader(batches, workers, pin_memory, settings.on_bad_sample)


def _stream_reader(
    data: Data, stream: SourceSettings, rank: int, world_size: int, workers: int, seed: int
) -> StreamReader:
    """What stands in place of the reader of the stream's first samples, which are its source."""
    (source,) = data.sources["train"]
    assert isinstance(source.facts.path, Path), "the head of a stream is a local dataset"
    return StreamReader(
        source.reader,
        source.facts.path,
        source.facts.manifest.tasks,
        stream,
        rank=rank,
        world_size=world_size,
        workers=workers,
        seed=seed,
    )


def _stream(data: Data, seed: int) -> Stream | BalancedStream:
    """The order of the training samples."""
    sources, settings = data.sources["train"], data.settings
    if settings.sampling.kind == "class_balanced":
        classes = [source.reader.classes(settings.sampling.task) for source in sources]
        return BalancedStream(classes, derive_key(seed, _ORDER))
    orders = [
        Order(source.reader.shard_sizes, settings.shuffle_window, derive_key(seed, _ORDER, number))
        for number, source in enumerate(sources)
    ]
    return Stream(orders, data.schedule)


def eval_loader(
    data: Data,
    split: str,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    pin_memory: bool = False,
) -> BatchLoader:
    """A rank's batches of a split, not augmented: each sample once over the ranks, in the stored order.

    Every rank has equally many batches; what fills the last ones is not valid. A position is the sample's
    index in the split, over its sources one after the other.

    Raises:
        UserError: the data has no such split.
    """
    if split == "train" and data.settings.stream is not None:
        raise UserError(
            "--split: expected val or test of data whose training samples are a stream, found train."
        )
    if split not in data.sources:
        raise UserError(
            f"--split: expected a split of the data, found {split!r}. {suggest(split, data.splits, 'It has')}"
        )
    own = data.settings.user_transforms(training=False)
    transform = Transform(data.settings.size, data.settings.resize, PRESETS["none"], own, data.fills)
    order = Concatenation([source.reader.num_samples for source in data.sources[split]])
    partition = EvaluationPartition(batch_size, rank, world_size, order.num_samples)
    builder = replace(_builder(data, split, transform, 0, pin_memory=pin_memory), keeps_whole=True)
    batches = Batches(partition, order, builder)
    return BatchLoader(batches, workers, pin_memory, data.settings.on_bad_sample)


def _builder(
    data: Data,
    split: str,
    transform: Transform,
    key: int,
    blender: Blender | None = None,
    pin_memory: bool = False,
) -> BatchBuilder:
    return BatchBuilder(
        readers=[source.reader for source in data.sources[split]],
        task_infos=data.task_infos,
        channels=data.channels,
        image_dtype=data.image_dtype,
        transform=transform,
        key=key,
        fail_on_bad=data.settings.on_bad_sample.kind == "fail",
        blender=blender,
        boxes=data.settings.boxes,
        pin_memory=pin_memory,
    )
