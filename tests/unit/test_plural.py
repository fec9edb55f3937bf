"""Messages count things in the singular where there is one."""

from __future__ import annotations

import pytest

from mtl_dist.plural import plural


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (plural(1, "rank"), "1 rank"),
        (plural(0, "rank"), "0 ranks"),
        (plural(1234, "class", "classes"), "1,234 classes"),
        (plural(1, "class", "classes"), "1 class"),
    ],
)
def test_one_thing_is_no_plural(found: str, expected: str) -> None:
    assert found == expected
