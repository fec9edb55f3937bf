"""The first GPU: its parts run with small sizes on the CPU, and a failure ends nothing but itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import PARTS, Job, Part, Sizes, count_tests, markdown, run_all, run_part, write_report
from benchmarks.memory import Peaks
from benchmarks.tables import Findings, shown
from mtl_dist.errors import UserError


def table(title: str, value: float) -> Findings:
    return Findings(title, [{"": "ours", "ms/step": value, "of peak": None}])


def two_tables(sizes: Sizes, out: Path) -> Iterator[Job]:
    def fails() -> Findings:
        raise RuntimeError("no memory is left")

    yield lambda: {"device": "a small one"}
    yield lambda: table("first", 1234.5)
    yield fails
    yield lambda: table("third", 0.9853)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv(gpu.DEVICE, "cpu")
    (tmp_path / "parts").mkdir()
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PARTS if name not in ("tests", "compiled", "balance")])
def test_a_part_runs_on_the_cpu_with_tiny_sizes(
    out: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each in a process of its own; test_balance.py starts such ones.
    monkeypatch.setattr("benchmarks.memory.peaks", lambda case: Peaks([3 * 2**20], [0], 0))
    run_part(name, out, tiny=True)
    part = Part.read(out, name)
    assert (part.problems, part.complete) == ([], True)
    assert part.facts or all(findings.rows for findings in part.findings)


def test_a_table_that_fails_is_a_line_and_the_others_are_kept(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PARTS, "step", (two_tables, 10.0))
    run_part("step", out, tiny=True)
    write_report(out)
    part = json.loads((out / "gpu.json").read_text())["step"]
    assert [findings["title"] for findings in part["findings"]] == ["first", "third"]
    assert part["problems"] == ["RuntimeError: no memory is left"]


def test_the_markdown_is_what_the_json_says(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "step", (two_tables, 10.0))
    run_part("step", out, tiny=True)
    write_report(out)
    found = json.loads((out / "gpu.json").read_text())
    text = (out / "gpu.md").read_text()
    assert text == markdown(found)
    for line in ("device a small one.", "**third**", "| ours | 1,234 |  |", "| ours | 0.985 |  |"):
        assert line in text
    assert "step: RuntimeError: no memory is left" in text
    found["step"]["findings"][0]["rows"][0]["ms/step"] = 77.0
    assert "| ours | 77.0 |  |" in markdown(found)


def test_a_part_that_runs_out_of_time_or_crashes_ends_no_other(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, crash = "import time; time.sleep(60)", "import sys; sys.exit(3)"
    assert gpu.run_command([sys.executable, "-c", slow], gpu.gpu_environment(), 1.0) == "was ended after 1 s"
    assert (
        gpu.run_command([sys.executable, "-c", crash], gpu.gpu_environment(), 60.0)
        == "ended with exit code 3"
    )
    monkeypatch.setattr("benchmarks.gpu.PARTS", {"step": (two_tables, 9.0), "save": (two_tables, 9.0)})
    problems = iter(["was ended after 9 s", ""])
    monkeypatch.setattr("benchmarks.gpu.run_command", lambda *arguments: next(problems))
    run_all(out, tiny=True)
    found = json.loads((out / "gpu.json").read_text())
    assert [part["problems"] for part in found.values()] == [["was ended after 9 s"], []]


def test_without_a_gpu_and_without_being_asked_for_the_cpu_nothing_is_measured(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(gpu.DEVICE)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="expected a GPU, found none"):
        run_all(out, tiny=True)


def test_all_parts_together_may_take_what_the_script_promises() -> None:
    assert gpu.TOTAL_S < 12 * 60
    assert max(limit_s for _, limit_s in PARTS.values()) < gpu.TOTAL_S


def test_the_cases_of_a_test_are_counted_by_how_they_ended(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="test_a_b[x]" time="1.5"/>'
        '<testcase name="test_a_b[y]" time="0.5"><failure message="not equal"/></testcase>'
        '<testcase name="test_c"><skipped message="no GPU"/></testcase></testsuite></testsuites>'
    )
    first, second = count_tests(report).rows
    assert (first["test"], first["passed"], first["failed"], first["seconds"]) == ("a b", 1, 1, 2.0)
    assert (second["test"], second["skipped"]) == ("c", 1)
    assert gpu.failed_tests(tmp_path) == ["test_a_b[y] failure: not equal"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), ("x", "x"), (12800, "12,800"), (1234.5, "1,234"), (77.04, "77.0"), (0.98531, "0.985")],
)
def test_values_are_shown_with_the_digits_that_mean_something(value: float | None, text: str) -> None:
    assert shown(value) == text
