"""Prediction: a trained run applied to images.

import mtl_dist

predictor = mtl_dist.load("runs/skin/20260101-120000-ab12")
predictor.predict("photo.jpg")["diagnosis"]["class_name"]
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mtl_dist.assemble import load_root
from mtl_dist.data.decode import decode_image
from mtl_dist.data.images import UnreadableImage
from mtl_dist.data.transforms import PRESETS, Transform
from mtl_dist.engine.connect import connect_without_engine
from mtl_dist.errors import UserError
from mtl_dist.importers.splitting import unique_keys
from mtl_dist.randomness import Draws
from mtl_dist.recipe import load_recipe
from mtl_dist.run_folder import RunFolder
from mtl_dist.tasks.task import Task

ImageLike: TypeAlias = str | Path | bytes | Image.Image | np.ndarray | Tensor
"""A path, an encoded image, a PIL image, an array (H, W) or (H, W, C), or a tensor (C, H, W); values as in
the files that the run was trained on (0 to 255 for 8-bit ones)."""

BATCH_SIZE = 32


class Predictor:
    """A trained multi-task model in evaluation mode."""

    def __init__(self, run: Path) -> None:
        """Load the best weights of the run folder `run`.

        Raises:
            UserError: not a run folder, or no whole checkpoint in it.
        """
        folder = RunFolder.open(run)
        recipe = load_recipe(folder.recipe_path)
        self._world = connect_without_engine(recipe.engine)
        self._root = load_root(folder, recipe, self._world, lambda line: print(line, file=sys.stderr))
        self._facts = folder.read_data()
        own = recipe.data.user_transforms(training=False)
        self._transform = Transform(self._facts.image_size, recipe.data.resize, PRESETS["none"], own)
        self._boxes = tuple(recipe.data.boxes.values())
        self.tasks = tuple(self._root.tasks)

    def task(self, name: str) -> Task:
        """One of its tasks."""
        return self._root.tasks[name]

    def predict(self, image: ImageLike, threshold: float = 0.5) -> dict[str, dict[str, Any]]:
        """Every task's answer for one image; masks have the image's own size.

        classification  class_id, class_name, confidence, probabilities by name
        multilabel      labels above `threshold`, probabilities by name
        regression      value, unit; of a box's edge in pixels of the image
        segmentation    mask (H, W) uint8, area_ratio; with two classes the foreground's probability (H, W)

        Raises:
            UserError: not a readable image, or of channels that the model does not take.
        """
        return self.predict_many([image], threshold)[0]

    @torch.no_grad()
    def predict_many(
        self, images: Sequence[ImageLike] | np.ndarray | Tensor, threshold: float = 0.5
    ) -> list[dict[str, dict[str, Any]]]:
        """`predict` for several images, in batches; also for a stacked array or tensor."""
        results: list[dict[str, dict[str, Any]]] = []
        for start in range(0, len(images), BATCH_SIZE):
            originals = [self.decoded(image) for image in images[start : start + BATCH_SIZE]]
            inputs = torch.stack([self._transform(image, {}, Draws(0))[0] for image in originals])
            outputs = self._root.predict(inputs.to(self._world.device))
            for row, original in enumerate(originals):
                size = (original.shape[1], original.shape[2])
                results.append(self._decode_row(outputs, row, size, threshold))
        return results

    def _decode_row(
        self, outputs: dict[str, Tensor], row: int, size: tuple[int, int], threshold: float
    ) -> dict[str, dict[str, Any]]:
        result = {}
        for name, task in self._root.tasks.items():
            output = outputs[name][row : row + 1]
            if task.head.layout == "map":
                output = self._transform.restored(output, size)
            result[name] = task.decode(output, threshold)[0]
        for tasks in self._boxes:
            edges = self._transform.restored_box([result[name]["value"] for name in tasks], size)
            for name, edge in zip(tasks, edges, strict=True):
                result[name]["value"] = edge
        return result

    def decoded(self, image: ImageLike) -> Tensor:
        """The image as the model's datasets hold theirs: raw (C, H, W)."""
        name = str(image) if isinstance(image, str | Path) else type(image).__name__
        try:
            return decode_image(_encoded(image), self._facts.channels, self._facts.image_dtype)
        except (UnreadableImage, OSError) as error:
            raise UserError(f"{name}: expected a readable image, found: {error}") from None


def _encoded(image: ImageLike) -> bytes:
    """The bytes of an image file, so that every kind of input takes the one way that training images take."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
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
        raise UserError(
            "image: expected a path, bytes, a PIL image, an array or a tensor, found "
            f"{type(image).__name__}. Several go to predict_many."
        )
    return buffer.getvalue()


def load(run: str | Path) -> Predictor:
    """The predictor of a trained run, with its best weights."""
    return Predictor(Path(run))


def predict_files(
    run: Path, images: Sequence[Path], overlays: Path | None, threshold: float
) -> Iterator[dict[str, Any]]:
    """One JSON-able record per image: `{"image": path, task: answer}`.

    Masks are left out of the records; with `overlays` each is written there as `<image>_<task>.png`, of class
    indices, and the image with its foreground tinted as `<image>_<task>_overlay.png`. `<image>` is the file's
    name without extension, or made of its whole path where two files share that.
    """
    missing = [f"{path}: expected an image, found no such file." for path in images if not path.is_file()]
    if missing:
        raise UserError("\n".join(missing))
    predictor = load(run)
    if overlays is not None:
        overlays.mkdir(parents=True, exist_ok=True)
    names = _overlay_names(images)
    for start in range(0, len(images), BATCH_SIZE):
        chunk = images[start : start + BATCH_SIZE]
        for path, answers in zip(chunk, predictor.predict_many(chunk, threshold), strict=True):
            record: dict[str, Any] = {"image": str(path)}
            for task, answer in answers.items():
                record[task] = {k: v for k, v in answer.items() if not isinstance(v, np.ndarray)}
                picture = predictor.task(task).picture(answer)
                if overlays is not None and picture is not None:
                    place = overlays / f"{names[path]}_{task}.png"
                    Image.fromarray(picture).save(place)
                    shown = predictor.task(task).overlay(_shown(predictor.decoded(path)), answer)
                    Image.fromarray(shown.astype(np.uint8)).save(place.with_name(f"{place.stem}_overlay.png"))
                    record[task]["mask"] = str(place)
            yield record


def _overlay_names(paths: Sequence[Path]) -> dict[Path, str]:
    shared = len({path.stem for path in paths}) < len(set(paths))
    return (
        dict(zip(paths, unique_keys([str(path) for path in paths]), strict=True))
        if shared
        else {path: path.stem for path in paths}
    )


def _shown(image_CHW: Tensor) -> np.ndarray:
    """An image as a picture to draw on, (H, W, 3): values of no fixed range from dark to bright."""
    pixels = image_CHW.float()
    if image_CHW.dtype != torch.uint8:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) * (255 / (high - low).clamp(min=1e-9))
    shown = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    colours: np.ndarray = shown.permute(1, 2, 0).numpy()
    return colours


def to_json(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)
