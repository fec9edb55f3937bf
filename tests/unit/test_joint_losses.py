"""A joint loss is a term of the total loss: a mean over the samples of the whole window that it counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtl_dist.assemble import check_device
from mtl_dist.balance.methods import build_balancer
from mtl_dist.balancing import Balancing
from mtl_dist.batch import Batch
from mtl_dist.config.loading import resolved_settings
from mtl_dist.engine.accelerated import AccelerateEngine
from mtl_dist.engine.world import World
from mtl_dist.errors import UserError
from mtl_dist.models.building import build_model
from mtl_dist.models.settings import ModelSettings
from mtl_dist.recipe import Recipe
from mtl_dist.specs import TaskInfo
from mtl_dist.step import RootModule, Weights, WindowTotals, count_labels
from mtl_dist.tasks.joint import Joint, JointLoss, try_joint
from mtl_dist.tasks.registry import build_tasks
from mtl_dist.tasks.regression import RegressionSettings
from tests.batch_partition import cut
from tests.joint_losses import Agreement, Detached, Misshapen, Unlabelled
from tests.unit.test_step import ALONE, INFOS, SETTINGS, SIZE, assert_same, make_batch


def recipe_of(**joint: Any) -> Recipe:
    stated = {"kind": "tests.joint_losses.Agreement", "tasks": ["kind", "mask"], **joint}
    return resolved_settings(
        Recipe,
        {
            "tasks": {"kind": {"kind": "classification"}, "mask": {"kind": "segmentation"}},
            "joint_losses": {"both": stated},
            "data": {"train": [{"path": "data/x"}], "image_size": 8},
        },
    )


def make_root(loss: Agreement, balance: dict[str, Any], world: World = ALONE) -> RootModule:
    torch.manual_seed(0)
    built = build_tasks({name: SETTINGS[name].model_copy(update={"weight": 1.0}) for name in INFOS}, INFOS)
    model = build_model(
        ModelSettings(backbone="simple_cnn", norm="group"), [t.head for t in built.values()], 1, (SIZE, SIZE)
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    joint = Joint("both", {name: built[name] for name in ("kind", "mask")}, 1.0, loss, "tests.joint_losses")
    names = [*built, "both"]
    settings = resolved_settings(
        Recipe, {"balance": balance, "data": {"train": [{"path": "x"}], "image_size": 8}}
    ).balance
    balancer = build_balancer(settings, names, dict.fromkeys(built, 1.0), dict.fromkeys(names, 1.0))
    return RootModule(model, built, balancer, world, "fp32", [joint])


def totals_of(root: RootModule, window: list[Batch]) -> WindowTotals:
    return WindowTotals(count_labels(root.tasks, window, root.joints), len(window), 0)


def gradients(root: RootModule, window: list[Batch], weights: Weights) -> dict[str, torch.Tensor]:
    root.zero_grad()
    totals = totals_of(root, window)
    for batch in window:
        root(batch, totals, weights)[0].backward()
    return {name: p.grad for name, p in root.named_parameters() if p.grad is not None}


def by_hand(root: RootModule, batch: Batch) -> torch.Tensor:
    outputs = root.predict(batch.images_BCHW)
    values = root.joints[0].loss.numerators(outputs, batch.targets, batch.labelled)
    both = batch.labelled["kind"] & batch.labelled["mask"]
    return values[both].mean()


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_its_gradient_is_that_of_a_mean_over_all_samples_of_the_window_that_have_the_labels(
    parts: int,
) -> None:
    batch = make_batch(16, missing=0.4)
    root = make_root(Agreement(), {"method": "fixed"})
    root.zero_grad()
    by_hand(root, batch).backward()
    expected = {name: p.grad for name, p in root.named_parameters() if p.grad is not None and p.grad.any()}
    found = gradients(root, cut(batch, parts), Weights(torch.tensor([0.0, 0.0, 0.0, 1.0])))
    assert_same({name: found[name] for name in expected}, expected)


def test_two_ranks_whose_labels_are_unequal_learn_what_one_process_learns() -> None:
    batch = make_batch(16, missing=0.6)
    alone, one = Weights(torch.tensor([0.0, 0.0, 0.0, 1.0])), make_root(Agreement(), {"method": "fixed"})
    expected = gradients(one, [batch], alone)
    two = make_root(
        Agreement(), {"method": "fixed"}, World(rank=0, size=2, local_rank=0, device=ALONE.device)
    )
    ranks = cut(batch, 2)
    counts_T = count_labels(two.tasks, ranks, two.joints)
    found = []
    for part in ranks:
        two.zero_grad()
        two(part, WindowTotals(counts_T, 1, 0), alone)[0].backward()
        found.append({n: p.grad.clone() for n, p in two.named_parameters() if p.grad is not None})
    assert_same({name: (found[0][name] + found[1][name]) / 2 for name in expected}, expected)


@pytest.mark.parametrize("level", ["features", "parameters"])
def test_to_balancing_it_is_one_task_more(level: str) -> None:
    """The heads get the plain gradients of all losses, the shared part those that are weighted."""
    root = make_root(Agreement(), {"method": "cagrad", "level": level})
    batch = make_batch(16, missing=0.2)
    optimizer = torch.optim.SGD(root.parameters(), lr=0.0)
    engine = AccelerateEngine(None, ALONE, root, optimizer)
    balancing = Balancing(root, engine, seed=0)
    totals = totals_of(root, [batch])
    engine.forward_backward(batch, totals, balancing.solve([batch], totals), last=True)
    found = {name: p.grad.clone() for name, p in root.named_parameters() if p.grad is not None}
    weights_T = root.balancer.last_weights_T
    assert weights_T.shape == (4,) and (weights_T > 0).all()
    shared = {id(p) for p in root.shared}
    each = [gradients(root, [batch], Weights(torch.eye(4)[t])) for t in range(4)]
    for name, parameter in root.named_parameters():
        parts = torch.stack([own.get(name, torch.zeros_like(parameter)) for own in each])
        factors = weights_T if id(parameter) in shared else torch.ones(4)
        expected = (factors.view(4, *[1] * parameter.dim()) * parts).sum(0)
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-6, msg=name)


def test_a_head_is_passed_by_only_where_neither_its_task_nor_a_joint_loss_has_a_label() -> None:
    window = [make_batch(8, absent=("kind", "age"))]
    labelled, free = (make_root(loss(), {"method": "uncertainty"}) for loss in (Agreement, Unlabelled))
    absent = labelled.absent_parameters(totals_of(labelled, window))
    assert {id(p) for p in labelled.task_parameters("kind")} <= {id(p) for p in absent}
    absent = free.absent_parameters(totals_of(free, window))
    heads = {id(p) for p in free.model.task_parameters("kind")}
    assert heads.isdisjoint(id(p) for p in absent)
    assert id(free.balancer.scales["kind"]) in {id(p) for p in absent}
    assert gradients(free, window, Weights(torch.tensor([0.0, 0.0, 1.0, 1.0])))


def test_samples_that_it_does_not_count_add_nothing_whatever_their_outputs_are() -> None:
    root = make_root(Agreement(), {"method": "fixed"})
    batch = make_batch(8, missing=0.5)
    outputs = root.predict(batch.images_BCHW)
    before = root.joints[0].loss_sum(outputs, batch)
    used = batch.labelled["kind"] & batch.labelled["mask"]
    assert used.any() and not used.all()
    outputs["kind"] = torch.where(used[:, None], outputs["kind"].detach(), torch.inf).requires_grad_()
    after = root.joints[0].loss_sum(outputs, batch)
    after.backward()
    assert torch.equal(before, after)
    assert outputs["kind"].grad is not None and outputs["kind"].grad.isfinite().all()


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (Misshapen(), r"expected numerators of shape \(\d+,\), one for each sample, found \(\)"),
        (Detached(), "expected a loss with a gradient, found none"),
    ],
)
def test_one_that_is_wrong_is_refused_before_training(loss: Agreement, line: str) -> None:
    root = make_root(loss, {"method": "fixed"})
    with pytest.raises(UserError, match=f"joint_losses.both: {line}"):
        try_joint(root.joints[0], root.tasks)


@pytest.mark.parametrize(
    ("stated", "line"),
    [
        ({"tasks": ["kind", "masc"]}, "joint_losses.both.tasks: expected tasks of the recipe, found 'masc'"),
        ({"kind": "tests.joint_losses.Agrement"}, "Did you mean Agreement?"),
        ({"sharpnes": 1.0}, "sharpness"),
    ],
)
def test_settings_that_do_not_fit_are_refused(stated: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        recipe_of(**stated)


def test_an_engine_that_divides_the_weights_is_refused_by_name() -> None:
    choice = SimpleNamespace(
        name="ZeRO 3", shards_parameters=True, divides_updates=True, WHOLE_PARAMETERS="engine.zero_stage to 2"
    )
    with pytest.raises(UserError, match=r"joint_losses: expected none under ZeRO 3, .*found both"):
        check_device(recipe_of(), torch.device("cpu"), choice)  # type: ignore[arg-type]


class Tie(JointLoss):
    def numerators(
        self,
        outputs: dict[str, torch.Tensor],
        targets: dict[str, torch.Tensor],
        labelled: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        return (outputs["size"][:, 0] - targets["size"]).square()


def test_a_joint_loss_sees_targets_as_the_tasks_own_losses_do() -> None:
    """Outputs and targets of a standardised regression are in one space."""
    info = TaskInfo("regression", (), 10, mean=4.0, std=2.0)
    task = RegressionSettings().build("size", info)
    joint = Joint("tie", {"size": task}, 1.0, Tie(), "tests.joint_losses")
    output, target = torch.randn(5, 1), 4.0 + 2.0 * torch.randn(5)
    labelled_B = torch.tensor([True, True, False, True, True])
    batch = Batch(
        images_BCHW=torch.zeros(5, 1, 1, 1),
        targets={"size": target},
        labelled={"size": labelled_B},
        valid_B=torch.ones(5, dtype=torch.bool),
        positions_B=torch.arange(5),
        keys=[""] * 5,
    )
    assert torch.equal(joint.loss_sum({"size": output}, batch), task.loss_sum(output, target, labelled_B))
    assert joint.count(batch) == task.count(target, labelled_B)
