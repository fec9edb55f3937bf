"""What whole runs share: two warm ranks, and a small dataset with its recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import RankPool, shared_pool
from tests.tiny_datasets import write_dataset
from tests.tiny_runs import write_recipe
from tests.undrawn import undrawn


@pytest.fixture(scope="module", autouse=True)
def without_pictures() -> Iterator[None]:
    """A test that looks at them has its run under `drawn`."""
    with undrawn():
        yield


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    """The two ranks of this session, as the engines' tests have them."""
    return shared_pool(2)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps of training: 3 epochs of 30 samples, 8 at a time. The dataset `tiny` lies beside it."""
    directory = tmp_path_factory.mktemp("data")
    write_dataset(directory / "tiny", {"train": 30, "val": 9, "test": 7})
    return write_recipe(directory, directory / "tiny")
