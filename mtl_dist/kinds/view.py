"""A view of an image: how its pixels came to where a batch shows them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class View:
    """An affine view of a stored image, augmentation included.

    matrix  (2, 3): from (x, y, 1) in pixels of the image as it is displayed to (x, y) in pixels of the view,
            where a pixel's centre is at .5
    size    (height, width) of the view
    zoom    by how much augmentation alone has enlarged the image: 1 without it
    image   (height, width) of the image as it is displayed; (0, 0) where it is not known
    flipped whether left and right were exchanged, whatever else was done
    """

    matrix: np.ndarray
    size: tuple[int, int]
    zoom: float = 1.0
    image: tuple[int, int] = (0, 0)
    flipped: bool = False

    @property
    def rotation(self) -> np.ndarray:
        """The nearest rotation, mirrored where the view is, (2, 2): by it directions turn."""
        left, _, right = np.linalg.svd(self.matrix[:, :2])
        return np.asarray(left @ right)

    def points(self, points_N2: np.ndarray) -> np.ndarray:
        """Points (x, y) of the image in the view, (N, 2)."""
        return np.asarray(points_N2 @ self.matrix[:, :2].T + self.matrix[:, 2])

    def shows(self, points_N2: np.ndarray) -> np.ndarray:
        """Which points of the view, bool (N,), lie inside of it."""
        height, width = self.size
        x, y = points_N2[:, 0], points_N2[:, 1]
        return np.asarray((x >= 0) & (x < width) & (y >= 0) & (y < height))
