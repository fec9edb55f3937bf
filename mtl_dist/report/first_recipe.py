"""A recipe for a dataset, written from what the dataset is; every choice says why."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import yaml

from mtl_dist.data.inspect import Inspection
from mtl_dist.errors import UserError
from mtl_dist.kinds.registry import kind_of
from mtl_dist.plural import plural
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.registry import TASKS

Device: TypeAlias = Literal["cpu", "gpu"]

WANTED_STEPS = {"cpu": 1500, "gpu": 8000}
"""Optimizer steps in which a network from random weights learns something: minutes, or an hour."""
MOST_EPOCHS = 60
LARGEST_SIDE = {"cpu": 96, "gpu": 224}
SMALL_SIDE = 64
"""Up to this side pictures are for a network that keeps their resolution longer."""
STRIDE = 32
FEW_TO_MEASURE = 200
"""Samples of val below which a recipe says how uncertain a result on them is: an accuracy by 0.07 or more."""
NORMAL_95 = 1.96
"""Deviations of a normal distribution that 95 of 100 lie within."""

_PIXELS = re.compile(r"(?<![a-z])(px|pixels?)(?![a-z])")
"""In a unit: lengths and areas in the picture, which grow when it is enlarged."""


def first_recipe(inspection: Inspection, device: Device) -> str:
    """The text of a recipe for the dataset, to be trained on `device`.

    Raises:
        UserError: it has no task of which something can be learnt.
    """
    manifest = inspection.manifest
    reasons = {name: _nothing_to_learn(info) for name, info in manifest.tasks.items()}
    if all(reasons.values()):
        found = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "no task"
        raise UserError(
            f"{inspection.directory}: expected a task of which something can be learnt, found {found}. "
            "Prepare the data again with all its labels."
        )
    train = "train" if "train" in manifest.splits else next(iter(manifest.splits))
    num_samples = manifest.splits[train].num_samples
    has_map = any(kind_of(info.kind).is_map for info in manifest.tasks.values())
    lines = [
        f"# {manifest.name or inspection.directory}: {num_samples:,} samples to train on, "
        f"{', '.join(manifest.tasks)}. Written for a {device.upper()}.",
        "tasks:",
    ]
    for name, info in manifest.tasks.items():
        lines += _task_lines(name, info, manifest.splits[train].labels[name].missing)
    lines.append("data:")
    where = {"path": str(inspection.directory)} | ({} if train == "train" else {"split": train})
    lines.append(f"  train: [{_flow(where)}]")
    if "val" not in manifest.splits:
        lines += [
            "  # There is no split `val`: how good the weights are, nobody will know. Prepare the data again",
            "  # with --val 0.2.",
        ]
    elif (num_val := manifest.splits["val"].num_samples) < FEW_TO_MEASURE:
        uncertain = NORMAL_95 * math.sqrt(0.25 / max(1, num_val))
        lines.append(
            f"  # val has {num_val} samples: what is measured on them is uncertain, an accuracy by up to "
            f"{uncertain:.2f}."
        )
    side, why = _side(inspection.image_sizes.get(train, []), device)
    lines.append(f"  image_size: {side}  # {why}")
    augment, why = _augment(manifest.channels, side, manifest.tasks)
    lines.append(f"  augment: {augment}  # {why}")
    backbone, why = _backbone(side, num_samples, device)
    lines += ["model:", f"  backbone: {backbone}  # {why}"]
    if backbone != "simple_cnn" and manifest.channels == 3:
        lines.append("  # weights: torchvision  # published ones, where they can be downloaded: far better")
    if has_map and side >= 2 * SMALL_SIDE:
        lines.append("  decoder: {output_stride: 2}  # maps at half the resolution, in a quarter of the work")
    batch = _batch(num_samples, device)
    per_epoch = math.ceil(num_samples / batch)
    epochs = max(3, min(MOST_EPOCHS, round(WANTED_STEPS[device] / per_epoch)))
    lines += [
        f"optim: {{lr: 1.0e-3, warmup_steps: {min(100, per_epoch)}}}  # AdamW; then down by a cosine",
        "train:",
        f"  global_batch: {batch}  # {per_epoch:,} steps an epoch",
        f"  epochs: {epochs}  # {epochs * per_epoch:,} steps in all",
    ]
    if device == "gpu":
        lines.append("  precision: bf16")
    return "\n".join(lines) + "\n"


def _task_lines(name: str, info: TaskInfo, missing: int) -> list[str]:
    settings = TASKS.get(info.kind)  # a kind of the user's has its defaults
    changes, why = settings.suited_to(info) if settings else ({}, "")
    if nothing := _nothing_to_learn(info):
        return [f"  # {_flow(name)} is left out: {nothing}"]
    facts = [f"{plural(info.num_labelled, 'label')}" + (f", {missing:,} missing" if missing else "")]
    if info.classes:
        facts.append(plural(len(info.classes), *kind_of(info.kind).class_words))
    elif kind_of(info.kind).has_values:
        facts.append(f"{info.mean:.3g} ± {info.spread:.2g} {info.unit}".rstrip())
    line = f"  {_flow(name)}: {_flow({'kind': info.kind} | changes)}  # {', '.join(facts)}"
    return [f"  # {why}:", line] if why else [line]


def _nothing_to_learn(info: TaskInfo) -> str:
    """Why nothing can be learnt of the task's labels; empty where something can."""
    kind = kind_of(info.kind)
    if not info.num_labelled:
        return "it has no label to train on"
    there = [name for name, count in zip(info.classes, info.class_counts, strict=False) if count]
    if kind.is_one_class and len(there) == 1:
        return f"every label is {_flow(there[0])}"
    if kind.is_number and info.spread == 0:
        return f"every label is {info.mean:.3g}"
    return ""


def _side(sizes: Sequence[tuple[int, int]], device: Device) -> tuple[int, str]:
    """The side of training images, and why."""
    shortest = int(statistics.median(min(size) for size in sizes)) if sizes else LARGEST_SIDE[device]
    largest = LARGEST_SIDE[device]
    typical = f"the shorter side of pictures is typically {shortest} pixels"
    if shortest > largest:
        return largest, f"{typical}; this is what a {device.upper()} takes in good time"
    side = max(STRIDE, STRIDE * round(shortest / STRIDE))
    return side, typical + ("" if side == shortest else f"; a multiple of {STRIDE}")


def _augment(channels: int, side: int, tasks: Mapping[str, TaskInfo]) -> tuple[str, str]:
    if channels == 1 and side <= SMALL_SIDE:
        return (
            "{translate: 0.08, rotate: 8}",
            "small grey pictures may be signs, which mirroring would change",
        )
    lengths = [name for name, info in tasks.items() if _is_in_pixels(info)]
    if lengths:
        return (
            "{flip: true, brightness: 0.2, contrast: 0.2}",
            f"no crops and no zoom, which would change {' and '.join(lengths)} in pixels; flip: false where "
            "left and right differ, or a label is a place",
        )
    return (
        "standard",
        "crops of half the picture and more, enlarged and mirrored; say none where left and right differ, or "
        "a label is a size",
    )


def _is_in_pixels(info: TaskInfo) -> bool:
    """Whether labels that are numbers, and stay as they are when the image is enlarged, are lengths in it."""
    return not kind_of(info.kind).is_map and bool(_PIXELS.search(info.unit.casefold()))


def _backbone(side: int, num_samples: int, device: Device) -> tuple[str, str]:
    if side <= SMALL_SIDE and device == "cpu":
        return "simple_cnn", f"small enough for a CPU, and for pictures of {side} pixels"
    if num_samples > 5000 and device == "gpu":
        return "resnet50", f"{num_samples:,} samples can fill it"
    return "resnet18", f"{num_samples:,} samples: a larger one would learn them by heart"


def _batch(num_samples: int, device: Device) -> int:
    """A power of 2 with at least 20 steps an epoch, between 8 and what is usual."""
    most = 32 if device == "cpu" else 64
    return max(8, min(most, 2 ** int(math.log2(max(8, num_samples / 20)))))


def _flow(value: Any) -> str:
    """A value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")
