"""RandAugment: masks move with their image, and everything follows from the draws."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2

from mtl_dist.data.moving import Affine, Moving
from mtl_dist.data.rand_augment import RandAugmentSettings, rand_augment
from mtl_dist.data.transforms import PRESETS, AugmentSettings, Transform
from mtl_dist.randomness import Draws
from mtl_dist.specs import IGNORE

KEYS = range(60)


def varied(
    image: torch.Tensor, masks: dict[str, torch.Tensor], settings: RandAugmentSettings, draws: Draws
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    moving = Moving(image, masks, {}, Affine(1, 0, 0, 0, 1, 0))
    rand_augment(moving, settings, draws)
    return moving.image_CHW, moving.maps


def block_image() -> tuple[torch.Tensor, torch.Tensor]:
    """A bright block on a dark ground, and the mask of the block."""
    mask = torch.zeros(1, 48, 64, dtype=torch.uint8)
    mask[:, 12:36, 20:44] = 1
    return (mask * 200 + 20).expand(3, -1, -1).contiguous(), mask


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_masks_move_with_their_image(magnitude: int) -> None:
    image, mask = block_image()
    moved = 0
    for key in KEYS:
        settings = RandAugmentSettings(operations=2, magnitude=magnitude)
        shown, masks = varied(image.float(), {"block": mask}, settings, Draws(key))  # moves alone
        block = masks["block"]
        assert set(block.unique().tolist()) <= {0, 1, IGNORE}
        edge = (shown[:1] > 25) & (shown[:1] < 215)  # between the block and the ground, or beside the image
        certain = ~edge & (block != IGNORE) & (shown[:1] > 10)
        wrong = certain & ((shown[:1] > 120) != (block == 1))
        assert int(wrong.sum()) <= 0.01 * block.numel()
        moved += not torch.equal(block, mask)
    assert (moved > 0) == (magnitude > 0)


def test_what_is_outside_the_image_is_black_and_ignored() -> None:
    image, mask = block_image()
    seen = 0
    for key in KEYS:
        shown, masks = varied(
            image.float(), {"block": mask}, RandAugmentSettings(operations=1, magnitude=30), Draws(key)
        )
        outside = masks["block"] == IGNORE
        assert (shown[:1][outside] < 20).float().mean() > 0.9 if outside.any() else True
        seen += bool(outside.any())
    assert seen > 5


@pytest.mark.parametrize("shape", [(1, 30, 20), (3, 30, 20), (4, 30, 20)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_kind_of_image_keeps_its_kind(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    image = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 255).to(dtype)
    for key in KEYS:
        shown, _ = varied(image, {}, RandAugmentSettings(operations=3, magnitude=20), Draws(key))
        assert (shown.shape, shown.dtype) == (image.shape, dtype)
        assert shown.min() >= 0 and shown.max() <= 255


def test_equal_draws_are_equal_views_and_others_differ() -> None:
    image = (torch.rand((3, 40, 40), generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    views = [varied(image, {}, RandAugmentSettings(), Draws(key))[0] for key in KEYS]
    again = [varied(image, {}, RandAugmentSettings(), Draws(key))[0] for key in KEYS]
    assert all(torch.equal(one, other) for one, other in zip(views, again, strict=True))
    assert len({view.numpy().tobytes() for view in views}) > 40


def test_the_operations_are_those_of_torchvision() -> None:
    """With one operation, each of theirs that has no interpolation gives a view that is one of ours."""
    image = (torch.rand((3, 16, 16), generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    settings = RandAugmentSettings(operations=1, magnitude=9)
    ours = {varied(image, {}, settings, Draws(key))[0].numpy().tobytes() for key in range(1000)}
    theirs = v2.RandAugment(num_ops=1, magnitude=9)
    space = dict(v2.RandAugment._AUGMENTATION_SPACE)
    assert len(space) == 14
    for name, entry in space.items():
        if name in ("ShearX", "ShearY", "Rotate"):
            continue
        theirs._AUGMENTATION_SPACE = {name: entry}
        for seed in range(6):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                view = theirs(image)
            if name.startswith("Translate"):
                assert any(
                    torch.equal(view, torch.frombuffer(bytearray(o), dtype=torch.uint8).view_as(view))
                    for o in ours
                )
            else:
                assert view.numpy().tobytes() in ours, name


def test_it_is_stated_in_a_recipe_and_part_of_strong() -> None:
    assert PRESETS["strong"].rand_augment == RandAugmentSettings(operations=2, magnitude=9)
    augment = AugmentSettings.model_validate({"rand_augment": {"magnitude": 15}})
    image, mask = block_image()
    shown, masks = Transform((48, 64), "stretch", augment)(image, {"block": mask[0]}, Draws(5))
    assert shown.shape == image.shape
    assert masks["block"].shape == (48, 64)
