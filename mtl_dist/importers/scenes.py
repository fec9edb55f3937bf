"""Made scenes of spheres, boxes and a floor, with the exact class, depth and normal of every pixel.

    things    what a pixel shows: floor, sphere, box, or background (segmentation)
    distance  the depth along the viewing direction, in metres; none in the background (depth)
    surface   its normal, x to the right, y down, z from the camera; none in the background (normals)

A pinhole camera at the origin looks along z at a floor below it; one distant light, surfaces with a stripe or
a chequered texture. Rays are cast in numpy. Scene i is seeded by i alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from PIL import Image
from pydantic import Field

from mtl_dist.importers.importer import Importer
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.options import Help
from mtl_dist.kinds.depth import Depth
from mtl_dist.kinds.normals import Normals
from mtl_dist.kinds.segmentation import BACKGROUND, Segmentation

CLASSES = (BACKGROUND, "floor", "sphere", "box")
MILLIMETRE = 0.001

_FLOOR, _SPHERE, _BOX = 1, 2, 3
_FAR = 12.0
"""Beyond this many metres there is only background."""
_FOCAL = 1.1  # in widths of the picture
_HEIGHT = 1.2  # of the camera above the floor
_AMBIENT = 0.25
_SKY = np.array([0.62, 0.74, 0.88])


@dataclass(frozen=True)
class Scene:
    """A picture uint8 (H, W, 3), classes uint8 (H, W), depth in metres float64 (H, W) and normals (H, W, 3);
    depth and normals are 0 in the background."""

    picture: np.ndarray
    classes: np.ndarray
    depth: np.ndarray
    normals: np.ndarray


class Scenes(Importer):
    """Made scenes of spheres and boxes: three dense tasks, nothing to download.

    Which thing a pixel shows (a mask), how far away that is, where its surface looks; all of it exact.

    \b
      mtl prepare scenes data/scenes
      mtl prepare scenes data/scenes --num 500 --size 64
    """

    fractions: ClassVar[tuple[float, ...]] = (0.7, 0.15, 0.15)
    verify: ClassVar[bool] = False

    def __init__(
        self,
        num: Annotated[int, Field(ge=10), Help("How many.", "N")] = 2000,
        size: Annotated[int, Field(ge=16), Help("Their width and height in pixels.", "PIXELS")] = 96,
        first: Annotated[int, Field(ge=0), Help("Number of the first; i is always the same.", "N")] = 0,
    ) -> None:
        self._numbers, self._size = range(first, first + num), size

    @property
    def name(self) -> str:
        return "scenes"

    def tasks(self) -> Mapping[str, TaskSource]:
        return {
            "things": TaskSource(Segmentation.name, CLASSES),
            "distance": TaskSource(Depth.name, unit="m", facts={"scale": MILLIMETRE, "metric": True}),
            "surface": TaskSource(Normals.name),
        }

    def records(self) -> Iterator[Record]:
        for number in self._numbers:
            scene = made_scene(number, self._size)
            maps = {
                "things": _png(scene.classes),
                "distance": _png(np.rint(scene.depth / MILLIMETRE).astype(np.uint16)),
                "surface": _npy(np.rint(scene.normals * np.iinfo(np.int16).max).astype(np.int16)),
            }
            yield Record(f"scene_{number:06d}", _png(scene.picture), {}, maps)


def made_scene(number: int, size: int) -> Scene:
    """Scene `number`."""
    rng = np.random.default_rng(number)
    rays_HW3 = _rays(size, rng)
    depth = np.full((size, size), np.inf)
    classes = np.zeros((size, size), np.uint8)
    normals = np.zeros((size, size, 3))
    albedo = np.zeros((size, size, 3))

    def show(hit: np.ndarray, at: np.ndarray, normal: np.ndarray, thing: int) -> None:
        """Let a thing with its own texture stand where it is nearer than all others."""
        nearer = hit & (at < depth)
        depth[nearer], classes[nearer] = at[nearer], thing
        normals[nearer] = normal[nearer]
        albedo[nearer] = _texture(rays_HW3[nearer] * at[nearer][:, None], rng)

    with np.errstate(divide="ignore", invalid="ignore"):
        floor = _HEIGHT / rays_HW3[..., 1]
    show((floor > 0) & (floor < _FAR), floor, np.broadcast_to([0.0, -1.0, 0.0], rays_HW3.shape), _FLOOR)
    for _ in range(rng.integers(2, 6)):
        distance = rng.uniform(2.5, 7.0)
        middle = np.array([rng.uniform(-0.35, 0.35) * distance, 0.0, distance])
        reach = rng.uniform(0.3, 0.9)
        middle[1] = _HEIGHT - reach - rng.uniform(0, 0.8) * (rng.uniform() < 0.3)
        if rng.uniform() < 0.5:
            show(*_sphere(rays_HW3, middle, reach), _SPHERE)
        else:
            sides = reach * rng.uniform(0.6, 1.0, 3)
            sides[1] = reach
            show(*_box(rays_HW3, middle, sides, rng.uniform(0, np.pi / 2)), _BOX)

    light = rng.normal(size=3) * [1, 0.3, 0.6] + [0, -1.5, -0.8]
    light /= np.linalg.norm(light)
    shade = _AMBIENT + (1 - _AMBIENT) * (normals @ light).clip(0)
    there = classes > 0
    sky = np.broadcast_to(_SKY * rng.uniform(0.7, 1.1), albedo.shape)
    colours = np.where(there[..., None], albedo * shade[..., None], sky) + rng.normal(0, 0.015, albedo.shape)
    picture = np.rint(colours.clip(0, 1) * 255).astype(np.uint8)
    return Scene(picture, classes, np.where(there, depth, 0.0), normals)


def _rays(size: int, rng: np.random.Generator) -> np.ndarray:
    """The direction of each pixel's ray, (H, W, 3), with z = 1: a point at depth d is d times it."""
    across = (np.arange(size) + 0.5) / size - 0.5
    rays = np.ones((size, size, 3))
    rays[..., 0], rays[..., 1] = across / _FOCAL, across[:, None] / _FOCAL + rng.uniform(0.05, 0.15)
    return rays


def _sphere(rays: np.ndarray, middle: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the rays meet a sphere, at which depth, and with which normal."""
    a, b = (rays * rays).sum(-1), rays @ middle
    inside = b * b - a * (middle @ middle - radius**2)
    at = (b - np.sqrt(inside.clip(0))) / a
    return (inside > 0) & (at > 0), at, (rays * at[..., None] - middle) / radius


def _box(
    rays: np.ndarray, middle: np.ndarray, sides: np.ndarray, angle: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same for a box of half the `sides` each way, turned about the vertical."""
    cos, sin = np.cos(angle), np.sin(angle)
    to_box = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    directions, origin = rays @ to_box.T, -to_box @ middle
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (-sides - origin) / directions, (sides - origin) / directions
    enter, leave = np.minimum(first, second), np.maximum(first, second)
    axis, at = enter.argmax(-1), enter.max(-1)
    outwards = -np.sign(np.take_along_axis(directions, axis[..., None], -1))
    normals = np.zeros(rays.shape)
    np.put_along_axis(normals, axis[..., None], outwards, -1)
    return (at < leave.min(-1)) & (at > 0), at, normals @ to_box


def _texture(places: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A colour for each point (N, 3): squares, stripes, or plain."""
    one, other = rng.uniform(0.25, 1.0, (2, 3))
    kind, period = rng.integers(3), rng.uniform(0.15, 0.5)
    cells = np.floor(places / period)
    odd = [cells.sum(-1) % 2, cells[:, 0] % 2, np.zeros(len(places))][kind]
    mixed: np.ndarray = np.where(odd[:, None] > 0, 0.5 * one + 0.5 * other, one)
    return mixed


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
