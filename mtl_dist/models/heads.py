"""Heads: what turns a backbone's features into one task's output.

Shape legend: batch.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor, nn

from mtl_dist.errors import UserError
from mtl_dist.models.decoders.unet import UNetDecoder, plan_decoder
from mtl_dist.models.features import map_key
from mtl_dist.models.settings import (
    DecoderNorm,
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
        source = features[self.reads[0]]
        vector_BD = source.mean(dim=(2, 3)) if source.dim() == 4 else source
        for layer in self.hidden:
            vector_BD = self.dropout(self.activation(layer(vector_BD)))
        return self.output(vector_BD if self.hidden else self.dropout(vector_BD))


class UserHead(nn.Module):
    """A head of the user's, over the vector of a vector task or over all maps of a map task; or a decoder."""

    def __init__(self, module: nn.Module, source: str, strides: Collection[int], spec: HeadSpec) -> None:
        super().__init__()
        self.module = module
        self._strides = tuple(sorted(strides)) if spec.layout == "map" else ()
        self._spec = spec
        self.reads = tuple(map_key(stride) for stride in self._strides) or (source,)

    def forward(self, features: Mapping[str, Tensor], image_size: tuple[int, int]) -> Tensor:
        """The output (B, C) or (B, C, h, w)."""
        if self._strides:
            maps = {stride: features[map_key(stride)] for stride in self._strides}
            output = self.module(maps, image_size)
        else:
            source = features[self.reads[0]]
            output = self.module(source.mean(dim=(2, 3)) if source.dim() == 4 else source)
        rank, wanted = (4, "(B, {}, h, w)") if self._strides else (2, "(B, {})")
        if output.dim() != rank or output.shape[1] != self._spec.num_outputs:
            raise UserError(
                f"model.heads.{self._spec.task}: expected an output {wanted.format(self._spec.num_outputs)}, "
                f"found {tuple(output.shape)}. The constructor's num_outputs says how many the task wants."
            )
        return output


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
        if layouts[task] == "map" and isinstance(chosen_decoder(settings, task), UserHeadSettings):
            problems.append(
                f"model.heads.{task}: expected a decoder of its own (kind: ...), as model.decoder is not "
                f"unet, found options of unet ({', '.join(sorted(own.model_fields_set))}). State its kind."
            )
            continue
        allowed = HeadSettings if layouts[task] == "vector" else DecoderSettings
        options = [option for option in allowed.model_fields if option in TaskHeadSettings.model_fields]
        for option in sorted(own.model_fields_set - set(options)):
            problems.append(
                f"model.heads.{task}.{option}: expected an option of a {layouts[task]} head "
                f"({', '.join(options)}), found {option!r}. Remove it."
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
    decoder: object = settings.decoder
    for choice in (own, decoder):
        if isinstance(choice, UserHeadSettings):
            return choice
    return settings.decoder.model_copy(update=_own(settings, task))


def used_strides(settings: ModelSettings, spec: HeadSpec, channels: Mapping[int, int]) -> set[int]:
    """The strides of the maps that the task's head reads; none for a vector head."""
    if spec.layout == "vector":
        return set()
    decoder = chosen_decoder(settings, spec.task)
    if isinstance(decoder, UserHeadSettings):
        return _read_by(decoder, channels)
    return plan_decoder(decoder, channels, spec.task).strides


def _read_by(decoder: UserHeadSettings, channels: Mapping[int, int]) -> set[int]:
    """The strides of the maps that a decoder is given: what its class says (`used_strides`), or all."""
    used = getattr(decoder.part_class, "used_strides", None)
    return set(channels if used is None else used(channels))


def build_head(
    settings: ModelSettings,
    spec: HeadSpec,
    channels: Mapping[int, int],
    vector_size: int,
    vector_name: str,
) -> Head:
    """The head of one task over maps of `channels` by stride, and a vector that comes as `vector_name`."""
    if spec.layout == "map":
        chosen: object = chosen_decoder(settings, spec.task)
    else:
        chosen = settings.heads.get(spec.task)
    if isinstance(chosen, UserHeadSettings):
        facts = {"num_features": vector_size, "channels": dict(channels)}
        module = chosen.make(num_outputs=spec.num_outputs, **facts)
        return UserHead(module, vector_name, _read_by(chosen, channels), spec)
    if isinstance(chosen, DecoderSettings):
        plan = plan_decoder(chosen, channels, spec.task)
        norm: DecoderNorm = "group" if settings.norm in ("group", "frozen") else "batch"
        return UNetDecoder(plan, chosen.output_stride, chosen.norm or norm, spec.num_outputs)
    own = head_settings(settings, spec.task)
    return VectorHead(vector_name, vector_size, own, spec.num_outputs)


def _own(settings: ModelSettings, task: str) -> dict[str, object]:
    own = settings.heads.get(task)
    return {} if own is None else own.model_dump(exclude_none=True)
