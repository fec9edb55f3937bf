"""A real browser for pages: Chromium without a window, or the test is skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class Shown:
    """A page of the browser; what its console said and what it asked for elsewhere must stay empty."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Nothing was said, nothing asked of others, every picture is there, and nothing is too wide."""
        assert self.said == []
        assert self.asked == []
        assert self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert self.page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")


@contextmanager
def chromium(address: str, width: int, colours: str) -> Iterator[Shown]:
    """The page at `address`, `width` pixels wide, for eyes that like it "light" or "dark"."""
    library = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    own = (address.rsplit("/", 1)[0], "data:", "blob:")
    with library.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=colours)
        shown = Shown(page)

        def elsewhere(request: Any) -> None:
            if not request.url.startswith(own):
                shown.asked.append(request.url)

        page.on("console", lambda message: shown.said.append(message.text))
        page.on("pageerror", lambda error: shown.said.append(str(error)))
        page.on("request", elsewhere)
        page.goto(address)
        yield shown
        browser.close()
