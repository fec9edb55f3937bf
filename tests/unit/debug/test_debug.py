"""What `mtl train --debug` says of gradients, losses and labels."""

from __future__ import annotations

import math

import pytest
import torch

from mtl_dist.batch import Batch
from mtl_dist.debug.gradients import GradientWatch
from mtl_dist.debug.pictures import Section, batch_picture, words_of
from mtl_dist.debug.verdict import Seen, about_not_finite, about_rate
from mtl_dist.models.building import build_model
from mtl_dist.models.settings import ModelSettings
from mtl_dist.specs import HeadSpec, TaskInfo

TASKS = {
    "digit": TaskInfo("classification", ("zero", "one", "two")),
    "tags": TaskInfo("multilabel", ("red", "round")),
    "size": TaskInfo("regression", unit="mm"),
    "shape": TaskInfo("segmentation", ("background", "ink")),
}


def watched(change: float | None) -> GradientWatch:
    """A model after two backwards, with the digit's loss times `change` (None: without it)."""
    torch.manual_seed(0)
    heads = [HeadSpec("digit", "vector", 3), HeadSpec("size", "vector", 1)]
    model = build_model(ModelSettings(backbone="simple_cnn"), heads, 3, (8, 8))
    watch = GradientWatch(model)
    for _ in range(2):
        outputs = model(torch.rand(4, 3, 8, 8) * 255)
        lost = outputs["size"].square().sum()
        if change is not None:
            lost = lost + change * outputs["digit"].square().sum()
        model.zero_grad()
        lost.backward()
        watch.look()
    return watch


def test_layers_that_no_gradient_reaches_are_named_and_others_not() -> None:
    assert watched(1.0).dead == []
    dead = watched(None)
    assert {name.split(".")[1] for name in dead.dead} == {"digit"}
    assert any(line.startswith("  no gradient reaches heads.digit") for line in dead.lines())
    assert any(line.startswith("  heads.size: ") for line in dead.lines())


@pytest.mark.parametrize("change", [1e9, math.inf, math.nan])
def test_layers_whose_gradients_explode_are_named(change: float) -> None:
    assert watched(1.0).exploding == []
    assert any(name.startswith(("heads.digit", "backbone")) for name in watched(change).exploding)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.3 - i * 1e-5 for i in range(40)], "try a larger one, such as 0.01"),
        ([2.3 * 0.99**i for i in range(40)], "and still fell: try a larger one, such as 0.01"),
        ([2.3 + math.sin(i) + i / 10 for i in range(40)], "try a smaller one, such as 0.0001"),
        (
            [2.3, 512.0, 90.0] + [1.49] * 37,
            "stayed at 1.49 in 40 steps at optim.lr=0.001: try a smaller one, such as 0.0001",
        ),
        ([2.3, 512.0] + [90 * 0.9**i + 1 for i in range(38)], "try a smaller one, such as 0.0001"),
        ([2.3 * 0.5**i + 1 for i in range(40)], ""),
        ([2.3] * 5, ""),
    ],
)
def test_the_course_of_a_loss_says_which_learning_rate_to_try(losses: list[float], expected: str) -> None:
    said = about_rate(Seen({"digit": losses}), "digit", 1e-3)
    assert said.endswith(expected)
    assert bool(said) == bool(expected)


def test_a_loss_that_is_not_finite_is_said_of_its_task_and_ends_the_others() -> None:
    seen = Seen({"digit": [2.3, math.nan], "size": [0.3, 0.2]}, blamed=" (Function 'LogBackward0' ...)")
    assert about_not_finite(seen, "digit") == "Its loss was nan at step 2 (Function 'LogBackward0' ...)"
    assert about_not_finite(seen, "size") == "It ended with the loss of digit, at step 2"
    seen = Seen({"digit": [2.3], "size": [0.3]}, blamed=" (Function 'SqrtBackward0' ...)", bad_gradient=True)
    assert (
        about_not_finite(seen, "size")
        == "The gradient was not finite at step 1 (Function 'SqrtBackward0' ...)"
    )
    assert about_not_finite(Seen({"digit": [2.3, 1.0]}), "digit") == ""


def batch(lam_B: torch.Tensor | None = None) -> Batch:
    """Two samples; the second has no label of size and shape."""
    both = torch.tensor([True, True])
    one = torch.tensor([True, False])
    return Batch(
        images_BCHW=torch.randint(0, 256, (2, 3, 12, 20), dtype=torch.uint8),
        targets={
            "digit": torch.tensor([1, 2]),
            "tags": torch.tensor([[1.0, 1.0], [0.0, 0.0]]),
            "size": torch.tensor([2.5, 0.0]),
            "shape": torch.ones(2, 12, 20, dtype=torch.uint8),
        },
        labelled={"digit": both, "tags": both, "size": one, "shape": one},
        valid_B=both,
        positions_B=torch.tensor([0, 1]),
        keys=["a", "b"],
        lam_B=lam_B,
        partners={} if lam_B is None else {"digit": torch.tensor([0, 0])},
    )


def test_targets_are_put_into_the_words_of_their_labels() -> None:
    shown = [
        words_of(batch(), row, task, TASKS[task]) for row in range(2) for task in ("digit", "tags", "size")
    ]
    assert shown == ["one", "red, round", "2.5 mm", "two", "none", "no label"]
    blended = batch(torch.tensor([0.75, 1.0]))
    assert [words_of(blended, row, "digit", TASKS["digit"]) for row in range(2)] == [
        "0.75 one + 0.25 zero",
        "two",
    ]


def test_a_picture_holds_every_batch_with_its_masks_laid_over() -> None:
    one, two = (batch_picture([Section("as trained", batch())] * number, TASKS) for number in (1, 2))
    assert two.width == one.width
    assert two.height > one.height + 208
    plain = batch()
    plain.labelled["shape"][:] = False
    assert one.tobytes() != batch_picture([Section("as trained", plain)], TASKS).tobytes()


def test_a_picture_has_no_lines_for_maps_which_say_nothing_in_words() -> None:
    maps = {name: TASKS["shape"] for name in ("shape", "other", "third")}
    both = batch()
    for name in maps:
        both.targets[name], both.labelled[name] = both.targets["shape"], torch.tensor([True, True])
    none, one = (batch_picture([Section("", both)], maps | more) for more in ({}, {"digit": TASKS["digit"]}))
    legend = 5  # the words of one line of a cell, less what the legend's rows differ by
    assert none.height < one.height
    assert none.height < 24 + 34 + 208 + 2 * 19 + 16 + 3 * 24 + legend
