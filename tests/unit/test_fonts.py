"""Text of any script in pictures: drawn in a font that has it, or said to be drawn as boxes."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from mtl_dist import fonts
from mtl_dist.data.overlays import write
from mtl_dist.figures.saving import save_png

SHIPPED = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
ELSEWHERE = next(  # in another font of matplotlib alone, which is there on every machine
    chr(code)
    for code in sorted(fonts.characters_of(SHIPPED / "STIXGeneral.ttf"))
    if chr(code).isprintable() and fonts.lacking([fonts.standard()], chr(code))
)
NOWHERE = "\U0001f9ff\U00017000"


@pytest.fixture(autouse=True)
def as_installed_with_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.font_manager import fontManager

    shipped = [entry for entry in fontManager.ttflist if Path(entry.fname).parent == SHIPPED]
    monkeypatch.setattr(fontManager, "ttflist", shipped)
    fonts._others.cache_clear()


def test_latin_stays_in_the_standard_font() -> None:
    assert fonts.font_for("Diagnose: Übergröße, λ = 3") == fonts.standard()
    assert fonts.others_for("cat") == []


def test_what_the_standard_font_lacks_comes_from_another_one(tmp_path: Path) -> None:
    found = fonts.font_for(ELSEWHERE)
    assert found != fonts.standard() and not fonts.lacking([found], ELSEWHERE)
    figure = Figure()
    figure.text(0.5, 0.5, f"cat {ELSEWHERE}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_png(figure, tmp_path / "figure.png")
    draw = ImageDraw.Draw(Image.new("RGB", (100, 30)))
    assert write(draw, (0, 0), ELSEWHERE, (255, 255, 255)) > 0


def test_what_no_font_has_is_said_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for _ in range(2):
        figure = Figure()
        figure.text(0.5, 0.5, NOWHERE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_png(figure, tmp_path / "figure.png")
    said = capsys.readouterr().err
    assert said.count("expected a font with") == 1 and "boxes stand in their place" in said
