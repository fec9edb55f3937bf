"""The `data` section of a recipe: which datasets, mixed and shuffled how, turned into which images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mtl_dist.config.settings import Settings
from mtl_dist.config.trust import refusal
from mtl_dist.data.blend import BlendSettings
from mtl_dist.data.boxes import BoxTasks
from mtl_dist.data.cache import CacheSettings
from mtl_dist.data.derived import DeriveSettings
from mtl_dist.data.external import Fields, Indexing
from mtl_dist.data.mixing import integer_weights
from mtl_dist.data.order import ShuffleWindow
from mtl_dist.data.remote import PIPE, Location, LocationSetting
from mtl_dist.data.transform_steps import UserBatchTransformSettings, UserTransform
from mtl_dist.data.transforms import (
    PRESETS,
    AugmentSettings,
    BatchTransform,
    CentreCrop,
    ImageTransform,
    Preset,
    Resize,
)
from mtl_dist.data.user_dataset import UserDataset


class _PlaceSettings(Settings):
    """Where the samples of a source are."""

    path: LocationSetting | None = None
    """The dataset's directory, which holds dataset.json: a path, or a URL such as s3://bucket/cats."""
    dataset: UserDataset | None = None
    """In place of `path`: a map-style Dataset of torch by its import path. It is read once, when it is opened
    first."""
    fields: Fields | None = None
    """Which fields are which tasks, of a `dataset`, or where `path` names external WebDataset tars: a tar, a
    directory of them, or such as data/web/*.tar. They are indexed once, when they are opened first."""
    image: str | None = None
    """With `fields`: the image's extension, where samples hold several; its place in those of a `dataset`."""
    index: Path | None = None
    """With `fields`: the directory for the index; by default in `.mtl`, beside the tars or in the working
    directory."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            found = "none" if self.path is None else "both"
            raise ValueError(f"expected path or dataset, found {found}. State one.")
        if self.fields is None:
            for name in ("image", "index"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: expected none without `fields`, found {getattr(self, name)}.")
        for name, stated in (self.fields or {}).items():
            if self.path is not None and not getattr(stated, "from"):
                raise ValueError(
                    f"fields.{name}.from: expected the field in the tars, found nothing. State it."
                )
        return self

    @property
    def location(self) -> Location:
        """The directory of the dataset, which is known once everything is indexed."""
        assert self.path is not None, "Datasets and external tars are indexed beforehand"
        return self.path


class SourceSettings(_PlaceSettings):
    """One dataset to train on."""

    split: str = "train"
    """The split of the dataset that is trained on."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Its share of the stream, relative to the others', where `data.mixing.kind` is weights."""
    indexing: Indexing | None = None
    """With `fields`: how samples are split, and what is a label, as `mtl index` takes it; of a `dataset` val,
    stratify, seed, missing and separator."""
    stream: bool = False
    """With `fields`: read the tars from their beginning to their end, by the package webdataset, because they
    cannot be indexed: `pipe:COMMAND`, or a server that sends whole files only. docs/data-format.md says what
    that costs."""
    epoch_samples: Annotated[int, Field(ge=1)] | None = None
    """With `stream`: the samples of an epoch."""
    shuffle_buffer: Annotated[int, Field(ge=1)] | None = None
    """With `stream`: the samples that are shuffled together in each worker; 1000 where nothing is said."""

    @model_validator(mode="after")
    def _only_with_fields(self) -> SourceSettings:
        if self.fields is None and self.indexing is not None:
            raise ValueError(f"indexing: expected none without `fields`, found {self.indexing}.")
        if self.dataset is None:
            return self
        if self.stream:
            raise ValueError("stream: expected false of a `dataset`, found true. Remove it.")
        if self.fields is None:
            raise ValueError("fields: expected the tasks that a `dataset` has, found none. State them.")
        standard = Indexing()
        for name in ("split", "group", "strict", "max_skipped", "verify"):
            stated = getattr(self.indexing or standard, name)
            if stated != getattr(standard, name):
                raise ValueError(f"indexing.{name}: expected none of a `dataset`, found {stated}. Remove it.")
        return self

    @model_validator(mode="after")
    def _streams_are_whole(self) -> SourceSettings:
        if not self.stream:
            for name in ("epoch_samples", "shuffle_buffer"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: expected none without `stream`, found {getattr(self, name)}.")
            if str(self.path).startswith(PIPE):
                raise ValueError(f"path: expected `stream: true` with a command's output, found {self.path}.")
            return self
        problem = refusal(f"the stream {self.path}")
        if problem:
            raise ValueError(f"path: {problem}")
        for name in ("fields", "epoch_samples"):
            if getattr(self, name) is None:
                raise ValueError(f"{name}: expected it with `stream: true`, found none. State it.")
        if self.split != "train":
            raise ValueError(f"split: expected none with `stream: true`, found {self.split}.")
        for name in ("split", "val", "group", "stratify"):
            if self.indexing is not None and (stated := getattr(self.indexing, name)):
                raise ValueError(
                    f"indexing.{name}: expected none with `stream: true`, found {stated}. State data.val and "
                    "data.test: what is evaluated must be indexed."
                )
        return self


class EvaluationSourceSettings(_PlaceSettings):
    """One split of a dataset to evaluate on."""

    split: str | None = None
    """Which of its splits; none of a `dataset`, which is read as a whole. Its fields are those of the first
    training source that is one, where nothing else is said."""

    @model_validator(mode="after")
    def _split_of_what_has_some(self) -> Self:
        if self.dataset is None and self.fields is not None:
            raise ValueError(
                "fields: expected none beside a `path`, which is a prepared dataset, found some."
            )
        if self.dataset is None and self.split is None:
            raise ValueError("split: expected which of its splits, found none. State it.")
        if self.dataset is not None and self.split is not None:
            raise ValueError(f"split: expected none of a `dataset`, found {self.split}. Remove it.")
        return self


class Mixing(Settings, ABC):
    """How often each training source is drawn from."""

    @abstractmethod
    def weights(self, sources: Sequence[SourceSettings], lengths: Sequence[int]) -> Sequence[int]:
        """Each source's share as an integer, given its number of samples."""


class ProportionalMixing(Mixing):
    """As often as it has samples: every sample of every source exactly once per epoch."""

    kind: Literal["proportional"] = "proportional"

    def weights(self, sources: Sequence[SourceSettings], lengths: Sequence[int]) -> Sequence[int]:
        return lengths


class EqualMixing(Mixing):
    """All sources equally often."""

    kind: Literal["equal"] = "equal"

    def weights(self, sources: Sequence[SourceSettings], lengths: Sequence[int]) -> Sequence[int]:
        return [1] * len(lengths)


class TemperatureMixing(Mixing):
    """In proportion to (number of samples) ** (1 / temperature): 1 is proportional, infinity is equal."""

    kind: Literal["temperature"] = "temperature"
    temperature: Annotated[float, Field(ge=1)] = 2.0

    def weights(self, sources: Sequence[SourceSettings], lengths: Sequence[int]) -> Sequence[int]:
        return integer_weights([length ** (1 / self.temperature) for length in lengths])


class WeightedMixing(Mixing):
    """In proportion to the sources' weights."""

    kind: Literal["weights"] = "weights"

    def weights(self, sources: Sequence[SourceSettings], lengths: Sequence[int]) -> Sequence[int]:
        return integer_weights([source.weight for source in sources if source.weight is not None])


MixingSettings = Annotated[
    ProportionalMixing | EqualMixing | TemperatureMixing | WeightedMixing, Field(discriminator="kind")
]


class UniformSampling(Settings):
    """Every sample as often as its dataset's mixing says."""

    kind: Literal["uniform"] = "uniform"


class ClassBalancedSampling(Settings):
    """Every class of a task equally often: rare classes repeat their samples, frequent ones take turns.

    Samples without a label of the task are not drawn. An epoch is still as many samples as the training
    data has. The samples of a class come in a random order over the whole data: `shuffle_window` has no
    say in it, and reading is not sequential.
    """

    kind: Literal["class_balanced"] = "class_balanced"
    task: str
    """A classification task of the recipe."""


SamplingSettings = Annotated[UniformSampling | ClassBalancedSampling, Field(discriminator="kind")]


class FailOnBadSample(Settings):
    """The first sample that cannot be read or decoded ends the run."""

    kind: Literal["fail"] = "fail"


class SkipBadSamples(Settings):
    """Samples that cannot be read or decoded are masked and counted, up to a fraction of those loaded.

    They stay in their batch as padding, so that every rank keeps its step. The fraction is taken of the
    samples that a rank has loaded, counted in begun thousands (in begun epochs, of a smaller split).
    """

    kind: Literal["skip"] = "skip"
    max_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """More than this fraction ends the run."""


def _blend_of(step: UserTransform) -> BlendSettings:
    """torchvision's MixUp or CutMix as the blend that it is."""
    assert step.blends is not None
    return BlendSettings.model_validate({step.blends: getattr(step, "alpha", 1.0)}, strict=False)


BadSampleSettings = Annotated[FailOnBadSample | SkipBadSamples, Field(discriminator="kind")]


class DataSettings(Settings):
    """Which samples a run sees, in which order, as which images."""

    train: Annotated[tuple[SourceSettings, ...], Field(min_length=1)]
    val: tuple[EvaluationSourceSettings, ...] | None = None
    """What to validate on; by default the `val` splits of the training datasets."""
    test: tuple[EvaluationSourceSettings, ...] | None = None
    """What to test on; by default the `test` splits of the training datasets."""
    derive: dict[str, DeriveSettings] = Field(default_factory=dict)
    """Classification tasks made of a task of the datasets, or of their images."""
    facts: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """By task what its kind has to know and its dataset does not state, or states otherwise, as
    `{face: {swap: [[left_eye, right_eye]]}}`."""
    image_size: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    """The side of a square, or height and width."""
    augment: Preset | AugmentSettings = "standard"
    blend: BlendSettings | None = None
    """Mixup and CutMix: blend pairs of training images, and their labels."""
    transforms: tuple[UserTransform, ...] = ()
    """Steps of the user's after `augment`, by their import paths; they may change the size. torchvision's
    MixUp and CutMix among them are `blend`; steps on whole batches come last."""
    boxes: dict[str, BoxTasks] = Field(default_factory=dict)
    """Boxes by name: the four regression tasks of left, top, right and bottom, which move with the image."""
    resize: Resize = "stretch"
    """How an image that is not cropped at random gets its size: `stretch` ignores its proportions, `crop`
    cuts off what is too long, `pad` adds black where it is too short; `{short_side: 256}` or
    `{crop_fraction: 0.875}` resizes to that short side and cuts out the middle."""
    shuffle_window: ShuffleWindow = 8
    """Shards whose samples are shuffled together: more mixes better, fewer keeps reading nearer to
    sequential. `full` is all of them, `off` keeps the stored order."""
    mixing: MixingSettings = ProportionalMixing()
    sampling: SamplingSettings = UniformSampling()
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes per rank that load data; 0 loads in the training process."""
    cache: CacheSettings | None = None
    """Keep what comes from URLs on the node's own disk; without it every sample is a request."""
    on_bad_sample: BadSampleSettings = FailOnBadSample()

    @model_validator(mode="after")
    def _weights_fit(self) -> DataSettings:
        weighted = [source.weight is not None for source in self.train]
        if self.mixing.kind == "weights" and not all(weighted):
            number = weighted.index(False)
            raise ValueError(
                f"train.{number}.weight: expected a number > 0, found nothing. `mixing: {{kind: weights}}` "
                "needs one for every source."
            )
        if self.mixing.kind != "weights" and any(weighted):
            number = weighted.index(True)
            raise ValueError(
                f"train.{number}.weight: expected none with `mixing: {{kind: {self.mixing.kind}}}`, found "
                f"{self.train[number].weight:g}. Use `mixing: {{kind: weights}}`, or remove it."
            )
        return self

    @model_validator(mode="after")
    def _balancing_is_not_mixing(self) -> DataSettings:
        if self.sampling.kind == "class_balanced" and self.mixing.kind != "proportional":
            raise ValueError(
                f"mixing: expected proportional with class-balanced sampling, found {self.mixing.kind}. "
                "Balancing takes the samples of a class from all sources alike: remove one of the two."
            )
        return self

    @model_validator(mode="after")
    def _streams_are_alone(self) -> DataSettings:
        if any(source.stream for source in self.train):
            if len(self.train) > 1:
                raise ValueError(f"train: expected a stream alone, found it among {len(self.train)} sources.")
            if self.sampling.kind == "class_balanced":
                raise ValueError(
                    "sampling: expected uniform with `stream: true`, whose classes are not known beforehand, "
                    "found class_balanced."
                )
        return self

    @model_validator(mode="after")
    def _batches_come_last(self) -> DataSettings:
        after = [step.blends is not None or step.of_batches for step in self.transforms]
        if after != sorted(after):
            raise ValueError(
                "transforms: expected steps on whole batches after those on images, found "
                f"{self.transforms[after.index(True)].path} before one. Change their order."
            )
        blends = [step for step in self.transforms if step.blends is not None]
        if len(blends) + (self.blend is not None) > 1:
            raise ValueError(
                "transforms: expected one of MixUp, CutMix and data.blend, found several. Where each pair is "
                "to have one of the two: data.blend: {mixup: 0.2, cutmix: 1.0}."
            )
        for step in blends:
            if not step.only_trains:
                raise ValueError(
                    f"transforms: expected training_only with {step.path}, found false. Remove it."
                )
            _blend_of(step)
        return self

    @model_validator(mode="after")
    def _crop_fits(self) -> DataSettings:
        problem = self.resize.problem(self.size) if isinstance(self.resize, CentreCrop) else ""
        if problem:
            raise ValueError(problem)
        return self

    @property
    def stream(self) -> SourceSettings | None:
        """The training source, where it is a stream."""
        return self.train[0] if self.train[0].stream else None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, before steps of the user's."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def augmentation(self) -> AugmentSettings:
        """What `augment` stands for."""
        return self.augment if isinstance(self.augment, AugmentSettings) else PRESETS[self.augment]

    def user_transforms(self, training: bool) -> tuple[ImageTransform, ...]:
        """The user's steps, those for training or those of evaluation and prediction."""
        return tuple(
            step.make()
            for step in self.transforms
            if not isinstance(step, UserBatchTransformSettings)
            and (training or not step.only_trains)
            and step.blends is None
        )

    @property
    def batch_transforms(self) -> tuple[BatchTransform, ...]:
        """The user's steps on whole batches of training."""
        of_batches = [step for step in self.transforms if isinstance(step, UserBatchTransformSettings)]
        return tuple(step.make() for step in of_batches)

    @property
    def blending(self) -> BlendSettings | None:
        """How pairs of training images are blended: as `blend` says, or torchvision's MixUp or CutMix."""
        return next((_blend_of(step) for step in self.transforms if step.blends is not None), self.blend)

    def blend_problem(self, num_classes: Collection[int]) -> str:
        """Why torchvision's MixUp or CutMix does not suit classes of these numbers; nothing where it does."""
        for step in self.transforms:
            stated = getattr(step, "num_classes", None) if step.blends is not None else None
            if stated is not None and stated not in num_classes:
                found = f"found {stated}. Remove it."
                return f"data.transforms: expected num_classes of {step.path} as the data has them, {found}"
        return ""

    def without_augmentation(self) -> DataSettings:
        """The same data, with training images as they are evaluated."""
        kept = tuple(step for step in self.transforms if not step.only_trains)
        return self.model_copy(update={"augment": "none", "blend": None, "transforms": kept})

    def with_absolute_paths(self, base: Path) -> DataSettings:
        """The same data, with the datasets' paths resolved against `base`."""

        def absolute(
            sources: Sequence[SourceSettings] | Sequence[EvaluationSourceSettings] | None,
        ) -> tuple[Settings, ...] | None:
            if sources is None:
                return None
            return tuple(
                s.model_copy(
                    update={
                        name: (base / place).absolute()
                        for name in ("path", "index")
                        if isinstance(place := getattr(s, name, None), Path)
                    }
                    | ({} if s.dataset is None else {"dataset": s.dataset.with_absolute_paths(base)})
                )
                for s in sources
            )

        return self.model_copy(
            update={name: absolute(getattr(self, name)) for name in ("train", "val", "test")}
        )
