"""Mixup and CutMix: torchvision's pictures, the same on any cut, no label lost, none invented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as vision
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors

from mtl_dist.batch import Batch
from mtl_dist.data import blend as blend_module
from mtl_dist.data.blend import Blender, BlendSettings, cut_box, draw_beta, mix_up
from mtl_dist.data.loader import open_data, train_loader
from mtl_dist.data.settings import DataSettings
from mtl_dist.errors import UserError
from mtl_dist.randomness import Draws, derive_key
from mtl_dist.specs import TaskInfo
from mtl_dist.step import count_labels, over_labels
from mtl_dist.tasks.classification import ClassificationSettings
from mtl_dist.tasks.multilabel import MultilabelSettings
from tests.tiny_datasets import write_dataset

TRAIN = 24
MIXABLE = ("digit", "value", "tags")
CUTTABLE = ("digit", "tags", "shape")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny", {"train": TRAIN, "val": 4})


def batches(
    path: Path, blend: dict[str, float] | None, tasks: tuple[str, ...], **options: Any
) -> list[Batch]:
    stated = {"train": [{"path": str(path)}], "image_size": [8, 10], "augment": "none", "blend": blend}
    data = open_data(DataSettings.model_validate(stated, strict=False), tasks)
    cut = {"seed": 3, "global_batch": 6, "accumulation": 1, "rank": 0, "world_size": 1, "workers": 0}
    stretch = {"start_position": 0, "end_position": 2 * TRAIN, "pin_memory": False}
    return list(train_loader(data, **{**cut, **stretch, **options}))


def by_position(found: list[Batch]) -> dict[int, tuple[Any, ...]]:
    samples = {}
    for batch in found:
        assert batch.lam_B is not None
        for i, position in enumerate(batch.positions_B.tolist()):
            if batch.valid_B[i]:
                labels = [
                    (
                        name,
                        batch.targets[name][i].tolist(),
                        batch.partners.get(name, batch.positions_B)[i].item(),
                    )
                    for name in batch.targets
                    if batch.labelled[name][i] and name in batch.partners
                ] + [
                    (name, batch.targets[name][i].tolist())
                    for name in batch.targets
                    if batch.labelled[name][i] and name not in batch.partners
                ]
                samples[position] = (
                    batch.keys[i],
                    batch.images_BCHW[i].tolist(),
                    float(batch.lam_B[i]),
                    labels,
                )
    return samples


# ---------------------------------------------------------------- as torchvision does it
@pytest.mark.parametrize("lam", [0.0, 0.125, 0.5, 0.9, 1.0])
def test_mixup_makes_torchvisions_picture(lam: float) -> None:
    images = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8)
    theirs = vision.MixUp(num_classes=3)
    theirs._dist = torch.distributions.Categorical(torch.ones(1))
    theirs.make_params = lambda _: {"labels": labels, "batch_size": 2, "lam": lam}  # type: ignore[method-assign]
    labels = torch.tensor([2, 0])
    expected, soft = theirs(images.float(), labels)

    ours = images.permute(0, 2, 3, 1).contiguous()
    mix_up(ours, 0, 1, lam)
    assert (ours.permute(0, 3, 1, 2).float() - expected).abs().max() <= 0.5 + 1e-4
    floats = images.permute(0, 2, 3, 1).float()
    mix_up(floats, 0, 1, lam)
    torch.testing.assert_close(floats.permute(0, 3, 1, 2), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(soft[0], torch.tensor([1 - lam, 0, lam]))


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.77, 1.0])
def test_cutmix_makes_torchvisions_picture(lam: float, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (2, 3, 33, 20), dtype=torch.uint8)
    masks = torch.randint(0, 4, (2, 33, 20), dtype=torch.uint8)
    for key in range(20):
        box = cut_box(33, 20, lam, Draws(key))
        draws = Draws(key)
        centre = (int(draws.uniform(0, 20)), int(draws.uniform(0, 33)))
        numbers = iter(centre)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda *a, numbers=numbers, **k: torch.tensor([next(numbers)]))
            patch.setattr(torch.distributions.Beta, "sample", lambda self, shape: torch.tensor(lam))
            expected, soft = vision.CutMix(num_classes=3)(tv_tensors.Image(images), torch.tensor([2, 0]))
        ours, own_masks = images.permute(0, 2, 3, 1).contiguous(), masks.clone()
        monkeypatch.setattr(blend_module, "draw_beta", lambda alpha, draws: lam)
        monkeypatch.setattr(blend_module, "cut_box", lambda *a, box=box: box)
        blended = Blender(BlendSettings(cutmix=1.0), key, frozenset({"digit"})).blend(
            np.arange(2),
            np.ones(2, bool),
            ours,
            {"mask": own_masks},
            {"digit": np.array([2, 0])},
            {"digit": np.ones(2, bool), "mask": np.ones(2, bool)},
        )
        assert torch.equal(ours.permute(0, 3, 1, 2), expected)
        assert soft[0, 2].item() == pytest.approx(blended.lam_B[0], abs=1e-6)
        assert blended.partners["digit"].tolist() == [0, 2]
        inside = torch.zeros(33, 20, dtype=torch.bool)
        box.of(inside)[:] = True
        assert torch.equal(own_masks, torch.where(inside, masks.flip(0), masks))
        monkeypatch.undo()


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4999, 0.5, 0.8, 1.0, 2.0, 8.0])
def test_the_shares_are_beta_distributed(alpha: float) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    draws = Draws(5)
    values = [draw_beta(alpha, draws) for _ in range(4000)]
    assert scipy_stats.kstest(values, scipy_stats.beta(alpha, alpha).cdf).pvalue > 1e-3


# ---------------------------------------------------------------- the same on any cut
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_blended_sample_is_the_same_however_the_stream_is_cut(tiny: Path, data: st.DataObject) -> None:
    blend, tasks = data.draw(
        st.sampled_from([({"mixup": 0.4, "probability": 0.7}, MIXABLE), ({"cutmix": 1.0}, CUTTABLE)])
    )
    global_batch, end = 6, data.draw(st.integers(1, 40))
    whole = by_position(batches(tiny, blend, tasks, global_batch=1, end_position=end))
    world_size = data.draw(st.sampled_from([1, 2, 3, 6]))
    accumulation = data.draw(st.sampled_from([a for a in (1, 2, 3) if 6 % (a * world_size) == 0]))
    found: list[Batch] = []
    for rank in range(world_size):
        cut = {"global_batch": global_batch, "accumulation": accumulation, "world_size": world_size}
        found += batches(tiny, blend, tasks, **cut, rank=rank, end_position=end)
    assert by_position(found) == whole
    start = data.draw(st.integers(0, end - 1))
    resumed = by_position(batches(tiny, blend, tasks, start_position=start, end_position=end))
    assert resumed == {position: whole[position] for position in range(start, end)}


def test_workers_change_nothing(tiny: Path) -> None:
    alone = by_position(batches(tiny, {"mixup": 0.4}, MIXABLE, global_batch=3))
    assert by_position(batches(tiny, {"mixup": 0.4}, MIXABLE, global_batch=3, workers=2)) == alone


def test_some_pairs_are_blended_and_every_seed_blends_differently(tiny: Path) -> None:
    one = by_position(batches(tiny, {"mixup": 1.0}, ("digit",)))
    other = by_position(batches(tiny, {"mixup": 1.0}, ("digit",), seed=4))
    lams = [sample[2] for sample in one.values()]
    assert sum(lam < 1 for lam in lams) > TRAIN
    assert [sample[2] for sample in other.values()] != lams
    first, second = lams[:TRAIN], lams[TRAIN:]
    assert first != second


# ---------------------------------------------------------------- labels
def test_a_pair_is_blended_only_where_both_have_the_same_labels_and_none_is_lost(tiny: Path) -> None:
    plain = {
        int(p): (
            [bool(batch.labelled[t][i]) for t in CUTTABLE],
            batch.images_BCHW[i],
            batch.targets["shape"][i],
        )
        for batch in batches(tiny, None, CUTTABLE)
        for i, p in enumerate(batch.positions_B)
    }
    blended = 0
    for batch in batches(tiny, {"cutmix": 1.0}, CUTTABLE):
        assert batch.lam_B is not None
        for i, position in enumerate(batch.positions_B.tolist()):
            labelled, image, mask = plain[position]
            assert [bool(batch.labelled[t][i]) for t in CUTTABLE] == labelled
            if labelled != plain[position ^ 1][0]:
                assert batch.lam_B[i] == 1 and torch.equal(batch.images_BCHW[i], image)
                assert torch.equal(batch.targets["shape"][i], mask)
            else:
                blended += 1
                pasted = batch.images_BCHW[i, 2] != 255  # blue is 100 times the mask
                if labelled[2]:
                    assert torch.equal(
                        batch.images_BCHW[i, 2][pasted], 100 * batch.targets["shape"][i][pasted]
                    )
    assert blended > TRAIN // 2


def test_numbers_and_multilabel_targets_are_interpolated(tiny: Path) -> None:
    plain = {
        int(p): {name: batch.targets[name][i] for name in MIXABLE}
        for batch in batches(tiny, None, MIXABLE)
        for i, p in enumerate(batch.positions_B)
    }
    for batch in batches(tiny, {"mixup": 1.0}, MIXABLE):
        assert batch.lam_B is not None and list(batch.partners) == ["digit"]
        for i, position in enumerate(batch.positions_B.tolist()):
            lam, own, other = batch.lam_B[i], plain[position], plain[position ^ 1]
            assert batch.targets["digit"][i] == own["digit"]
            if lam < 1:
                assert batch.partners["digit"][i] == other["digit"]
                for name in ("value", "tags"):
                    torch.testing.assert_close(
                        batch.targets[name][i], lam * own[name] + (1 - lam) * other[name]
                    )


def test_a_bad_partner_leaves_a_sample_as_it_is() -> None:
    images = torch.randint(0, 256, (4, 5, 5, 3), dtype=torch.uint8)
    before = images.clone()
    blended = Blender(BlendSettings(mixup=1.0), 1, frozenset({"digit"})).blend(
        np.arange(4),
        np.array([True, False, True, True]),
        images,
        {},
        {"digit": np.arange(4)},
        {"digit": np.array([True, False, True, True])},
    )
    assert torch.equal(images[:2], before[:2]) and blended.lam_B[:2].tolist() == [1, 1]
    assert not torch.equal(images[2:], before[2:])


# ---------------------------------------------------------------- losses
@pytest.mark.parametrize(
    "loss",
    [
        {"kind": "cross_entropy"},
        {"kind": "cross_entropy", "label_smoothing": 0.1},
        {"kind": "cross_entropy", "class_weights": [1.0, 2.0, 0.5]},
        {"kind": "focal", "gamma": 2.0},
    ],
)
def test_the_loss_of_a_blended_class_is_the_shares_of_both(loss: dict[str, Any]) -> None:
    info = TaskInfo("classification", ("a", "b", "c"), 10, (3, 3, 4))
    task = ClassificationSettings.model_validate({"loss": loss}, strict=False).build("digit", info)
    own, partner = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0, 2, 0])
    labelled_B = torch.tensor([True, True, True, False])
    lam_B = torch.tensor([0.3, 0.3, 0.6, 0.5])
    batch = Batch(
        torch.zeros(4, 3, 2, 2), {"digit": own}, {"digit": labelled_B}, labelled_B, torch.arange(4), [""] * 4,
        lam_B=lam_B, partners={"digit": partner},
    )  # fmt: skip
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    expected = sum(
        lam * task.loss_sum(logits[i : i + 1], of[i : i + 1], labelled_B[i : i + 1])
        for i in range(4)
        for lam, of in ((lam_B[i], own), (1 - lam_B[i], partner))
    )
    found = over_labels(lambda *a: task.loss_sum(logits, *a), batch, "digit")
    torch.testing.assert_close(found, torch.as_tensor(expected))
    count = count_labels({"digit": task}, [batch])
    if loss["kind"] == "cross_entropy" and "class_weights" not in loss:
        soft = lam_B[:, None] * F.one_hot(own, 3) + (1 - lam_B[:, None]) * F.one_hot(partner, 3)
        smooth = loss.get("label_smoothing", 0.0)
        theirs = F.cross_entropy(logits, soft, reduction="none", label_smoothing=smooth)
        torch.testing.assert_close(found, theirs[:3].sum())
        assert count == 3
    # Both samples of a pair have the same lam, so what is counted is what would be without blending.
    pair = Batch(
        batch.images_BCHW[:2], {"digit": own[:2]}, {"digit": labelled_B[:2]}, labelled_B[:2],
        torch.arange(2), [""] * 2, lam_B=lam_B[:2], partners={"digit": own[:2].flip(0)},
    )  # fmt: skip
    torch.testing.assert_close(
        count_labels({"digit": task}, [pair])[0].float(), task.count(own[:2], labelled_B[:2])
    )


def test_interpolating_multilabel_targets_is_the_shares_of_both_losses() -> None:
    info = TaskInfo("multilabel", ("p", "q", "r"), 10, (3, 3, 4))
    stated = {"loss": {"kind": "bce", "pos_weight": [2.0, 1.0, 3.0]}}
    task = MultilabelSettings.model_validate(stated, strict=False).build("tags", info)
    logits = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    own, other, here = torch.tensor([[1.0, 0, 1]]), torch.tensor([[0.0, 0, 1]]), torch.tensor([True])
    torch.testing.assert_close(
        task.loss_sum(logits, 0.3 * own + 0.7 * other, here),
        0.3 * task.loss_sum(logits, own, here) + 0.7 * task.loss_sum(logits, other, here),
    )


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("blend", "tasks", "message"),
    [
        ({"mixup": 0.2}, ("digit", "shape"), "data.blend.mixup: expected no segmentation tasks, found shape"),
        ({"cutmix": 1.0}, ("value", "digit"), "data.blend.cutmix: expected no regression tasks, found value"),
    ],
)
def test_a_way_that_does_not_suit_a_task_is_refused_by_its_name(
    tiny: Path, blend: dict[str, float], tasks: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        batches(tiny, blend, tasks)


def test_a_blend_of_neither_way_is_refused() -> None:
    with pytest.raises(ValueError, match="expected mixup, cutmix or both, found neither"):
        BlendSettings()


def test_of_two_ways_each_is_taken() -> None:
    blender = Blender(BlendSettings(mixup=1.0, cutmix=1.0), 2)
    ways = [blender.mixes(Draws(derive_key(2, k))) for k in range(200)]
    assert 60 < sum(ways) < 140
