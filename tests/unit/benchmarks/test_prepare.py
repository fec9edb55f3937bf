"""The benchmark of preparing measures both ways, of another checkout too."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.loader import smooth_photo
from benchmarks.prepare import bench_prepare
from mtl_dist.errors import UserError


def test_both_ways_and_both_versions_have_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photo.jpg").write_bytes(smooth_photo(0, 32, 32))
    (tmp_path / "before" / "mtl_dist").mkdir(parents=True)
    (tmp_path / "before" / "mtl_dist" / "cli.py").touch()
    monkeypatch.setattr("benchmarks.prepare.seconds_of", lambda checkout, way, photos: 0.5)
    bench_prepare(tmp_path, num_images=20, beside=tmp_path / "before", repeats=1)
    shown = capsys.readouterr().out
    assert "preparing 20 JPEGs" in shown
    assert shown.count("before") == 2


def test_what_is_no_checkout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(smooth_photo(0, 32, 32))
    with pytest.raises(UserError, match="--beside: expected a checkout of mtl_dist, found none"):
        bench_prepare(tmp_path, num_images=20, beside=tmp_path, repeats=1)
