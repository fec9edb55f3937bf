"""Transforms: image and masks stay together, sizes are right, and a view depends on its key alone."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as vision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from mtl_dist.config.loading import load_settings
from mtl_dist.data.decode import open_picture
from mtl_dist.data.pictures import Box
from mtl_dist.data.settings import DataSettings
from mtl_dist.data.transforms import PRESETS, AugmentSettings, CentreCrop, Resize, Transform
from mtl_dist.errors import UserError
from mtl_dist.randomness import Draws, derive_key

RESIZES: list[Resize] = ["stretch", "crop", "pad"]
ALL_RESIZES: list[Resize] = [*RESIZES, CentreCrop(crop_fraction=0.8)]
GEOMETRY = AugmentSettings(
    crop_scale=(0.3, 1.0), flip=True, flip_vertical=True, rotate=30.0, translate=0.2, zoom=(0.8, 1.3)
)


def scene(height: int, width: int) -> tuple[Tensor, Tensor]:
    """An image of one blob, bright on mid-grey, and the blob's mask (0 and 1)."""
    rows, columns = np.mgrid[:height, :width]
    inside = ((rows / height - 0.4) / 0.25) ** 2 + ((columns / width - 0.6) / 0.2) ** 2 < 1
    image = torch.from_numpy(np.where(inside, 220, 110).astype(np.uint8)).expand(3, -1, -1).contiguous()
    return image, torch.from_numpy(inside.astype(np.uint8))


def view(transform: Transform, image: Tensor, mask: Tensor, key: int = 0) -> tuple[Tensor, Tensor]:
    image, masks = transform(image, {"blob": mask}, Draws(key))
    return image, masks["blob"]


@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from(ALL_RESIZES),
    st.sampled_from([PRESETS["none"], PRESETS["standard"], PRESETS["strong"], GEOMETRY]),
    st.integers(0, 2**64 - 1),
)
@settings(max_examples=80, deadline=None)
def test_any_image_gets_the_size_asked_for_and_masks_keep_to_their_classes(
    height: int, width: int, size: tuple[int, int], resize: Resize, augment: AugmentSettings, key: int
) -> None:
    image, mask = scene(height, width)
    image, mask = view(Transform(size, resize, augment), image, mask, key)
    assert (image.shape, image.dtype) == ((3, *size), torch.uint8)
    assert (mask.shape, mask.dtype) == (size, torch.uint8)
    assert set(mask.unique().tolist()) <= {0, 1, 255}


@pytest.mark.parametrize("resize", ALL_RESIZES)
@pytest.mark.parametrize("augment", [PRESETS["none"], PRESETS["standard"], GEOMETRY])
def test_the_mask_lies_on_its_object_in_every_view(resize: Resize, augment: AugmentSettings) -> None:
    image, mask = scene(90, 140)
    transform = Transform((64, 64), resize, augment)
    for key in range(40):
        picture, blob = view(transform, image, mask, derive_key(key))
        bright = picture[0] > 165
        black = picture[0] < 55
        agree = (bright == (blob == 1)) & (black == (blob == 255))
        assert agree.float().mean() > 0.97  # they may differ by rounding, along the outlines
        if black.any():
            assert (blob == 255).any()


def test_without_augmentation_nothing_is_random() -> None:
    image, mask = scene(50, 80)
    for resize in RESIZES:
        transform = Transform((32, 32), resize, PRESETS["none"])
        first, second = view(transform, image, mask, 1), view(transform, image, mask, 2)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("name", ["standard", "strong"])
def test_a_view_depends_on_its_key_and_leaves_the_global_generator_alone(name: str) -> None:
    image, mask = scene(50, 80)
    transform = Transform((32, 32), "stretch", PRESETS[name])  # type: ignore[index]
    state = torch.get_rng_state()
    views = [view(transform, image, mask, derive_key(key))[0] for key in range(20)]
    torch.manual_seed(123)
    again = [view(transform, image, mask, derive_key(key))[0] for key in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(views, 2))
    torch.set_rng_state(state)
    view(transform, image, mask, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_resizing_is_torchvisions_antialiased_resize() -> None:
    image = torch.randint(0, 256, (3, 75, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours, _ = Transform((33, 41), "stretch", PRESETS["none"])(image, {}, Draws(0))
    assert torch.equal(ours, vision.resize(image, [33, 41], antialias=True))


@pytest.mark.parametrize("size", [(1, 1), (5, 1), (1, 5), (2, 1)])
@pytest.mark.parametrize("shape", [(2, 1), (7, 9), (1, 3)])
def test_a_single_row_or_column_is_resized_like_floats(size: tuple[int, int], shape: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = Transform(size, "stretch", PRESETS["none"])
    ours, exact = transform(image, {}, Draws(0))[0], transform(image.float(), {}, Draws(0))[0]
    assert (ours.float() - exact).abs().max() <= 1


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.tuples(st.integers(2, 40), st.integers(2, 40)),
    st.integers(0, 13),
    st.sampled_from([torch.uint8, torch.float32]),
    st.sampled_from([1, 3, 4]),
)
@settings(max_examples=120, deadline=None)
def test_a_short_side_and_a_crop_are_torchvisions_resize_and_centre_crop_to_the_bit(
    height: int, width: int, size: tuple[int, int], margin: int, dtype: torch.dtype, channels: int
) -> None:
    image = torch.randint(0, 256, (channels, height, width), generator=torch.Generator().manual_seed(height))
    image, short_side = image.to(dtype), max(size) + margin
    ours, _ = Transform(size, CentreCrop(short_side=short_side), PRESETS["none"])(image, {}, Draws(0))
    resized = vision.resize(image, [short_side], antialias=True)
    assert torch.equal(ours, vision.center_crop(resized, list(size)))


@pytest.mark.parametrize("shape", [(500, 375), (375, 500), (1200, 1000), (96, 64), (257, 256)])
def test_so_is_256_and_224_of_a_photograph_whatever_decodes_it(shape: tuple[int, int]) -> None:
    photograph = np.random.default_rng(0).integers(0, 256, (*(side // 8 + 1 for side in shape), 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(photograph).resize(shape[::-1], Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    picture = open_picture(memoryview(bytearray(file.getvalue())), 3)
    whole = picture.show(Box(0, 0, *shape), shape)
    expected = vision.center_crop(vision.resize(whole, [256], antialias=True), [224])
    for resize in (CentreCrop(short_side=256, crop=224), CentreCrop(crop_fraction=0.875)):
        assert torch.equal(
            Transform((224, 224), resize, PRESETS["none"]).view(picture, {}, Draws(0))[0], expected
        )


@pytest.mark.parametrize(
    ("resize", "said"),
    [
        (
            {"short_side": 256, "crop": 200},
            r"resize\.crop: expected data.image_size, 224, found 200. Leave it",
        ),
        ({"short_side": 200}, r"resize\.short_side: expected 224 or more, .* cut from, found 200"),
        ({"short_side": 256, "crop_fraction": 0.9}, "expected short_side or crop_fraction, found both"),
        ({"crop": 224}, "expected short_side or crop_fraction, found neither"),
        ({"crop_fraction": 1.5}, r"crop_fraction: expected a number .*<= 1 or null, found 1.5"),
        ({"shortside": 256}, "unknown key. Did you mean short_side"),
        ("streched", "Did you mean stretch"),
    ],
)
def test_a_crop_that_does_not_fit_is_refused(resize: object, said: str) -> None:
    data = {"train": [{"path": "x"}], "image_size": 224, "resize": resize}
    with pytest.raises(UserError, match=said):
        load_settings(DataSettings, data)


@pytest.mark.parametrize("resize", ALL_RESIZES)
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (120, 40), (24, 24)])
@pytest.mark.parametrize("scale", [1, 2])
def test_a_predicted_map_goes_back_to_where_it_was(
    resize: Resize, shape: tuple[int, int], scale: int
) -> None:
    image, mask = scene(*shape)
    transform = Transform((48, 48), resize, PRESETS["none"])
    _, seen = view(transform, image, mask)
    predicted = seen[None, None].float().nan_to_num().where(seen != 255, 0)
    if scale == 2:
        predicted = torch.nn.functional.avg_pool2d(predicted, 2)
    restored = transform.restored(predicted, shape)[0, 0]
    assert restored.shape == shape
    source, inner = transform.source(shape, Draws(0)), transform.inner_size(transform.source(shape, Draws(0)))
    shown = torch.zeros(shape, dtype=torch.bool)
    height, width = (
        min(side, round(side * most / part))
        for side, most, part in zip((source.height, source.width), (48, 48), inner, strict=True)
    )
    middle = Box((shape[0] - height) // 2, (shape[1] - width) // 2, height, width)
    middle.of(shown)[:] = True
    agree = ((restored > 0.5) == (mask == 1))[shown].float().mean()
    assert agree > (0.96 if scale == 1 else 0.94)


def test_crop_keeps_proportions_and_the_middle() -> None:
    image, mask = scene(60, 120)
    ours = view(Transform((30, 30), "crop", PRESETS["none"]), image, mask)
    middle = view(Transform((30, 30), "stretch", PRESETS["none"]), image[:, :, 30:90], mask[:, 30:90])
    assert torch.equal(ours[0], middle[0])
    assert torch.equal(ours[1], middle[1])


def test_pad_shows_everything_between_black_bars_that_are_ignored() -> None:
    image, mask = scene(60, 120)
    picture, blob = view(Transform((30, 30), "pad", PRESETS["none"]), image, mask)
    whole = view(Transform((15, 30), "stretch", PRESETS["none"]), image, mask)
    assert torch.equal(picture[:, 7:22], whole[0])
    assert torch.equal(blob[7:22], whole[1])
    for bar in (slice(0, 7), slice(22, 30)):
        assert (picture[:, bar] == 0).all()
        assert (blob[bar] == 255).all()


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    image, mask = scene(28, 28)
    for resize in RESIZES:
        picture, blob = view(Transform((28, 28), resize, PRESETS["none"]), image, mask)
        assert torch.equal(picture, image)
        assert torch.equal(blob, mask)


def test_half_of_the_images_are_mirrored() -> None:
    image, mask = scene(16, 16)
    transform = Transform((16, 16), "stretch", AugmentSettings(flip=True))
    mirrored = 0
    for key in range(400):
        picture, blob = view(transform, image, mask, derive_key(key))
        if torch.equal(picture, image.flip(-1)):
            assert torch.equal(blob, mask.flip(-1))
            mirrored += 1
        else:
            assert torch.equal(picture, image)
    assert 150 < mirrored < 250


def test_random_crops_have_the_area_and_shape_asked_for() -> None:
    rows, columns = torch.meshgrid(torch.arange(100.0), torch.arange(100.0), indexing="ij")
    position = torch.stack([rows, columns])
    transform = Transform((50, 50), "stretch", AugmentSettings(crop_scale=(0.2, 0.5), crop_ratio=(0.5, 2.0)))
    areas = []
    for key in range(300):
        crop, _ = transform(position, {}, Draws(derive_key(key)))
        height, width = (float(c[25, 25:].max() - c[25, :25].min()) for c in (crop[0].T, crop[1]))
        height, width = height * 50 / 49, width * 50 / 49
        areas.append(height * width / 1e4)
        assert 0.45 < width / height < 2.2
    assert min(areas) > 0.18
    assert max(areas) < 0.53
    assert max(areas) - min(areas) > 0.25


@pytest.mark.parametrize(
    ("option", "reference"),
    [
        ("brightness", vision.adjust_brightness),
        ("contrast", vision.adjust_contrast),
        ("saturation", vision.adjust_saturation),
    ],
)
def test_colour_changes_are_torchvisions_at_the_factor_drawn(option: str, reference: object) -> None:
    image = torch.randint(60, 200, (3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = Transform((20, 20), "stretch", AugmentSettings(**{option: 0.3}))  # type: ignore[arg-type]
    ours, _ = transform(image, {}, Draws(9))
    factors = [reference(image, 0.7 + i * 0.002) for i in range(301)]  # type: ignore[operator]
    assert min(int((ours.int() - theirs.int()).abs().max()) for theirs in factors) <= 1
    assert not torch.equal(ours, image)


def test_values_beyond_eight_bits_are_varied_without_being_clipped() -> None:
    image = torch.linspace(0, 60_000, 400).view(1, 20, 20)
    transform = Transform((20, 20), "stretch", AugmentSettings(brightness=0.5))
    ours, _ = transform(image, {}, Draws(derive_key(3)))
    factors = (ours / image)[0].flatten()[1:]
    assert torch.allclose(factors, factors[0].expand(399), rtol=1e-5)
    assert 0.5 <= factors[0] < 1.5


def test_erasing_paints_a_rectangle_of_the_image_and_leaves_its_masks() -> None:
    image, mask = scene(40, 40)
    transform = Transform((40, 40), "stretch", AugmentSettings(erase=1.0))
    for key in range(20):
        picture, blob = view(transform, image, mask, derive_key(key))
        changed = (picture != image).any(dim=0)
        colour = image.float().mean((-2, -1)).to(torch.uint8)
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        box = picture[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box == colour[:, None, None]).all()
        assert 0.01 < box[0].numel() / 1600 < 0.36
        assert torch.equal(blob, mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_scale": (0.9, 0.5)}, "smaller number first"),
        ({"zoom": (2.0, 1.0)}, "smaller number first"),
        ({"crop_scale": (0.0, 1.0)}, "greater than 0"),
        ({"rotate": 200.0}, "less than or equal to 180"),
        ({"flipp": True}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AugmentSettings(**options)  # type: ignore[arg-type]
