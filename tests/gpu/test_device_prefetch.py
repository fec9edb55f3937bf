"""Batches copied to the GPU while it still computes are the host's, in order and whole."""

from __future__ import annotations

import torch

from mtl_dist.batch import Batch
from mtl_dist.data.device_prefetch import device_prefetch
from tests.gpu.runs_on_devices import DEVICE

NUM_BATCHES = 12


def batch(number: int) -> Batch:
    everywhere = torch.ones(4, dtype=torch.bool)
    made = Batch(
        images_BCHW=torch.full((4, 3, 256, 256), number, dtype=torch.uint8),
        targets={"a": torch.full((4,), number)},
        labelled={"a": everywhere},
        valid_B=everywhere,
        positions_B=torch.arange(4) + 4 * number,
        keys=[str(number)] * 4,
    )
    return made.pin_memory() if DEVICE.type == "cuda" else made


def test_every_batch_arrives_whole_and_in_order_while_the_device_is_busy() -> None:
    busy = torch.randn(2048 if DEVICE.type == "cuda" else 64, device=DEVICE).repeat(64, 1)
    means = []
    for number, (on_host, on_device) in enumerate(device_prefetch(map(batch, range(NUM_BATCHES)), DEVICE)):
        for _ in range(20):
            busy = busy @ busy.T @ busy / busy.numel()
        assert on_host.positions_B[0] == 4 * number
        assert on_device.images_BCHW.device.type == DEVICE.type
        means.append(on_device.images_BCHW.float().mean() + on_device.targets["a"].float().mean())
        del on_device
    assert torch.stack(means).tolist() == [2.0 * number for number in range(NUM_BATCHES)]
