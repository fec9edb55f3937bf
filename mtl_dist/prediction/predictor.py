"""Prediction: a trained run applied to images.

import mtl_dist

predictor = mtl_dist.load("runs/skin/20260101-120000-ab12")
predictor.predict("photo.jpg")["diagnosis"]["class_name"]

Any number of threads may use one predictor: nothing of it changes after it is loaded.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mtl_dist.assemble import WhichCheckpoint, read_trained
from mtl_dist.checkpoint import MANIFEST, step_of
from mtl_dist.config.trust import trusted
from mtl_dist.data.decode import decode_image
from mtl_dist.data.images import UnreadableImage
from mtl_dist.data.transforms import PRESETS, Transform
from mtl_dist.errors import ImageError, UserError
from mtl_dist.importers.sources import Source
from mtl_dist.kinds.kind import ScalarKind
from mtl_dist.kinds.registry import kind_of
from mtl_dist.prediction.exported import (
    Network,
    exported_in,
    images_in_words,
    network_of,
    open_exported,
    tasks_in_words,
)
from mtl_dist.prediction.inputs import Input, pages
from mtl_dist.prediction.records import plain
from mtl_dist.printable import say
from mtl_dist.randomness import Draws
from mtl_dist.run_folder import RunFolder
from mtl_dist.tasks.task import Task

ImageLike: TypeAlias = str | Path | bytes | Image.Image | np.ndarray | Tensor
"""A path, an encoded image, a PIL image, an array (H, W) or (H, W, C), or a tensor (C, H, W); values as in
the files that the run was trained on (0 to 255 for 8-bit ones)."""

Answers: TypeAlias = dict[str, dict[str, Any]]

BATCH_SIZE = 32
_VALUES_HELD = 1 << 27
"""Values of decoded images that are held at once, where a batch of large ones would be more."""


@dataclass(frozen=True)
class Prediction:
    """What came of one input: the image and every task's answer, or the error that stands in their place."""

    name: str
    image_CHW: Tensor | None = None
    answers: Answers | None = None
    error: str = ""


class Predictor:
    """A trained multi-task model in evaluation mode; threads may share it."""

    def __init__(
        self,
        run: Path,
        device: torch.device | str | None = None,
        checkpoint: WhichCheckpoint = "best",
        temperature: bool = False,
    ) -> None:
        """Load a run's best weights, those of another checkpoint, or an exported model; see `load`."""
        exported = exported_in(run)
        if exported is not None:
            if temperature:
                raise UserError(
                    f"{run}: expected a run folder for temperature, found an exported model. "
                    "mtl export RUN --temperature makes one that has its own."
                )
            if checkpoint != "best":
                raise UserError(f"checkpoint: expected none beside an exported model, found {checkpoint!r}.")
            self._take(open_exported(exported, device))
            return
        if (run / MANIFEST).is_file():
            if checkpoint != "best":
                raise UserError(
                    f"checkpoint: expected none beside the path of one, found {checkpoint!r}. "
                    "Give the run folder, or leave it out."
                )
            run, checkpoint = run.resolve().parents[1], step_of(run.resolve())
        folder = RunFolder.open(run)
        trained = read_trained(folder, lambda line: say(line, sys.stderr), checkpoint, temperature)
        self._take(network_of(trained, device))

    @classmethod
    def of(cls, network: Network) -> Predictor:
        """A predictor by a network that is loaded already."""
        predictor = cls.__new__(cls)
        predictor._take(network)
        return predictor

    def _take(self, network: Network) -> None:
        self._network = network
        self._facts = network.facts
        recipe = network.recipe
        own = recipe.data.user_transforms(training=False)
        self._transform = Transform(recipe.data.size, recipe.data.resize, PRESETS["none"], own)
        self._boxes = tuple(recipe.data.boxes.values())

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Its tasks by name."""
        return self._network.tasks

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._network.device

    @property
    def module(self) -> torch.nn.Module:
        """The model as a plain module: raw images (B, C, H, W) of the size that `preprocess` makes, on its
        device, to `{task: output}`, before softmax and the like. It normalises by itself.

        Raises:
            UserError: it is an ONNX model, which runs outside of torch.
        """
        if self._network.module is None:
            raise UserError(
                "module: expected a run, an archive of torch or safetensors, found an ONNX model."
            )
        return self._network.module

    def preprocess(self, images: Sequence[ImageLike] | np.ndarray | Tensor) -> Tensor:
        """Images as `module` takes them: (B, C, H, W), resized, of raw values, on the model's device.

        Raises:
            ImageError: one is not a readable image, or of channels that the model does not take.
        """
        return self.inputs(self._decoded_all(images))

    def logits(self, images: Sequence[ImageLike] | np.ndarray | Tensor) -> dict[str, Tensor]:
        """Every task's raw output for several images, on the host, under the run's precision as float32.

        (B, classes) or (B, values); maps (B, C, H, W) at the model's size, not the images'.

        Raises:
            ImageError: one is not a readable image, or of channels that the model does not take.
        """
        _require_several(images)
        if len(images) == 0:
            raise UserError("images: expected at least one, found none.")
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(images), BATCH_SIZE):
            inputs = self.preprocess(images[start : start + BATCH_SIZE])
            with torch.no_grad():
                parts.append({task: output.cpu() for task, output in self._network.predict(inputs).items()})
        return {task: torch.cat([part[task] for part in parts]) for task in self.tasks}

    def predict(self, image: ImageLike, threshold: float | None = None, maps: bool = True) -> Answers:
        """Every task's answer for one image; masks have the image's own size.

        classification  class_id, class_name, confidence, probabilities by name
        multilabel      labels above `threshold` (None: the recipe's, or those chosen on val), and
                        probabilities by name
        regression      value, unit; of a box's edge in pixels of the image
        segmentation    mask (H, W) uint8, area_ratio; with two classes the foreground's probability (H, W)
        depth           map (H, W) float32, its mean, minimum and maximum, unit
        normals         normals (3, H, W) float32 of unit length, their mean
        keypoints       points by name: x, y in pixels of the image; of heat maps their confidence

        Without `maps` the arrays are left out, and JSON holds the rest.

        Raises:
            ImageError: not a readable image, or of channels that the model does not take.
            UserError: a threshold that is no probability.
        """
        return self.predict_many([image], threshold, maps)[0]

    def predict_many(
        self,
        images: Sequence[ImageLike] | np.ndarray | Tensor,
        threshold: float | None = None,
        maps: bool = True,
    ) -> list[Answers]:
        """`predict` for several images, in batches; also for a stacked array or tensor."""
        _require_several(images)
        results: list[Answers] = []
        for start in range(0, len(images), BATCH_SIZE):
            originals = self._decoded_all(images[start : start + BATCH_SIZE], start)
            results += self.answers(originals, threshold)
        if not maps:
            return [{task: plain(answer) for task, answer in result.items()} for result in results]
        return results

    def stream(self, inputs: Iterable[Input], threshold: float | None = None) -> Iterator[Prediction]:
        """A prediction for each input, in their order; what cannot be read comes as an error, and the rest
        goes on. No more than a batch is held at a time."""
        waiting: list[Prediction] = []
        held = 0
        for one in inputs:
            waiting.append(self._opened(one))
            image = waiting[-1].image_CHW
            held += image.numel() if image is not None else 0
            if len(waiting) == BATCH_SIZE or held >= _VALUES_HELD:
                yield from self._answered(waiting, threshold)
                waiting, held = [], 0
        yield from self._answered(waiting, threshold)

    def describe(self) -> dict[str, Any]:
        """What is asked of an image, and what images it takes, as JSON holds it."""
        return {"images": images_in_words(self._network), "tasks": tasks_in_words(self._network)}

    def example(self) -> Answers:
        """What an answer looks like: names and types of its values, which mean nothing."""
        answers = {}
        for name, task in self._network.tasks.items():
            size = (1, 1) if task.head.layout == "map" else ()
            answers[name] = task.decode(torch.zeros(1, task.head.num_outputs, *size))[0]
        return answers

    def _opened(self, one: Input) -> Prediction:
        if one.error:
            return Prediction(one.name, error=one.error)
        try:
            image_CHW = decode_image(one.data, self._facts.channels, self._facts.image_dtype)
        except UnreadableImage as error:
            return Prediction(one.name, error=f"expected a readable image, found: {error}.")
        return Prediction(one.name, image_CHW)

    def _answered(self, opened: Sequence[Prediction], threshold: float | None) -> Iterator[Prediction]:
        originals = [one.image_CHW for one in opened if one.image_CHW is not None]
        answers = self.answers(originals, threshold)
        for one in opened:
            yield one if one.error else replace(one, answers=next(answers))

    def answers(
        self, originals: Sequence[Tensor], threshold: float | Sequence[float | None] | None = None
    ) -> Iterator[Answers]:
        """The answer for each image, by one threshold or one for each; maps in its size are made one after
        another."""
        if not originals:
            return
        each = threshold if isinstance(threshold, Sequence) else [threshold] * len(originals)
        with torch.no_grad():
            outputs = self._network.predict(self.inputs(originals))
        for row, (original, decides) in enumerate(zip(originals, each, strict=True)):
            yield self._decode_row(outputs, row, (original.shape[1], original.shape[2]), decides)

    def inputs(self, originals: Sequence[Tensor]) -> Tensor:
        """Decoded images as the network takes them."""
        inputs = [self._transform(image, {}, Draws(0))[0] for image in originals]
        return torch.stack(inputs).to(self.device)

    def _decode_row(
        self, outputs: Mapping[str, Tensor], row: int, size: tuple[int, int], threshold: float | None
    ) -> Answers:
        result = {}
        for name, task in self._network.tasks.items():
            output = outputs[name][row : row + 1]
            if task.head.layout == "map" and task.answers_pixels:
                output = self._transform.restored(output, size)
            result[name] = task.decode(output, threshold)[0]
            kind = kind_of(task.info.kind)
            if isinstance(kind, ScalarKind) and kind.moves:
                shown = kind.without_label(self._transform.plain_view(size), task.info)
                result[name] = result[name] if shown is None else task.placed(result[name], shown)
        for tasks in self._boxes:
            edges = self._transform.restored_box([result[name]["value"] for name in tasks], size)
            for name, edge in zip(tasks, edges, strict=True):
                result[name]["value"] = edge
        return result

    def _decoded_all(self, images: Sequence[ImageLike] | np.ndarray | Tensor, first: int = 0) -> list[Tensor]:
        _require_several(images)
        several = first > 0 or len(images) > 1
        return [
            self.decoded(image, f"image {number}" if several else "image")
            for number, image in enumerate(images, start=first)
        ]

    def decoded(self, image: ImageLike, name: str = "image") -> Tensor:
        """The image as the model's datasets hold theirs: raw (C, H, W). Errors name its path, or `name`.

        Raises:
            ImageError: it cannot be read, or has channels that the model does not take.
        """
        name = str(image) if isinstance(image, str | Path) else name
        try:
            return decode_image(_encoded(image), self._facts.channels, self._facts.image_dtype)
        except (UnreadableImage, OSError) as error:
            raise ImageError(f"{name}: expected a readable image, found: {error}") from None


def _only_page(path: Path) -> bytes:
    """The one image of a file.

    Raises:
        UnreadableImage: unreadable, or of several images.
    """
    status = path.stat()
    found = list(islice(pages(Source(str(path), status.st_size, status.st_mtime_ns)), 2))
    if len(found) > 1:
        raise UnreadableImage("several pages, where one image is expected; `mtl predict` answers for each.")
    if found[0].error:
        raise UnreadableImage(found[0].error)
    return found[0].data


def _require_several(images: object) -> None:
    """Refuse one image, or its name, where several are expected."""
    if isinstance(images, str | bytes | bytearray | Path | Image.Image) or not hasattr(images, "__len__"):
        raise UserError(
            f"images: expected a list of images, or an array or tensor of them, found "
            f"{type(images).__name__}. One goes to predict, or into a list."
        )


def _encoded(image: ImageLike) -> bytes:
    """The bytes of an image file, so that every kind of input takes the one way that training images take."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return _only_page(Path(image))
    buffer = io.BytesIO()
    if isinstance(image, Tensor):
        image = image.cpu().movedim(0, -1).numpy()
    if isinstance(image, np.ndarray):
        np.save(buffer, np.ascontiguousarray(image))
    elif isinstance(image, Image.Image):
        upright = ImageOps.exif_transpose(image)  # a PNG of it would not say that it is to be turned
        if upright.mode == "F":
            raise UnreadableImage("a PIL image of mode F. Give its values as an array")
        known = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")
        (upright if upright.mode in known else upright.convert("RGB")).save(buffer, format="PNG")
    else:
        raise ImageError(
            "image: expected a path, bytes, a PIL image, an array or a tensor, found "
            f"{type(image).__name__}. Several go to predict_many."
        )
    return buffer.getvalue()


def load(
    run: str | Path,
    device: torch.device | str | None = None,
    checkpoint: WhichCheckpoint = "best",
    trust: bool = False,
    temperature: bool = False,
) -> Predictor:
    """The predictor of a trained run.

    `run` is its folder, or one of its checkpoints: runs/skin/ID/checkpoints/step_00001234; or what
    `mtl export` made of it: a folder, or the .onnx, .pt2 or .safetensors file in it. `device` is where
    the model runs: a GPU if there is one, without it. `checkpoint` is "best", "last", or a step that is kept;
    a damaged best or last one is passed over, and reported on stderr. With `trust` the code that a run of
    somebody else names is imported. With `temperature` probabilities are those at the temperatures that
    `mtl evaluate RUN --temperature` has fitted for the best weights.

    Raises:
        UserError: no such run, device or checkpoint, or no whole one.
    """
    with trusted(trust):
        return Predictor(Path(run), device, checkpoint, temperature)
