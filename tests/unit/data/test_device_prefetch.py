"""Prefetching: every batch once, in order, with equal content on the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mtl_dist.batch import Batch
from mtl_dist.data.device_prefetch import device_prefetch


def batch_of(number: int) -> Batch:
    return Batch(
        images_BCHW=torch.full((2, 3, 64, 64), number, dtype=torch.uint8),
        targets={"digit": torch.tensor([number, number + 1])},
        labelled={"digit": torch.tensor([True, False])},
        valid_B=torch.tensor([True, True]),
        positions_B=torch.tensor([2 * number, 2 * number + 1]),
        keys=[str(number), "x"],
    )


def check(device: torch.device, count: int) -> None:
    hosts = [batch_of(number) for number in range(count)]
    found = list(device_prefetch(hosts, device))
    assert [host for host, _ in found] == hosts
    for host, copy in found:
        assert copy.images_BCHW.device.type == device.type
        assert torch.equal(copy.images_BCHW.cpu(), host.images_BCHW)
        assert torch.equal(copy.targets["digit"].cpu(), host.targets["digit"])
        assert copy.keys == host.keys


@pytest.mark.parametrize("count", [0, 1, 5])
def test_every_batch_comes_once_and_in_order(count: int) -> None:
    check(torch.device("cpu"), count)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("count", [0, 1, 5, 50])
def test_copies_to_a_gpu_are_whole(count: int) -> None:
    check(torch.device("cuda"), count)


def test_without_a_gpu_no_batch_is_fetched_early() -> None:
    fetched = []

    def batches() -> Iterator[Batch]:
        for number in range(3):
            fetched.append(number)
            yield batch_of(number)

    next(device_prefetch(batches(), torch.device("cpu")))
    assert fetched == [0]
