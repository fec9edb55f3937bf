"""What a recipe may say under `model:`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, JsonValue, field_validator, model_validator

from mtl_dist.config.nearest import nearest
from mtl_dist.config.settings import Settings
from mtl_dist.config.user_defined import UserDefined, UserDefinedSettings
from mtl_dist.models.decoders import DECODERS
from mtl_dist.models.sharing import SHARINGS
from mtl_dist.models.torchvision_names import torchvision_names

Width: TypeAlias = Annotated[int, Field(ge=1)]
Dropout: TypeAlias = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat: TypeAlias = Annotated[float, Field(gt=0.0)]

SIMPLE_CNN = "simple_cnn"
TIMM = "timm/"
"""How the name of a network of timm begins."""

NormKind: TypeAlias = Literal["batch", "group", "frozen", "sync"]
"""BatchNorm as it is; GroupNorm in its place; BatchNorm with fixed statistics and weights; SyncBatchNorm."""

DecoderNorm: TypeAlias = Literal["batch", "group"]
Checkpointing: TypeAlias = Literal["off", "stage", "block"]


class HeadSettings(Settings):
    """The head of a vector task: hidden layers (none: a linear head) between pooling and output."""

    hidden: tuple[Width, ...] = ()
    """The widths of the hidden layers."""
    dropout: Dropout = 0.0
    """What share of the numbers that enter a layer is dropped in training."""


OwnDecoder: TypeAlias = Annotated[
    Literal["unet"],
    Field(description=f"Others are {', '.join(DECODERS)}, or an import path.", examples=list(DECODERS)),
]


class DecoderSettings(Settings):
    """The head of a map task: the U-Net decoder.

    channels       one number per level; each level doubles the resolution, starting at the backbone's
                   deepest map. None: from the deepest map's channels, halved per level, to stride 2 (to
                   stride 1 where the backbone has a map at full resolution and `output_stride` is 1).
    skips          concatenate the backbone's map at each level
    output_stride  1: the map has the image's size; 2: half of it
    norm           None: as `model.norm` says, and GroupNorm where that is frozen
    """

    kind: OwnDecoder = "unet"
    channels: Annotated[tuple[Width, ...], Field(min_length=1)] | None = None
    skips: bool = True
    output_stride: Literal[1, 2] = 1
    norm: DecoderNorm | None = None


class TaskHeadSettings(Settings):
    """What one task changes in `model.head` (vector tasks: hidden, dropout) or in `model.decoder` (map tasks:
    channels, skips, output_stride, norm), or `kind: unet` of its own where `model.decoder` is another."""

    kind: OwnDecoder | None = None
    hidden: tuple[Width, ...] | None = None
    dropout: Dropout | None = None
    channels: Annotated[tuple[Width, ...], Field(min_length=1)] | None = None
    skips: bool | None = None
    output_stride: Literal[1, 2] | None = None
    norm: DecoderNorm | None = None


class UserHeadSettings(UserDefinedSettings):
    """A head of the user's, or a decoder of the package; its constructor may ask for

    num_outputs   what the task wants: the channels of the output
    num_features  of a vector task: the size D of the vector (B, D) that it is called with
    channels      of a map task: by stride, the channels of the maps that it is called with as
                  {stride: (B, D, H, W)}, together with the image's size (H, W)
    blocks        of a map task: what a plain ViT of timm gives of its blocks, None of another backbone
    head_norm     batch or group, as `model.norm` says
    """

    part_base = "torch.nn.Module"
    provides = ("num_outputs", "num_features", "channels", "blocks", "head_norm")


Decoder: TypeAlias = Annotated[
    DecoderSettings, UserDefined((UserHeadSettings,), names=DECODERS, bare={"unet": DecoderSettings})
]
TaskHead: TypeAlias = Annotated[
    TaskHeadSettings,
    UserDefined((UserHeadSettings,), names=DECODERS, bare={"unet": lambda: TaskHeadSettings(kind="unet")}),
]


class UserBackboneSettings(UserDefinedSettings):
    """A network of the user's without classifier; its constructor may ask for `in_channels`, and for
    `image_size` (H, W) if it takes only that size."""

    part_base = "torch.nn.Module"
    provides = ("in_channels", "image_size")


class UserSharingSettings(UserDefinedSettings):
    """A way of sharing, of the package or of the user's; its constructor asks for `blueprint`, of which
    backbones and heads are made."""

    part_base = "mtl_dist.models.multitask.MultitaskModel"
    provides = ("blueprint",)


class UserNetworkSettings(UserDefinedSettings):
    """A whole model of the user's, from images to an output per task; its constructor may ask for
    `in_channels`, `image_size` (H, W), and `outputs`, by task the channels of its output."""

    part_base = "torch.nn.Module"
    provides = ("in_channels", "image_size", "outputs")


UserNetwork: TypeAlias = Annotated[UserNetworkSettings, UserDefined((UserNetworkSettings,), only=True)]


class TimmSettings(Settings):
    """A backbone of timm.

    arguments   what its constructor takes besides size and channels: {drop_path_rate: 0.1}
    blocks      of a plain ViT: the block, counted from 1, that its maps come from (None: the last), or one
                for each of them, the finest first
    """

    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    blocks: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None = None


class AdapterSettings(Settings):
    """What trains of a backbone that is frozen (extra `adapters`).

    kind      low-rank updates beside the weights (Hu et al. 2021): (alpha / rank) B A x, where A and B train
    rank      of the updates
    alpha     their scale
    dropout   of single values before them, in training
    targets   the layers, by the last words of their names: [qkv, proj]. None: all linear layers, or all
              convolutions of one group, of whichever the backbone has more
    per_task  an adapter for each task, for which the backbone then runs once; nothing is shared but what is
              frozen
    """

    kind: Literal["lora"] = "lora"
    rank: Width = 8
    alpha: PositiveFloat = 16.0
    dropout: Dropout = 0.0
    targets: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = None
    per_task: bool = False


def unknown_backbone(name: str, known: Sequence[str]) -> str:
    """What to say of the name of a backbone that is neither of the package nor among those `known` of
    torchvision; empty where it is one."""
    names = [SIMPLE_CNN, *known]
    if name in names:
        return ""
    near = nearest(name, names)
    hint = f"Did you mean {near}?" if near else f"Choose one of: {', '.join(names)}."
    return f"expected simple_cnn, a torchvision classifier or {TIMM}NAME, found {name!r}. {hint}"


class ModelSettings(Settings):
    """The model: a backbone, shared by all tasks or one per task, and a head per task.

    backbone       `simple_cnn`, a torchvision classification model by its name, one of timm as `timm/NAME`
                   (extra `timm`), or a network of the user's by its import path
    timm           more about one of timm
    sharing        what the tasks share: `hard`, one backbone for all; `separate`, a backbone for each;
                   `cross_stitch`, `mtan`, `mmoe` (models/sharing); or a way of the user's by import path
    weights        None; "torchvision" or "timm" for the default weights of its registry; or a file (.pth,
                   .safetensors) with the names of the whole model there, or that of a run with this
                   backbone: RUN/checkpoints/STEP/model.safetensors
    frozen         the backbone keeps its weights, its normalisation in evaluation mode; heads train
    adapter        the same, and low-rank updates of the backbone's layers train with the heads
    norm           what becomes of the backbone's BatchNorm layers
    output_stride  of the backbone's deepest map: a convolutional one is dilated to it, as DeepLab has it
                   (torchvision's resnet50 and larger and mobilenet_v3; of timm what takes `output_stride`)
    checkpointing  recompute backbone and decoders in the backward pass, a stage or a block at a time
    normalise      `published`: by what the backbone's published weights expect for three channels
                   (ImageNet's), 127.5 and 127.5 otherwise; `data`: by mean and deviation of the training
                   images, as their preparation measured them; `auto`: `published` for 8-bit pictures of
                   three channels, else `data`, where it was measured
    mean, std      in place of these: per channel, in the images' own units (0 to 255 for 8-bit ones); one
                   value is for all channels
    head           for all vector tasks
    decoder        for all map tasks: `unet`, another one by its short name, or one of the user's by its
                   import path
    heads          by task: what it changes in them, or a head or decoder of its own
    network        in place of backbone, head, decoder and heads: a whole model of the user's
    """

    backbone: Annotated[str, UserDefined((UserBackboneSettings,))] = "resnet18"
    timm: TimmSettings = TimmSettings()
    sharing: Annotated[Literal["hard"], UserDefined((UserSharingSettings,), names=SHARINGS)] = "hard"
    weights: str | None = None
    frozen: bool = False
    adapter: AdapterSettings | None = None
    norm: NormKind = "batch"
    output_stride: Literal[8, 16] | None = None
    checkpointing: Checkpointing = "off"
    normalise: Literal["auto", "published", "data"] = "auto"
    mean: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    std: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] | None = None
    head: HeadSettings = HeadSettings()
    decoder: Decoder = DecoderSettings()
    heads: dict[str, TaskHead] = Field(default_factory=dict)
    network: UserNetwork | None = None

    @model_validator(mode="after")
    def _network_is_whole(self) -> ModelSettings:
        if self.network is None:
            return self
        defaults = type(self).model_construct()
        for name in type(self).model_fields:
            kept = name in ("network", "normalise", "mean", "std")
            if not kept and getattr(self, name) != getattr(defaults, name):
                raise ValueError(
                    f"{name}: expected none with model.network, which is the whole model. Remove it."
                )
        return self

    @model_validator(mode="after")
    def _timm_is_of_timm(self) -> ModelSettings:
        of_timm = self.network is None and self.user_backbone is None and self.backbone.startswith(TIMM)
        if not of_timm and self.timm != TimmSettings():
            raise ValueError(f"timm: expected none with {self.backbone_name}, found some. Remove it.")
        if not of_timm and self.weights == "timm":
            raise ValueError(
                f"weights: expected torchvision, a file or null with {self.backbone_name}, found timm."
            )
        if of_timm and self.weights == "torchvision":
            raise ValueError(
                f"weights: expected timm, a file or null with {self.backbone}, found torchvision."
            )
        return self

    @field_validator("sharing", mode="before")
    @classmethod
    def _hard_has_no_settings(cls, sharing: object) -> object:
        if not isinstance(sharing, dict) or sharing.get("kind") != "hard":
            return sharing
        others = [str(name) for name in sharing if name != "kind"]
        if others:
            raise ValueError(f"expected no settings of hard, found {', '.join(others)}. Leave them out.")
        return "hard"

    @model_validator(mode="after")
    def _adapter_fits(self) -> ModelSettings:
        if self.adapter is not None and self.user_sharing is not None:
            raise ValueError(
                f"sharing: expected hard with model.adapter, found {self.sharing_name}. Remove it; "
                "model.adapter.per_task gives each task an adapter of its own."
            )
        return self

    @model_validator(mode="after")
    def _can_be_dilated(self) -> ModelSettings:
        if self.output_stride is not None and (
            self.user_backbone is not None or self.backbone == "simple_cnn"
        ):
            raise ValueError(
                f"output_stride: expected none with {self.backbone_name}, found {self.output_stride}. Remove "
                "it: it is for networks of torchvision and timm."
            )
        return self

    @property
    def backbone_problem(self) -> str:
        """What is wrong with the name of a backbone of torchvision, as far as its files say; else empty."""
        if self.network is not None or self.user_backbone is not None or self.backbone.startswith(TIMM):
            return ""
        known = torchvision_names()
        return unknown_backbone(self.backbone, known) if known else ""

    @property
    def user_backbone(self) -> UserBackboneSettings | None:
        """The user's network, where `backbone` is one."""
        backbone: object = self.backbone
        return backbone if isinstance(backbone, UserBackboneSettings) else None

    @property
    def user_sharing(self) -> UserSharingSettings | None:
        """The way of sharing, where it is not `hard`."""
        sharing: object = self.sharing
        return sharing if isinstance(sharing, UserSharingSettings) else None

    @property
    def sharing_name(self) -> str:
        """The way of sharing, as a recipe names it."""
        if self.user_sharing is None:
            return "hard"
        short = {path: name for name, path in SHARINGS.items()}
        return short.get(self.user_sharing.path, self.user_sharing.path)

    @property
    def made_norm(self) -> DecoderNorm:
        """The normalisation of what is made beside the backbone, a decoder or what tasks share."""
        return "group" if self.norm in ("group", "frozen") else "batch"

    @property
    def backbone_name(self) -> str:
        """What the backbone, or the whole model, is called."""
        if self.network is not None:
            return self.network.path
        return self.backbone if self.user_backbone is None else self.user_backbone.path
