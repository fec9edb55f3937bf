"""Tensors come out of a file as the library wrote them, and stay whole though the file is shortened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mtl_dist.errors import UserError
from mtl_dist.tensor_files import each_tensor, read_tensors, shapes_of, write_tensors

TENSORS = {
    "weight": torch.randn(3, 4),
    "scalar": torch.tensor(7),
    "half": torch.randn(5).half(),
    "brain": torch.randn(2, 1, 3).bfloat16(),
    "nothing": torch.zeros(0, 3),
    "flags": torch.tensor([True, False]),
    "bytes": torch.arange(9, dtype=torch.uint8),
}


def test_every_tensor_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    found = read_tensors(path)
    assert shapes_of(path) == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_tensors_are_written_for_whom_other_files_are(tmp_path: Path, mask: int) -> None:
    """A colleague reads a run, and another user of a container what was exported."""
    before = os.umask(mask)
    try:
        (tmp_path / "plain").touch()
        for _ in range(2):  # also over one that is there
            write_tensors(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~mask}
    assert read_tensors(tmp_path / "model.safetensors").keys() == TENSORS.keys()


def test_a_file_that_is_shortened_after_or_while_it_is_read_is_no_bus_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({str(number): torch.full((1 << 16,), float(number)) for number in range(8)}, path)
    found = read_tensors(path)
    reading = each_tensor(path)
    next(reading)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 4)
    assert all(float(found[str(number)].sum()) == number * (1 << 16) for number in range(8))
    with pytest.raises(UserError, match="bytes too early"):
        list(reading)
    with pytest.raises(UserError, match="expected tensors as safetensors writes them"):
        read_tensors(path)
