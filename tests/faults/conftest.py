"""What the injected faults share with the integration tests: two warm ranks, and a small dataset."""

from __future__ import annotations

from tests.integration.conftest import ranks, recipe, without_pictures

__all__ = ["ranks", "recipe", "without_pictures"]
