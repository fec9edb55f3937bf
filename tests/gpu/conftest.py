"""Without a GPU, nothing here runs, but for a trial with the CPU in its place (MTL_BENCH_DEVICE=cpu)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.runs_on_devices import AVAILABLE, ON_CPU, RECIPE
from tests.tiny_datasets import write_dataset


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.skipif(not AVAILABLE, reason="no GPU"))


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small recipe with every kind of task, and its data."""
    directory = tmp_path_factory.mktemp("gpu")
    write_dataset(directory / "tiny", {"train": 64, "val": 24, "test": 16})
    path = directory / "recipe.yaml"
    path.write_text(RECIPE.replace("DATA", str(directory / "tiny")))
    return path


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    if ON_CPU:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels whose results do not depend on which thread came first."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
