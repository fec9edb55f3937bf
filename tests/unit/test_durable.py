"""Files are whole or absent, and a lock is held by one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mtl_dist.durable import Locked, locked, replacing, sha256_of, write_text


def test_a_file_whose_writing_fails_stays_as_it_was_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="full"), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise OSError("full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("shared", [False, True])
def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with replacing(path, sync=False, shared=shared) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("name", [".lock", "."])
def test_a_lock_of_a_file_or_a_directory_is_held_by_one_process_at_a_time(tmp_path: Path, name: str) -> None:
    take = (
        "import sys, pathlib\n"
        "from mtl_dist.durable import Locked, locked\n"
        "try:\n"
        "    with locked(pathlib.Path(sys.argv[1]), wait=False): print('taken')\n"
        "except Locked: print('refused')\n"
    )

    def other_process() -> str:
        command = [sys.executable, "-c", take, str(tmp_path / name)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with locked(tmp_path / name), pytest.raises(Locked), locked(tmp_path / name, wait=False):
        pass
    with locked(tmp_path / name):
        assert other_process() == "refused"
    assert other_process() == "taken"
