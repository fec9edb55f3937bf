"""Normalisation layers: conversions keep weights and names."""

from __future__ import annotations

import torch
from torch import nn

from mtl_dist.models.norms import convert_norms, group_norm


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32, eps=1e-3), nn.Sequential(nn.BatchNorm2d(32))
    )
    for norm in (network[1], network[2][0]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return network


def test_frozen_batchnorm_is_batchnorm_in_evaluation_mode_for_ever() -> None:
    images = torch.randn(4, 3, 8, 8)
    network = small_network()
    expected, names = network.eval()(images), list(network.state_dict())
    convert_norms(network, "frozen")
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert torch.equal(network(images), expected)
    assert list(network.state_dict()) == names
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["0.weight", "0.bias"]


def test_frozen_batchnorm_keeps_the_type_under_autocast() -> None:
    network = small_network()
    convert_norms(network, "frozen")
    with torch.autocast("cpu", torch.bfloat16):
        assert network(torch.randn(1, 3, 8, 8)).dtype == torch.bfloat16


def test_groupnorm_keeps_weights_and_makes_samples_independent() -> None:
    network = small_network()
    weights = network[1].weight.detach().clone()
    convert_norms(network, "group")
    assert isinstance(network[1], nn.GroupNorm)
    assert isinstance(network[2][0], nn.GroupNorm)
    assert torch.equal(network[1].weight, weights)
    assert network[1].eps == 1e-3
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(network(images)[:1], network(images[:1]))


def test_groups_hold_at_least_sixteen_channels_and_divide_them() -> None:
    groups = {channels: group_norm(channels).num_groups for channels in (7, 16, 24, 40, 64, 96, 116, 1280)}
    assert groups == {7: 1, 16: 1, 24: 1, 40: 2, 64: 4, 96: 6, 116: 4, 1280: 80}


def test_sync_batchnorm_replaces_every_batchnorm() -> None:
    network = small_network()
    names = list(network.state_dict())
    convert_norms(network, "sync")
    assert isinstance(network[1], nn.SyncBatchNorm)
    assert isinstance(network[2][0], nn.SyncBatchNorm)
    assert list(network.state_dict()) == names
