"""How many GPUs there are is torch's to say, where a driver is installed."""

from __future__ import annotations

import pytest

from mtl_dist.launch import gpus


@pytest.mark.parametrize(("has_driver", "expected"), [(True, ["0", "1", "2"]), (False, [])])
def test_gpus_are_counted_by_torch_where_there_is_a_driver(
    has_driver: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr(gpus, "has_driver", lambda: has_driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.num_gpus() == len(expected)
    assert gpus.visible_gpus() == expected


def test_gpus_keep_the_names_that_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "num_gpus", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-1a")
    assert gpus.visible_gpus() == ["5", "GPU-1a"]


def test_a_library_that_is_not_there_is_no_driver() -> None:
    assert not gpus.loads("libno-such-driver.so.1")
    assert gpus.loads("libc.so.6")
