"""The documentation holds together: its pages, its links, its settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from mtl_dist.config.reference import PAGE, as_markdown, as_text, part_of, reference
from mtl_dist.errors import UserError
from mtl_dist.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def anchors_of(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_within_the_project_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        found = page.parent / target if target else page
        assert found.exists(), link
        assert not anchor or anchor in anchors_of(found), link


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/-]+\.(?:md|ipynb)", text[text.index("\nnav:") :]))
    docs = ROOT / "docs"
    there = {path.relative_to(docs).as_posix() for end in ("md", "ipynb") for path in docs.rglob(f"*.{end}")}
    assert listed == there | {"index.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    assert yaml.safe_load(text)["strict"] is True


def test_the_page_of_settings_is_that_of_the_code() -> None:
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    expected = PAGE + as_markdown(reference(Recipe))
    assert written == expected, "write it again: mtl settings --markdown > docs/settings.md"


def test_every_setting_says_what_it_means() -> None:
    """In a text of its own, in that of its section, or in a section of its own."""
    sections = reference(Recipe)
    places = {re.sub(r"\[\d+\]|\.NAME", "", section.path) for section in sections}
    for section in sections:
        within = re.sub(r"\[\d+\]|\.NAME", "", section.path)
        for setting in section.settings:
            of_its_own = f"{within}.{setting.name}".lstrip(".") in places
            told = setting.text or of_its_own or re.search(rf"\b{setting.name}\b", section.text)
            assert told or setting.name == "kind", f"{section.title}: {setting.name}"


def test_a_place_is_found_by_what_a_recipe_says() -> None:
    sections = reference(Recipe)
    text = as_text(part_of(sections, "tasks.digit.loss"))
    assert "cross_entropy" in text and "mse" in text
    (only,) = part_of(sections, "data.train.split")
    assert [each.name for each in only.settings] == ["split"]
    assert len(part_of(sections, "optim.schedule.kind")) >= 5
    with pytest.raises(UserError, match=r"Did you mean train\.precision\?"):
        part_of(sections, "train.precison")
