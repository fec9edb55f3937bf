"""Labels that are no pixels hear of the view that was taken of their image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mtl_dist.data.pictures import DecodedPicture
from mtl_dist.data.rand_augment import RandAugmentSettings
from mtl_dist.data.transforms import AugmentSettings, Resize, Transform
from mtl_dist.kinds.view import View
from mtl_dist.randomness import Draws

AUGMENTS = {
    "nothing": AugmentSettings(),
    "flip": AugmentSettings(flip=True),
    "flip_vertical": AugmentSettings(flip_vertical=True),
    "crop": AugmentSettings(crop_scale=(0.4, 0.8)),
    "turn": AugmentSettings(rotate=40.0),
    "all": AugmentSettings(flip=True, rotate=30.0, translate=0.1, zoom=(0.9, 1.3)),
    "rand_augment": AugmentSettings(rand_augment=RandAugmentSettings(operations=3, magnitude=20)),
}


def taken(
    resize: Resize, augment: AugmentSettings, masks: dict[str, torch.Tensor], key: int
) -> tuple[dict[str, torch.Tensor], View]:
    transform = Transform((90, 120), resize, augment, fills={"number": math.nan})
    picture = DecodedPicture(torch.zeros(3, 150, 180))
    draws = Draws(key)
    source = transform.source(picture.size, draws)
    _, maps, _, view = transform.finish(
        transform.decode(picture, source), source, picture.size, masks, {}, draws
    )
    return maps, view()


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("name", AUGMENTS)
def test_points_are_where_the_pixels_of_maps_went(name: str, resize: Resize) -> None:
    mask = torch.zeros(150, 180, dtype=torch.uint8)
    mask[60:69, 100:109] = 1
    for key in range(8):
        maps, view = taken(resize, AUGMENTS[name], {"block": mask}, key)
        place = view.points(np.array([[104.5, 64.5]]))
        rows, columns = np.nonzero(maps["block"].numpy() == 1)
        if view.shows(place).all() and 8 < place[0, 0] < 112 and 8 < place[0, 1] < 82:
            assert place[0] == pytest.approx([columns.mean() + 0.5, rows.mean() + 0.5], abs=0.8)


def test_zoom_is_that_of_augmentation_alone() -> None:
    for key in range(5):
        _, plain = taken("crop", AUGMENTS["flip"], {}, key)
        assert plain.zoom == pytest.approx(1)
        _, cropped = taken("crop", AUGMENTS["crop"], {}, key)
        assert cropped.zoom > 1
        _, zoomed = taken("crop", AugmentSettings(zoom=(1.3, 1.3), rotate=20.0), {}, key)
        assert zoomed.zoom == pytest.approx(1.3)


def test_maps_of_numbers_are_moved_without_new_values_and_are_nan_beside_the_image() -> None:
    values = torch.rand(150, 180, generator=torch.Generator().manual_seed(0))
    vectors = torch.stack([values, values + 1, values + 2])
    maps, _ = taken("pad", AUGMENTS["all"], {"number": values, "vector": vectors}, 3)
    seen = maps["number"]
    assert seen.shape == (90, 120) and maps["vector"].shape == (3, 90, 120)
    inside = torch.isfinite(seen)
    assert 0 < inside.float().mean() < 1
    assert np.isin(seen[inside].numpy(), values.numpy()).all()
    torch.testing.assert_close(maps["vector"][1][inside], seen[inside] + 1)
