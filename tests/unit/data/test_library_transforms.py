"""Transforms of torchvision by path keep the promises of all steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from mtl_dist.data.library_transforms import LibraryTransform
from mtl_dist.data.loader import open_data
from mtl_dist.data.settings import DataSettings
from mtl_dist.errors import UserError
from mtl_dist.randomness import Draws
from tests.tiny_datasets import write_dataset

SIZE = (16, 16)


def settings(*steps: dict[str, Any], path: str = "nowhere", **more: Any) -> DataSettings:
    stated = [{**step, "kind": f"torchvision.transforms.v2.{step['kind']}"} for step in steps]
    data = {"train": [{"path": path}], "image_size": 16, "transforms": stated, **more}
    return DataSettings.model_validate_json(json.dumps(data))


def step(kind: str, **arguments: Any) -> LibraryTransform:
    (made,) = settings({"kind": kind, **arguments}).user_transforms(training=True)
    assert isinstance(made, LibraryTransform)
    return made


def picture() -> Tensor:
    return torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_it_gives_what_torchvision_gives_to_the_bit() -> None:
    transform = step("ColorJitter", brightness=0.5, hue=0.1)
    image, _ = transform(picture(), {}, Draws(5))
    torch.manual_seed(int(Draws(5).uniform(0, 2.0**53)))
    assert torch.equal(image, v2.ColorJitter(brightness=0.5, hue=0.1)(picture()))
    assert type(image) is Tensor and not torch.equal(image, picture())


def test_it_draws_from_the_samples_key_and_leaves_torchs_generator_alone() -> None:
    transform = step("RandomRotation", degrees=40)
    torch.manual_seed(1)
    first, _ = transform(picture(), {}, Draws(3))
    after = torch.rand(2)
    torch.manual_seed(99)
    second, _ = transform(picture(), {}, Draws(3))
    other, _ = transform(picture(), {}, Draws(4))
    torch.manual_seed(1)
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(after, torch.rand(2))


@pytest.mark.parametrize("fill", [0, 1, 2, 77])
def test_maps_go_along_and_say_no_label_outside_of_the_image(fill: int) -> None:
    transform = step("RandomAffine", degrees=[45, 45], fill=fill)
    mask = (picture()[0] > 127).to(torch.uint8)
    depth = picture()[1].float() + 1
    image, maps = transform(torch.full((3, *SIZE), 200, dtype=torch.uint8), {"m": mask, "d": depth}, Draws(0))
    outside = image[0] == fill
    assert outside[0, 0] and not outside[8, 8]
    assert torch.equal(maps["m"] == 255, outside)
    assert torch.equal(maps["d"].isnan(), outside)
    assert set(maps["d"][~outside].tolist()) <= set(depth.flatten().tolist())
    assert maps["m"].dtype == torch.uint8 and type(maps["m"]) is Tensor


def test_a_map_of_vectors_moves_with_the_image() -> None:
    vectors = torch.rand(3, *SIZE)
    image, maps = step("RandomHorizontalFlip", p=1.0)(picture(), {"v": vectors}, Draws(0))
    assert torch.equal(image, picture().flip(-1)) and torch.equal(maps["v"], vectors.flip(-1))


def test_what_it_does_with_an_image_is_found_by_trying_even_where_it_rarely_acts() -> None:
    assert step("RandomHorizontalFlip", p=1e-4).effect(SIZE).moves
    assert not step("RandomGrayscale", p=1e-4).effect(SIZE).moves
    assert step("CenterCrop", size=8).size_after(SIZE) == (8, 8)
    assert not step("TrivialAugmentWide").effect(SIZE).takes_maps
    erasing = step("RandomErasing", p=1.0, inplace=True)
    before = picture()
    erasing(before, {}, Draws(0))
    assert torch.equal(before, picture())


@pytest.mark.parametrize(
    ("stated", "line"),
    [
        ({"kind": "Normalize", "mean": [0.5], "std": [0.5]}, "Input tensor should be a float tensor"),
        ({"kind": "Grayscale"}, "keep 3 channels of torch.uint8, found 1 of torch.uint8"),
        ({"kind": "ToDtype", "dtype": "float32"}, "found 3 of torch.float32"),
        ({"kind": "FiveCrop", "size": 8}, "expected it to return one image, found tuple"),
        ({"kind": "RandomResize", "min_size": 8, "max_size": 30}, "expected images of one size, found 8 x 8"),
        ({"kind": "RandomApply", "transforms": []}, "expected arguments that fit it, found: Pass at least"),
    ],
)
def test_what_is_no_step_is_refused_by_name(stated: dict[str, Any], line: str) -> None:
    named = rf"data\.transforms: torchvision\.transforms\.v2\.{stated['kind']}: .*{line}"
    with pytest.raises(UserError, match=named) as refused:
        step(**stated).size_after(SIZE)
    assert "\n" not in str(refused.value)


def test_images_of_other_numbers_than_8_bits_are_refused() -> None:
    with pytest.raises(UserError, match=r"v2\.ColorJitter: expected 8-bit images"):
        step("ColorJitter", brightness=0.1)(torch.rand(3, *SIZE), {}, Draws(0))


def test_steps_that_maps_or_boxes_do_not_follow_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "tiny", {"train": 4})
    flip, colour = {"kind": "RandomHorizontalFlip"}, {"kind": "ColorJitter", "brightness": 0.1}

    def opened(*steps: dict[str, Any], **more: Any) -> tuple[str, ...]:
        return open_data(settings(*steps, path=str(tmp_path / "tiny"), **more), ["digit", "shape"]).splits

    assert opened(flip, {**colour, "training_only": False}) == ("train",)
    with pytest.raises(UserError, match="shape has a place in the image's own, found RandomHorizontalFlip"):
        opened({**flip, "training_only": False})
    with pytest.raises(UserError, match="take maps along, because there is shape, found RandAugment"):
        opened({"kind": "RandAugment"})


def test_a_recipe_states_all_arguments_and_reads_back_equal() -> None:
    steps = settings({"kind": "RandomRotation", "degrees": 30}, {"kind": "GaussianBlur", "kernel_size": 3})
    dumped = steps.model_dump(mode="json")
    assert dumped["transforms"][0]["interpolation"] == "nearest"
    assert DataSettings.model_validate_json(json.dumps(dumped)).model_dump(mode="json") == dumped
    assert steps.user_transforms(training=False) == ()
    assert steps.without_augmentation().transforms == ()
