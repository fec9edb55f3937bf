"""Normalisation layers: made by kind, and converted in a model that stands."""

from __future__ import annotations

from torch import Tensor, nn

from mtl_dist.models.settings import DecoderNorm, NormKind

GROUP_WIDTH = 16
"""Channels per group, at least. GroupNorm's paper (1803.08494) finds 16 as good as 32 groups; groups of one
or two channels would erase the 1x1 maps that small images end in."""


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with fixed statistics and weights, under the same names as BatchNorm's.

    Unlike torchvision's it stays one fused kernel that keeps the input's type under autocast.
    """

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        super().train(False)
        return self


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with the smallest groups of at least `GROUP_WIDTH` channels that divide `channels`."""
    width = next((w for w in range(GROUP_WIDTH, channels) if channels % w == 0), channels)
    return nn.GroupNorm(channels // width, channels)


def make_norm(kind: DecoderNorm, channels: int) -> nn.Module:
    """A normalisation layer over `channels` channels."""
    return nn.BatchNorm2d(channels) if kind == "batch" else group_norm(channels)


def convert_norms(module: nn.Module, kind: NormKind) -> None:
    """Replace every BatchNorm2d inside `module`, keeping its weight and bias.

    GroupNorm has no running statistics, so pretrained ones are lost: weights then need training.
    """
    if kind == "batch":
        return
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _and_after(_converted(child, kind), child))
        else:
            convert_norms(child, kind)


def _and_after(converted: nn.Module, norm: nn.BatchNorm2d) -> nn.Module:
    """A converted norm with what the original did after it: timm's have an activation inside."""
    after = [part for part in norm.children() if not isinstance(part, nn.Identity)]
    if after:
        converted.after = nn.Sequential(*after)
        converted.register_forward_hook(_run_after)
    return converted


def _run_after(norm: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    result: Tensor = norm.after(output)  # type: ignore[operator]
    return result


def _converted(norm: nn.BatchNorm2d, kind: NormKind) -> nn.Module:
    if kind == "sync":
        return nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    if kind == "group":
        group = group_norm(norm.num_features)
        group.eps = norm.eps
        group.weight, group.bias = norm.weight, norm.bias
        return group
    frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps, momentum=norm.momentum)
    frozen.weight, frozen.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers():
        frozen.register_buffer(name, buffer)
    return frozen.requires_grad_(False).eval()
