"""Steps on whole batches: MixUp and CutMix of torchvision are data.blend, the user's follow positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_dist.batch import Batch
from mtl_dist.config.loading import resolved_settings
from mtl_dist.data.loader import eval_loader, open_data, train_loader
from mtl_dist.data.settings import DataSettings
from mtl_dist.errors import UserError
from tests.tiny_datasets import write_dataset

V2 = "torchvision.transforms.v2"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny", {"train": 20, "val": 4})


def settings(path: Path | str = "x", *steps: Any, **more: Any) -> DataSettings:
    common = {"image_size": [8, 10], "augment": "none", "workers": 0, "train": [{"path": str(path)}]}
    return resolved_settings(DataSettings, {**common, "transforms": list(steps), **more})


def batches(stated: DataSettings, start: int = 0, accumulation: int = 1) -> list[Batch]:
    data = open_data(stated, ["digit", "tags"])
    loader = train_loader(
        data,
        seed=3,
        global_batch=8,
        accumulation=accumulation,
        rank=0,
        world_size=1,
        start_position=start,
        end_position=24,
        workers=0,
        pin_memory=False,
    )
    return list(loader)


def same(a: list[Batch], b: list[Batch]) -> bool:
    def tensors(batch: Batch) -> list[torch.Tensor]:
        return list(batch.tensors())

    pairs = [
        (x, y) for one, two in zip(a, b, strict=True) for x, y in zip(tensors(one), tensors(two), strict=True)
    ]
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(
    ("step", "blend"),
    [
        ({"kind": f"{V2}.MixUp", "alpha": 0.2}, {"mixup": 0.2}),
        ({"kind": f"{V2}.CutMix", "num_classes": 3}, {"cutmix": 1.0}),
        (f"{V2}.MixUp", {"mixup": 1.0}),
    ],
)
def test_mixup_and_cutmix_of_torchvision_blend_images_and_labels_as_data_blend_does(
    tiny: Path, step: Any, blend: dict[str, float]
) -> None:
    found, expected = batches(settings(tiny, step)), batches(settings(tiny, blend=blend))
    assert same(found, expected)
    assert any(batch.lam_B is not None and (batch.lam_B < 1).any() for batch in found)


def test_a_step_on_batches_is_the_same_after_a_resume_and_acts_in_training_alone(tiny: Path) -> None:
    lifted = settings(tiny, "tests.batch_steps.Lift")
    plain, found = batches(settings(tiny)), batches(lifted)
    differences = {
        (b.images_BCHW - a.images_BCHW).unique().tolist()[0] for a, b in zip(plain, found, strict=True)
    }
    assert len(differences) == 3 and 0 not in differences
    assert all(
        (b.images_BCHW - a.images_BCHW).unique().numel() == 1 for a, b in zip(plain, found, strict=True)
    )
    assert same(batches(lifted, start=8), found[1:])
    data = open_data(lifted, ["digit"])
    bare = open_data(settings(tiny), ["digit"])
    of_val = [
        list(eval_loader(each, "val", batch_size=4, rank=0, world_size=1, workers=0)) for each in (data, bare)
    ]
    assert same(*of_val)


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        (["tests.batch_steps.Shrunk"], r"expected images of torch.uint8 \(8, 3, 8, 10\), found torch.uint8"),
        (["tests.batch_steps.Failing"], r"fails on images \(8, 3, 8, 10\): RuntimeError: no room"),
        ([{"kind": f"{V2}.MixUp", "num_classes": 7}], "expected num_classes of .*MixUp as the data has them"),
    ],
)
def test_a_step_that_does_not_fit_is_one_line(tiny: Path, steps: list[Any], line: str) -> None:
    with pytest.raises(UserError, match=f"data.transforms: {line}|{line}"):
        batches(settings(tiny, *steps))


@pytest.mark.parametrize(
    ("stated", "line"),
    [
        ([f"{V2}.MixUp", f"{V2}.CutMix"], "expected one of MixUp, CutMix and data.blend, found several"),
        (
            [f"{V2}.MixUp", f"{V2}.RandomHorizontalFlip"],
            "expected steps on whole batches after those on images",
        ),
        (
            [{"kind": f"{V2}.MixUp", "training_only": False}],
            "expected training_only with .*MixUp, found false",
        ),
        ([{"kind": f"{V2}.MixUp", "alpha": 1000.0}], "less than or equal to 100"),
    ],
)
def test_settings_that_do_not_fit_are_refused(stated: list[Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        settings("x", *stated)


def test_a_recipe_with_them_reads_back_equal() -> None:
    stated = settings("x", f"{V2}.ColorJitter", f"{V2}.MixUp", "tests.batch_steps.Lift")
    dumped = stated.model_dump(mode="json")
    assert DataSettings.model_validate_json(json.dumps(dumped)).model_dump(mode="json") == dumped
    assert stated.without_augmentation().blending is None
    assert stated.without_augmentation().batch_transforms == ()
