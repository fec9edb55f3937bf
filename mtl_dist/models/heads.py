"""Heads: what turns a backbone's features into one task's output.

Shape legend: batch.py.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

from mtl_dist.config.user_defined import imported
from mtl_dist.errors import UserError
from mtl_dist.models.checkpointing import recompute_decoder
from mtl_dist.models.decoders import DECODERS
from mtl_dist.models.decoders.unet import UNetDecoder, plan_decoder
from mtl_dist.models.features import Blocks, Wanted, map_key, prefix_key
from mtl_dist.models.settings import (
    DecoderSettings,
    HeadSettings,
    ModelSettings,
    TaskHeadSettings,
    UserHeadSettings,
)
from mtl_dist.specs import HeadSpec


class VectorHead(nn.Module):
    """Hidden layers with ReLU and dropout, then the output layer, over the vector.

    The vector is the feature named `source`, or the mean over it where that is a map.
    """

    def __init__(self, source: str, num_features: int, settings: HeadSettings, num_outputs: int) -> None:
        super().__init__()
        self.reads = (source,)
        widths = [num_features, *settings.hidden]
        self.hidden = nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(widths))
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(settings.dropout)
        self.output = nn.Linear(widths[-1], num_outputs)

    def forward(self, features: Mapping[str, Tensor], image_size: tuple[int, int]) -> Tensor:
        """The output (B, C)."""
        vector_BD = _vector(self.reads[0], features)
        for layer in self.hidden:
            vector_BD = self.dropout(self.activation(layer(vector_BD)))
        return self.output(vector_BD if self.hidden else self.dropout(vector_BD))


class UserHead(nn.Module):
    """A head of the user's or a decoder of the package.

    Args:
        module: takes what `arrange` makes of the features; of a map task also the image's size (H, W)
        reads: the names of the features
        arrange: from all features
    """

    def __init__(
        self,
        module: nn.Module,
        reads: Sequence[str],
        arrange: Callable[[Mapping[str, Tensor]], Any],
        spec: HeadSpec,
    ) -> None:
        super().__init__()
        self.module = module
        self.reads = tuple(reads)
        self._arrange, self._spec = arrange, spec

    @property
    def remark(self) -> str:
        """What its module has to say of the features that it reads, in a line; nothing if none."""
        return str(getattr(self.module, "remark", ""))

    def forward(self, features: Mapping[str, Tensor], image_size: tuple[int, int]) -> Tensor:
        """The output (B, C) or (B, C, h, w)."""
        given, is_map = self._arrange(features), self._spec.layout == "map"
        output = self.module(given, image_size) if is_map else self.module(given)
        rank, wanted = (4, "(B, {}, h, w)") if is_map else (2, "(B, {})")
        if output.dim() != rank or output.shape[1] != self._spec.num_outputs:
            raise UserError(
                f"model.heads.{self._spec.task}: expected an output {wanted.format(self._spec.num_outputs)}, "
                f"found {tuple(output.shape)}. The constructor's num_outputs says how many the task wants."
            )
        return output


def _vector(source: str, features: Mapping[str, Tensor]) -> Tensor:
    feature = features[source]
    return feature.mean(dim=(2, 3)) if feature.dim() == 4 else feature


def _by_stride(strides: Sequence[int], features: Mapping[str, Tensor]) -> dict[int, Tensor]:
    return {stride: features[map_key(stride)] for stride in strides}


def _by_block(
    names: Sequence[tuple[str, str | None]], features: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor | None]]:
    return [(features[own], None if before is None else features[before]) for own, before in names]


Head: TypeAlias = VectorHead | UNetDecoder | UserHead
"""Its `reads` are the names of the features that it reads."""


def check_heads(settings: ModelSettings, specs: Sequence[HeadSpec]) -> None:
    """Hold `model.heads` against the tasks.

    Raises:
        UserError: a task that isn't there, or an option of the other kind of head; a line for each.
    """
    layouts = {spec.task: spec.layout for spec in specs}
    problems = []
    for task, own in settings.heads.items():
        if task not in layouts:
            problems.append(
                f"model.heads.{task}: expected one of the tasks {', '.join(layouts)}, found {task!r}. "
                "Correct the name or remove it."
            )
            continue
        if isinstance(own, UserHeadSettings):
            problems += _own_problems(own, layouts[task], f"model.heads.{task}")
            continue
        # Not which were stated: the recipe of a run states all, those that are not meant as null.
        options = {option for option in TaskHeadSettings.model_fields if getattr(own, option) is not None}
        is_map = layouts[task] == "map"
        if is_map and options and isinstance(chosen_decoder(settings, task), UserHeadSettings):
            problems.append(
                f"model.heads.{task}: expected a decoder of its own (kind: ...), as model.decoder is not "
                f"unet, found options of unet ({', '.join(sorted(options))}). State its kind."
            )
            continue
        allowed = DecoderSettings if is_map else HeadSettings
        known = [option for option in allowed.model_fields if option in TaskHeadSettings.model_fields]
        for option in sorted(options - set(known)):
            problems.append(
                f"model.heads.{task}.{option}: expected an option of a {layouts[task]} head "
                f"({', '.join(known)}), found {option!r}. Remove it."
            )
    if problems:
        raise UserError("\n".join(problems))


def _own_problems(own: UserHeadSettings, layout: str, where: str) -> list[str]:
    other = "channels" if layout == "vector" else "num_features"
    given = "num_features" if layout == "vector" else "channels"
    if other not in own.arguments:
        return []
    return [f"{where}.kind: expected {given} in place of {other}, as the head is of a {layout} task."]


def head_settings(settings: ModelSettings, task: str) -> HeadSettings:
    """`model.head` with what `model.heads` says of this vector task."""
    return settings.head.model_copy(update=_own(settings, task))


def chosen_decoder(settings: ModelSettings, task: str) -> DecoderSettings | UserHeadSettings:
    """The decoder of this map task: `model.decoder` with what `model.heads` says, or its own."""
    own: object = settings.heads.get(task)
    if isinstance(own, UserHeadSettings):
        return own
    decoder: object = settings.decoder
    if isinstance(decoder, UserHeadSettings):
        has_kind = isinstance(own, TaskHeadSettings) and own.kind is not None
        return DecoderSettings().model_copy(update=_own(settings, task)) if has_kind else decoder
    return settings.decoder.model_copy(update=_own(settings, task))


def wanted_maps(
    settings: ModelSettings, spec: HeadSpec, channels: Mapping[int, int], blocks: Blocks | None = None
) -> Wanted:
    """The maps that the task's head reads, of those of `channels` by stride; none for a vector head.

    Args:
        blocks: what there is of a plain ViT's blocks

    Raises:
        UserError: the decoder does not fit the network.
    """
    if spec.layout == "vector":
        return Wanted()
    decoder = chosen_decoder(settings, spec.task)
    if not isinstance(decoder, UserHeadSettings):
        return Wanted(frozenset(plan_decoder(decoder, channels, spec.task).strides))
    if not _reads_blocks(decoder.part_class):
        return Wanted(frozenset(_strides_of(decoder, channels)))
    own_blocks, (numbers, with_prefix) = _blocks_of(decoder, blocks, settings)
    last = own_blocks.own_stride_from
    others = frozenset(number for number in numbers if number != last)
    own = frozenset({own_blocks.stride} if last in numbers else ())
    return Wanted(own, others, frozenset(numbers if with_prefix else ()))


def _strides_of(decoder: UserHeadSettings, channels: Mapping[int, int]) -> list[int]:
    """The strides of the maps that a decoder is given: what its class says (`used_strides`), or all."""
    used = getattr(decoder.part_class, "used_strides", None)
    return sorted(channels if used is None else used(channels))


def _reads_blocks(part: type) -> bool:
    return hasattr(part, "used_blocks")


def _blocks_of(
    decoder: UserHeadSettings, blocks: Blocks | None, settings: ModelSettings
) -> tuple[Blocks, tuple[list[int], bool]]:
    """What there is of a plain ViT's blocks, and what the decoder's class says it reads (`used_blocks`)."""
    if blocks is None:
        others = [kind for kind, path in DECODERS.items() if not _reads_blocks(imported(path))]
        shares = "" if settings.user_sharing is None else f" with model.sharing {settings.sharing_name}"
        kind = getattr(decoder, "kind")  # noqa: B009  (a field of the derived settings)
        raise UserError(
            f"model.decoder: expected a plain ViT of timm (timm/vit_...), whose blocks {kind} reads, found "
            f"{settings.backbone_name}{shares}. Use unet, {', '.join(others[:-1])} or {others[-1]}."
        )
    used = decoder.part_class.used_blocks
    asked = [name for name in inspect.signature(used).parameters if name in type(decoder).model_fields]
    return blocks, used(blocks, **{name: getattr(decoder, name) for name in asked})


def build_head(
    settings: ModelSettings,
    spec: HeadSpec,
    channels: Mapping[int, int],
    vector_size: int,
    vector_name: str,
    blocks: Blocks | None = None,
) -> Head:
    """The head of one task over maps of `channels` by stride, or of a plain ViT's `blocks`, and a vector that
    comes as `vector_name`."""
    norm = settings.made_norm
    if spec.layout == "vector":
        own: object = settings.heads.get(spec.task)
        if isinstance(own, UserHeadSettings):
            module = own.make(num_outputs=spec.num_outputs, num_features=vector_size, head_norm=norm)
            return UserHead(module, [vector_name], partial(_vector, vector_name), spec)
        return VectorHead(vector_name, vector_size, head_settings(settings, spec.task), spec.num_outputs)
    chosen = chosen_decoder(settings, spec.task)
    if isinstance(chosen, DecoderSettings):
        plan = plan_decoder(chosen, channels, spec.task)
        unet = UNetDecoder(plan, chosen.output_stride, chosen.norm or norm, spec.num_outputs)
        recompute_decoder(unet, settings.checkpointing)
        return unet
    if _reads_blocks(chosen.part_class):
        blocks, (numbers, with_prefix) = _blocks_of(chosen, blocks, settings)
        pairs = [(blocks.name(number), prefix_key(number) if with_prefix else None) for number in numbers]
        reads = [name for pair in pairs for name in pair if name is not None]
        arrange: Callable[[Mapping[str, Tensor]], Any] = partial(_by_block, pairs)
    else:
        strides = _strides_of(chosen, channels)
        reads, arrange = [map_key(stride) for stride in strides], partial(_by_stride, strides)
    module = chosen.make(num_outputs=spec.num_outputs, channels=dict(channels), blocks=blocks, head_norm=norm)
    recompute_decoder(module, settings.checkpointing)
    return UserHead(module, reads, arrange, spec)


def _own(settings: ModelSettings, task: str) -> dict[str, object]:
    own = settings.heads.get(task)
    return {} if own is None else own.model_dump(exclude_none=True)
