"""Packing: the same bytes however it is run, nothing half-written, and no finished work done twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import mtl_dist.data.shards as shards
from mtl_dist.errors import UserError
from mtl_dist.importers.options import PackOptions
from tests.source_files import HERE, contents, fill, picture, prepare_folders


def cats() -> dict[str, bytes]:
    return {
        f"{split}/{breed}/{number}.jpg": picture(number + 100 * index)
        for index, (split, breed, count) in enumerate(
            (split, breed, count)
            for split, count in (("train", 6), ("val", 2))
            for breed in ("Bengal", "Sphynx", "Manx")
        )
        for number in range(count)
    }


def full_disk_after(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make writing a shard fail as on a full disk, from the given byte of each preparation on."""
    write, left = shards._HashingFile.write, [num_bytes]

    def limited(self: shards._HashingFile, data: bytes) -> int:
        left[0] -= len(data)
        if left[0] < 0 and not self._file.closed:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(shards._HashingFile, "write", limited)


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = fill(tmp_path / "src", cats())
    options = PackOptions(workers=1, shard_samples=5)
    prepare_folders(src, tmp_path / "whole", "breed", options=options)
    partial = tmp_path / ".out.partial"
    with monkeypatch.context() as patched:
        full_disk_after(50_000, patched)
        with pytest.raises(UserError, match=f"the disk is full. Finished shards are kept in {partial}"):
            prepare_folders(src, tmp_path / "out", "breed", options=options)
    assert not (tmp_path / "out").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    assert sorted(finished) == ["train-000000.tar", "train-000001.tar"]
    prepare_folders(src, tmp_path / "out", "breed", options=options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == finished
    assert not partial.exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"info": 3}', '{"info": {"path": "x"}}', "\0" * 50])
def test_a_damaged_record_of_a_finished_shard_means_that_it_is_written_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = fill(tmp_path / "src", cats())
    options = PackOptions(workers=1, shard_samples=5)
    prepare_folders(src, tmp_path / "whole", "breed", options=options)
    with monkeypatch.context() as patched:
        full_disk_after(50_000, patched)
        with pytest.raises(UserError, match="disk is full"):
            prepare_folders(src, tmp_path / "out", "breed", options=options)
    for record in (tmp_path / ".out.partial" / ".finished").iterdir():
        record.write_text(damage)
    prepare_folders(src, tmp_path / "out", "breed", options=options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_shard_of_other_sources_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = cats()
    src = fill(tmp_path / "src", files)
    options = PackOptions(workers=1, shard_samples=5)
    with monkeypatch.context() as patched:
        full_disk_after(45_000, patched)
        with pytest.raises(UserError, match="disk is full"):
            prepare_folders(src, tmp_path / "out", "breed", options=options)
    shutil.copy(tmp_path / ".out.partial/train-000000.tar", tmp_path / ".out.partial/left-over.tar")
    for index, name in enumerate(files):
        if name.startswith("train"):
            (src / name).write_bytes(picture(5000 + index))
    prepare_folders(src, tmp_path / "out", "breed", options=options)
    prepare_folders(src, tmp_path / "fresh", "breed", options=options)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_second_preparation_of_the_same_dataset_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", cats())
    errors: list[str] = []

    def meanwhile(done: int, total: int) -> None:
        if done == 3:
            with pytest.raises(UserError) as caught:
                prepare_folders(src, tmp_path / "out", "breed", options=HERE)
            errors.append(str(caught.value))

    prepare_folders(src, tmp_path / "out", "breed", options=HERE, progress=meanwhile)
    assert len(errors) == 1 and "another `mtl prepare` is writing it" in errors[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    src = fill(tmp_path / "src", cats())
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="expected a place that can be written"):
        prepare_folders(src, tmp_path / "locked/out", "breed", options=HERE)


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_ends_at_all_samples(tmp_path: Path, workers: int) -> None:
    heard: list[tuple[int, int]] = []
    src = fill(tmp_path / "src", cats())
    options = PackOptions(workers=workers, shard_samples=12)
    prepare_folders(src, tmp_path / "out", "breed", None, options, progress=lambda *now: heard.append(now))
    assert heard[0] == (0, 24) and heard[-1] == (24, 24)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_nothing_of_the_work_is_left_in_the_dataset(tmp_path: Path) -> None:
    prepare_folders(fill(tmp_path / "src", cats()), tmp_path / "out", "breed", options=HERE)
    splits = [
        [f"{s}-000000.tar", *(f"{s}.{what}.npy" for what in ("hashes", "index", "labels"))]
        for s in ("train", "val")
    ]
    names = ["dataset.json", *splits[0], *splits[1]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src"]


SCRIPT = """
import sys
from pathlib import Path
from mtl_dist.importers import run
from mtl_dist.importers.options import PackOptions
options = PackOptions(workers=2, shard_samples=20)
run("folders", sys.argv[2], {"source": sys.argv[1], "task": "breed"}, options)
"""


@pytest.mark.slow
def test_a_killed_preparation_ends_whole_and_the_next_run_goes_on(tmp_path: Path) -> None:
    files = {f"{breed}/{number}.jpg": picture(number) for breed in "ab" for number in range(600)}
    src, out, partial = fill(tmp_path / "src", files), tmp_path / "out", tmp_path / ".out.partial"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(src), str(out)])
    deadline = time.monotonic() + 120
    while not list(partial.glob(".finished/*3.tar.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert partial.is_dir() and not out.exists()
    assert psutil.wait_procs(workers, timeout=60)[1] == []  # the workers end with their caller
    options = PackOptions(workers=1, shard_samples=20)
    prepare_folders(src, out, "breed", options=options)
    prepare_folders(src, tmp_path / "whole", "breed", options=options)
    assert contents(out) == contents(tmp_path / "whole")
