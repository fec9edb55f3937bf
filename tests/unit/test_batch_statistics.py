"""BatchNorm's running statistics rest on what was seen, however short a run is."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from mtl_dist.batch_statistics import BatchStatistics
from mtl_dist.models.norms import FrozenBatchNorm2d


def batches(number: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 + 2 * torch.randn(6, 4, 5, 5, generator=generator) for _ in range(number)]


def train(model: nn.Module, inputs: Sequence[Tensor], accumulation: int = 1) -> BatchStatistics:
    statistics = BatchStatistics(model)
    model.train()
    for start in range(0, len(inputs), accumulation):
        statistics.begin()
        for batch in inputs[start : start + accumulation]:
            model(batch)
        statistics.finish(accumulation)
    return statistics


def expected(inputs: Sequence[Tensor], momentum: float) -> tuple[Tensor, Tensor]:
    mean = variance = torch.zeros(4, dtype=torch.float64)
    for t, batch in enumerate(inputs, start=1):
        weight = max(momentum, 10 / (t + 9))
        mean = mean + weight * (batch.double().mean((0, 2, 3)) - mean)
        variance = variance + weight * (batch.double().var((0, 2, 3)) - variance)
    return mean, variance


@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 120])
def test_after_step_t_the_newest_batch_has_the_weight_max_of_momentum_and_10_over_t_plus_9(
    momentum: float, steps: int
) -> None:
    norm = nn.BatchNorm2d(4, momentum=momentum)
    train(norm, batches(steps))
    mean, variance = expected(batches(steps), momentum)
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-5, atol=1e-6)
    assert norm.num_batches_tracked == steps


def test_a_window_of_micro_batches_counts_as_one_step() -> None:
    norm = nn.BatchNorm2d(4, momentum=1e-6)
    train(norm, batches(8), accumulation=4)
    first, second = (torch.cat(batches(8)[at : at + 4]) for at in (0, 4))
    mean, _ = expected([first, second], momentum=1e-6)
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-5)


def test_the_update_is_that_of_torch_to_the_bit_where_momentum_decides() -> None:
    """After 10 / momentum - 9 batches, and of statistics that came with weights."""
    for count, mean in ((91, 0.0), (5000, 2.0), (0, 2.0)):
        norm = nn.BatchNorm2d(4)
        norm.num_batches_tracked.fill_(count)
        norm.running_mean.fill_(mean)
        plain = copy.deepcopy(norm)
        train(norm, batches(3))
        for batch in batches(3):
            plain(batch)
        assert torch.equal(norm.running_mean, plain.running_mean)
        assert torch.equal(norm.running_var, plain.running_var)


def test_layers_that_do_not_learn_statistics_or_do_not_run_stay() -> None:
    model = nn.ModuleList([FrozenBatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4).eval()])
    before = copy.deepcopy(model.state_dict())
    statistics = BatchStatistics(model)
    statistics.begin()
    statistics.finish(1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_going_on_from_a_state_equals_never_stopping() -> None:
    whole, part = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    train(whole, batches(20))
    train(part, batches(20)[:6])
    resumed = nn.BatchNorm2d(4)
    resumed.load_state_dict(part.state_dict())
    train(resumed, batches(20)[6:])
    assert torch.equal(whole.running_mean, resumed.running_mean)
    assert torch.equal(whole.running_var, resumed.running_var)


class Part(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.norm(images)
        return found


def test_a_compiled_layer_is_compiled_once() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    norm = nn.BatchNorm2d(4, momentum=0.2)
    part = Part(norm)  # older releases of torch leave a layer of theirs alone
    part.compile(backend=counter)
    train(part, batches(8))
    assert counter.frame_count == 1
    mean, _ = expected(batches(8), 0.2)
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
