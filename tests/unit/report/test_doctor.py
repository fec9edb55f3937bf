"""The doctor finds what is wrong, says what to do, and its exit code says how bad it is."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mtl_dist.data.manifest import read_manifest, write_manifest
from mtl_dist.importers.jobs import Record, TaskSource
from mtl_dist.importers.packing import pack
from mtl_dist.report import doctor, doctor_checks
from mtl_dist.report.doctor_checks import Check

FINE = Check("disk", "ok", "77 GB")
BAD = Check("ranks", "failure", "no", "Do this.")
ODD = Check("CPUs", "warning", "1 of 2", "Do that.")


@pytest.mark.parametrize(
    ("checks", "exit_code"),
    [([FINE], 0), ([FINE, ODD], 0), ([FINE, BAD, ODD], 1)],
    ids=["ok", "warning", "failure"],
)
def test_only_a_failure_is_a_bad_exit_code(
    checks: list[Check], exit_code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "local_checks", lambda folders: checks)
    monkeypatch.setattr(doctor, "group_checks", list)
    assert doctor.run_doctor(None) == exit_code
    printed = capsys.readouterr().out
    assert all(check.advice in printed for check in checks)


def test_every_finding_that_is_not_ok_says_what_to_do(tmp_path: Path) -> None:
    checks = doctor_checks.local_checks({"runs": tmp_path / "not" / "there"})
    assert {"Python", "packages", "CPUs", "open files", "runs: space"} <= {check.name for check in checks}
    for check in checks:
        assert check.found
        assert bool(check.advice) == (check.level != "ok"), check
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_failure_and_is_not_filled_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10_000_000

    monkeypatch.setattr(doctor_checks.shutil, "disk_usage", lambda path: Usage)
    (check,) = doctor_checks.disk("runs", tmp_path)
    assert (check.level, check.name) == ("failure", "runs: space")


def test_a_folder_that_one_may_not_write_to_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> float:
        raise PermissionError(f"may not write to {folder}")

    monkeypatch.setattr(doctor_checks, "write_speed", refuse)
    assert doctor_checks.disk_writing("runs", tmp_path).level == "failure"


def test_fewer_cpus_than_slurm_promised_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", str(len(os.sched_getaffinity(0)) + 1))
    monkeypatch.setattr(doctor_checks, "usable_cpus", float)
    assert doctor_checks.cpus().level == "failure"


def test_a_quota_below_the_allowed_cpus_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(doctor_checks, "usable_cpus", lambda number: 0.5 * number)
    assert doctor_checks.cpus().level == "warning"
    monkeypatch.setattr(doctor_checks, "usable_cpus", float)
    assert doctor_checks.cpus().level == "ok"


def test_busy_processes_never_get_more_cpus_than_there_are() -> None:
    assert 0 < doctor_checks.usable_cpus(2) <= 2.05


def test_little_shared_memory_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 64_000_000

    monkeypatch.setattr(doctor_checks.shutil, "disk_usage", lambda path: Usage)
    assert doctor_checks.shared_memory(tmp_path).level == "failure"


def test_what_all_nodes_say_alike_is_said_once(tmp_path: Path) -> None:
    def write(rank: int, node: str, checks: list[Check]) -> None:
        findings = {"node": node, "checks": [asdict(check) for check in checks]}
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps(findings))

    write(0, "node1", [FINE, ODD])
    write(1, "node1", [])
    write(2, "node2", [FINE, BAD])
    assert doctor.read_findings(tmp_path) == [("", FINE), ("node1", ODD), ("node2", BAD)]


def test_the_table_names_the_node_of_a_finding() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(doctor.table_of([("node1", BAD)]))
    text = console.export_text()
    assert "node1: ranks" in text
    assert "Do this." in text


@pytest.mark.slow
def test_two_ranks_on_this_machine_sum_their_gradients_right() -> None:
    checks = {check.name: check for check in doctor.group_checks()}
    assert set(checks) == {"clocks", "all-reduce", "gradients"}
    assert checks["gradients"].level == "ok"


@pytest.mark.slow
def test_ranks_that_fail_are_a_finding_and_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    (check,) = doctor.group_checks()
    assert (check.name, check.level) == ("ranks", "failure")


def test_the_pixels_of_datasets_are_shown_and_what_was_not_measured_is_reported(tmp_path: Path) -> None:
    def write(name: str, values: np.ndarray) -> Path:
        file = io.BytesIO()
        np.save(file, values)
        records = [Record(f"s{i}", file.getvalue(), {"y": i % 2}) for i in range(2)]
        pack({"train": records}, tmp_path / name, {"y": TaskSource("classification", ("no", "yes"))}, name)
        return tmp_path / name

    deep = np.full((8, 8, 2), 300, np.uint16)
    deep[:4] = 500
    write("deep", deep)
    write("flat", np.full((8, 8, 2), 7, np.uint16))
    old = write("old", deep)
    write_manifest(old, replace(read_manifest(old), pixels=None))
    found = {check.name.rpartition("/")[2]: check for check in doctor_checks.datasets(tmp_path)}
    assert "400 +- 100 (300 to 500)" in found["deep: pixels"].found
    assert found["deep: pixels"].level == "ok"
    assert "one value" in found["flat: pixels"].advice
    assert "not measured" in found["old: pixels"].found
    assert "Prepare it again" in found["old: pixels"].advice
