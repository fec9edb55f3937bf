"""Made faces: ovals with two eyes and a nose, whose places are known exactly."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("left_eye", "right_eye", "nose")
_AT = np.array(
    [[0.45, -0.3], [-0.45, -0.3], [0.0, 0.3]]
)  # of the oval's half axes; its own left is at the right
_COLOURS = np.array([[40, 60, 160], [40, 60, 160], [170, 50, 40]], float)


def face(height: int, width: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture (H, W, 3), uint8, and the points (3, 2): x and y, (0, 0) is the centre of the first pixel."""
    side = min(height, width)
    axes = side * random.uniform(0.28, 0.4, 2)
    centre = np.array([width, height]) / 2 + side * random.uniform(-0.1, 0.1, 2)
    angle = random.uniform(-0.5, 0.5)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = centre + (_AT * axes) @ turn.T
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x, y], axis=-1).astype(float)
    inside = (((pixels - centre) @ turn / axes) ** 2).sum(axis=-1)[..., None]
    picture = np.where(inside < 1, [225.0, 190.0, 160.0], random.uniform(30, 110, 3))
    for point, colour in zip(points, _COLOURS, strict=True):
        away = (((pixels - point) / (side * 0.06)) ** 2).sum(axis=-1)[..., None]
        picture += (colour - picture) * np.exp(-away / 2)
    picture += random.normal(0, 4, picture.shape)
    return picture.clip(0, 255).astype(np.uint8), points


def write_faces(folder: Path, num: int = 300, side: int = 48, seed: int = 0, missing: float = 0.1) -> Path:
    """Pictures of several sizes and a table of their points, of which some are missing; the table's path."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "faces.csv"
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", *(f"{name}_{what}" for name in NAMES for what in "xyv"), "split"])
        for number in range(num):
            height, width = side + int(random.integers(0, 9)), side + int(random.integers(0, 17))
            picture, points = face(height, width, random)
            Image.fromarray(picture).save(folder / f"{number:04d}.png")
            cells: list[object] = []
            for x, y in points.tolist():
                there = random.uniform() >= missing
                cells += [round(x, 2), round(y, 2), 2] if there else ["", "", 0]
            split = "train" if number % 5 else "val"
            writer.writerow([f"{number:04d}.png", *cells, split])
    return table
