"""The run folder: what is recorded of a start."""

from __future__ import annotations

from importlib.metadata import version

from mtl_dist.run_folder import installed


def test_a_package_that_is_not_installed_is_not_recorded() -> None:
    assert installed(["torch", "a-package-of-nobody"]) == {"torch": version("torch")}
