"""The benchmark of resuming measures what it says, on any number of workers."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.resume import first_batch, write_sparse_dataset


def test_each_number_of_workers_has_its_row() -> None:
    done = CliRunner().invoke(app, ["resume", "--samples", "20000", "--workers", "0", "--repeats", "1"])
    assert done.exit_code == 0, done.output
    assert "epoch of 20,000 samples" in done.output
    assert "at 90%" in done.output


def test_the_sparse_epoch_takes_little_room_and_is_read_at_any_position(tmp_path: Path) -> None:
    assert write_sparse_dataset(tmp_path, 30_000) == 30_000
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.glob("*.tar")) < 1 << 20
    assert first_batch(tmp_path, 27_000, 30_000, 0) > 0
