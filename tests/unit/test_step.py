"""The root module's gradient is that of the mean over the labelled samples of the whole window, however the
window is cut and wherever its labels lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mtl_dist.balance.fixed import Fixed
from mtl_dist.balance.methods import build_balancer
from mtl_dist.batch import Batch
from mtl_dist.engine.accelerated import AccelerateEngine
from mtl_dist.engine.world import World
from mtl_dist.errors import UserError
from mtl_dist.models.building import build_model
from mtl_dist.models.settings import ModelSettings
from mtl_dist.optim import OptimSettings, build_optimizer
from mtl_dist.specs import TaskInfo
from mtl_dist.step import RootModule, Weights, WindowTotals, count_labels
from mtl_dist.tasks.classification import ClassificationSettings
from mtl_dist.tasks.registry import build_tasks
from mtl_dist.tasks.regression import RegressionSettings
from mtl_dist.tasks.segmentation import SegmentationSettings
from tests.batch_partition import cut

SIZE = 8
INFOS = {
    "kind": TaskInfo("classification", classes=("a", "b", "c"), num_labelled=9, class_counts=(3, 3, 3)),
    "age": TaskInfo("regression", num_labelled=9, mean=40.0, std=10.0),
    "mask": TaskInfo("segmentation", classes=("no", "yes"), num_labelled=9, class_counts=(9, 9)),
}
WEIGHTS = Weights(torch.tensor([1.0, 0.5, 2.0]))
SETTINGS = {
    "kind": ClassificationSettings(weight=1.0),
    "age": RegressionSettings(weight=0.5),
    "mask": SegmentationSettings(weight=2.0),
}


ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def make_root(num_ranks: int = 1, seed: int = 0) -> RootModule:
    torch.manual_seed(seed)
    tasks = build_tasks(SETTINGS, INFOS)
    model = build_model(
        ModelSettings(backbone="simple_cnn", norm="group"), [t.head for t in tasks.values()], 1, (SIZE, SIZE)
    )
    factors = {name: task.settings.noise_factor for name, task in tasks.items()}
    weights = {name: settings.weight for name, settings in SETTINGS.items()}
    balancer = build_balancer(Fixed(), list(tasks), factors, weights)
    world = World(rank=0, size=num_ranks, local_rank=0, device=torch.device("cpu"))
    root = RootModule(model, tasks, balancer, world, "fp32")
    for module in root.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return root


def make_batch(num_samples: int, missing: float = 0.0, absent: tuple[str, ...] = (), seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def random_bool() -> torch.Tensor:
        return torch.rand(num_samples, generator=generator) >= missing

    labelled = {name: random_bool() & (name not in absent) for name in INFOS}
    mask = torch.randint(0, 2, (num_samples, SIZE, SIZE), generator=generator).to(torch.uint8)
    mask[~labelled["mask"]] = 255
    return Batch(
        images_BCHW=torch.randint(0, 256, (num_samples, 1, SIZE, SIZE), generator=generator).to(torch.uint8),
        targets={
            "kind": torch.randint(0, 3, (num_samples,), generator=generator) * labelled["kind"],
            "age": torch.randn(num_samples, generator=generator) * 10 + 40,
            "mask": mask,
        },
        labelled=labelled,
        valid_B=torch.ones(num_samples, dtype=torch.bool),
        positions_B=torch.arange(num_samples),
        keys=[str(i) for i in range(num_samples)],
    )


def gradients(root: RootModule, ranks: list[list[Batch]]) -> dict[str, torch.Tensor]:
    """The gradients that an engine would step with: summed over micro-batches, averaged over ranks."""
    counts_T = sum(count_labels(root.tasks, window) for window in ranks)
    totals = WindowTotals(counts_T, num_micro_batches=len(ranks[0]), step=0)
    root.zero_grad()
    for window in ranks:
        for batch in window:
            root(batch, totals, WEIGHTS)[0].backward()
    return {name: p.grad / len(ranks) for name, p in root.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("missing", [0.0, 0.3, 0.8])
def test_any_cut_into_micro_batches_gives_the_same_gradient(missing: float) -> None:
    batch = make_batch(16, missing)
    whole = gradients(make_root(), [[batch]])
    for parts in (2, 4, 16):
        assert_same(gradients(make_root(), [cut(batch, parts)]), whole)


@pytest.mark.parametrize("missing", [0.0, 0.3, 0.8])
def test_any_cut_into_ranks_gives_the_same_gradient(missing: float) -> None:
    batch = make_batch(16, missing)
    whole = gradients(make_root(), [[batch]])
    for num_ranks in (2, 4):
        ranks = [cut(part, 2) for part in cut(batch, num_ranks)]
        assert_same(gradients(make_root(num_ranks), ranks), whole)


def test_a_missing_label_changes_nothing_for_the_other_tasks() -> None:
    full = make_batch(8)
    partial = make_batch(8, absent=("age",))
    with_age, without_age = gradients(make_root(), [[full]]), gradients(make_root(), [[partial]])
    for name in with_age:
        if name.startswith(("model.heads.kind", "model.heads.mask")):
            assert torch.equal(with_age[name], without_age[name]), name
        if name.startswith("model.heads.age"):
            assert without_age[name].abs().max() == 0, name


def test_what_stands_in_the_place_of_a_missing_label_does_not_matter() -> None:
    batch = make_batch(8, missing=0.5)
    nonsense = replace(batch, targets={name: target.clone() for name, target in batch.targets.items()})
    nonsense.targets["age"][~batch.labelled["age"]] = float("nan")
    nonsense.targets["mask"][~batch.labelled["mask"]] = 1
    nonsense.targets["kind"][~batch.labelled["kind"]] = 2
    assert_same(gradients(make_root(), [[nonsense]]), gradients(make_root(), [[batch]]))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_task_without_labels_in_a_window_is_left_untouched(kind: str) -> None:
    root = make_root()
    settings = OptimSettings(kind=kind, lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(settings, root.model, list(root.tasks), [])
    engine = AccelerateEngine(None, ALONE, root, optimizer)

    def step(batch: Batch, number: int) -> None:
        totals = WindowTotals(count_labels(root.tasks, [batch]), 1, number)
        engine.forward_backward(batch, totals, WEIGHTS, last=True)
        engine.step(root.absent_parameters(totals), clip_norm=1.0)

    step(make_batch(8), 0)
    before = engine.full_state()
    step(make_batch(8, absent=("age",)), 1)
    after = engine.full_state()
    for name in before.model:
        if name.startswith("model.heads.age"):
            assert torch.equal(before.model[name], after.model[name]), name
        elif name.startswith("model.heads.kind"):
            assert not torch.equal(before.model[name], after.model[name]), name
    age_state = [name for name in before.optimizer if "model.heads.age" in name]
    assert age_state
    assert all(torch.equal(before.optimizer[name], after.optimizer[name]) for name in age_state)


def test_a_window_without_any_label_gives_a_finite_zero() -> None:
    root = make_root()
    batch = make_batch(4, absent=("kind", "age", "mask"))
    scalar, sums_T, _ = root(batch, WindowTotals(count_labels(root.tasks, [batch]), 1, 0), WEIGHTS)
    scalar.backward()
    assert scalar.item() == 0 and not sums_T.any()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in root.parameters())


def test_the_second_thing_returned_is_each_tasks_loss_sum() -> None:
    root = make_root()
    batch = make_batch(8, missing=0.3)
    totals = WindowTotals(count_labels(root.tasks, [batch]), 1, 0)
    scalar, sums_T, _ = root(batch, totals, WEIGHTS)
    assert not sums_T.requires_grad
    torch.testing.assert_close(sums_T, root.loss_sums(root.predict(batch.images_BCHW), batch))
    torch.testing.assert_close(scalar, (WEIGHTS.loss_T * sums_T / totals.counts_T).sum().float())


def test_a_forward_remembers_nothing_of_the_window_before() -> None:
    root, batch = make_root(), make_batch(8)
    totals = WindowTotals(count_labels(root.tasks, [batch]), 1, 0)
    first = root(batch, totals, WEIGHTS)[0]
    root(make_batch(8, missing=0.5, seed=2), totals, Weights(torch.zeros(3)))
    assert torch.equal(root(batch, totals, WEIGHTS)[0], first)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_state_with_lost_weights_is_refused(value: float) -> None:
    root = make_root()
    engine = AccelerateEngine(None, ALONE, root, torch.optim.AdamW(root.parameters()))
    with torch.no_grad():
        next(root.parameters())[0] = value
    with pytest.raises(UserError, match="expected finite weights"):
        engine.full_state()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_reaches_every_gradient(value: float) -> None:
    """That is how the ranks, which average them, agree to skip the step."""
    root = make_root()
    batch = make_batch(8)
    totals = WindowTotals(count_labels(root.tasks, [batch]), 1, 0)
    losses = root.losses
    root.losses = lambda *args: tuple(
        part if isinstance(part, dict) else part + value for part in losses(*args)
    )
    root(batch, totals, WEIGHTS)[0].backward()
    assert all(p.grad.isnan().any() for p in root.parameters() if p.grad is not None)
