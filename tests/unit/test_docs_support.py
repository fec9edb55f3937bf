"""docs/support.md has every kind of task and every way of sharing, each in a table."""

from __future__ import annotations

import re

import pytest

from mtl_dist.models.sharing import SHARINGS
from mtl_dist.tasks.registry import TASKS
from tests.support_matrix import DOCUMENT
from tests.tiny_tasks import WORK

TABLES = {"Kinds of task": set(TASKS), "Ways of sharing": {"hard", *SHARINGS}}


@pytest.mark.parametrize("title", TABLES)
def test_every_one_has_a_row(title: str) -> None:
    text = DOCUMENT.read_text(encoding="utf-8").partition(f"## {title}")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| (\w+) \|", text, re.MULTILINE)) == TABLES[title]


def test_all_kinds_are_balanced_at_once() -> None:
    assert {settings.kind for settings in WORK["all kinds"].settings.values()} == set(TASKS)
