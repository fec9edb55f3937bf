"""The status file says what was written, to any version that reads it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from mtl_dist.status import Status, read_status, write_status


def test_a_status_reads_back_as_it_was_written(tmp_path: Path) -> None:
    status = Status("running", step=3, total_steps=9, epoch=0.5, metric="val/loss", best=0.25, reason="a\nb")
    write_status(tmp_path, status)
    assert read_status(tmp_path) == status
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_run_that_never_wrote_one_has_no_status(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None


def test_a_field_of_a_newer_version_is_ignored(tmp_path: Path) -> None:
    write_status(tmp_path, Status("done", step=3))
    path = tmp_path / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "moon": "full"}))
    status = read_status(tmp_path)
    assert status is not None and status.step == 3


def test_the_time_left_follows_from_position_and_speed() -> None:
    status = Status("running", position=100, end_position=300, images_per_s=50.0)
    assert status.seconds_left == 4.0
    assert replace(status, images_per_s=0.0).seconds_left is None
