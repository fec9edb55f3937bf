"""Parameter groups under ZeRO: what can be absent alone is never flattened together with anything else."""

from __future__ import annotations

import torch
from torch import nn

from mtl_dist.engine.zero_groups import separate_groups


def test_a_group_is_split_by_the_parts_and_keeps_its_settings() -> None:
    body, first, second = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    scale_1, scale_2 = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.AdamW(
        [
            {"params": [body], "name": "backbone", "lr": 1.0},
            {"params": [first, second], "name": "heads", "lr": 2.0, "base_lr": 2.0},
            {"params": [scale_1, scale_2], "name": "balance", "lr": 3.0, "weight_decay": 0.0},
        ]
    )
    separate_groups(optimizer, [[first, scale_1], [second, scale_2]])
    found = [(group["name"], group["lr"], group["params"]) for group in optimizer.param_groups]
    assert found == [
        ("backbone", 1.0, [body]),
        ("heads", 2.0, [first]),
        ("heads", 2.0, [second]),
        ("balance", 3.0, [scale_1]),
        ("balance", 3.0, [scale_2]),
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01, 0.01, 0.0, 0.0]
    assert optimizer.param_groups[1]["base_lr"] == optimizer.param_groups[2]["base_lr"] == 2.0


def test_groups_of_one_part_stay_as_they_are() -> None:
    weight, bias = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [weight, bias]}], lr=1.0)
    separate_groups(optimizer, [[weight, bias]])
    assert [group["params"] for group in optimizer.param_groups] == [[weight, bias]]
