"""`mtl launch`: real ranks under accelerate, their exit codes and signals, and nobody left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from mtl_dist.launch.agent import report

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

SUPERVISOR = """
import signal, sys
from mtl_dist.launch.local import Launch, supervise

# Whoever runs the tests under nohup or in the background ignores these.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

how = "--multi_gpu --num_machines 1 --gpu_ids all --mixed_precision no --dynamo_backend no"
command = [sys.executable, "-m", "mtl_dist.launch.agent", *how.split(), "--num_processes", "2"]
sys.exit(supervise(Launch((*command, "--main_process_port", "0", *sys.argv[1:]), 2, 1)))
"""

RANK = """
import os, pathlib, signal, sys, time

rank, folder = os.environ["RANK"], pathlib.Path(sys.argv[1])
log = folder / f"rank{rank}"

def note(text):
    with open(log, "a") as file:
        file.write(text + "\\n")

def leave(number, frame):
    note(signal.Signals(number).name)
    time.sleep(0.5)
    note("saved")
    sys.exit(0)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
    signal.signal(number, leave)
note(f"{os.environ['WORLD_SIZE']} ranks, {os.environ['OMP_NUM_THREADS']} thread, pid {os.getpid()}")
"""
WAIT = "for _ in range(1200):\n    time.sleep(0.1)  # a signal just before a call is acted on after it\n"
MISTAKE = """
from mtl_dist.commands import errors
from mtl_dist.errors import UserError

signal.signal(signal.SIGTERM, signal.SIG_DFL)
errors.SECONDS_FOR_RANK_0 = 0.2 if {late_rank} == 0 else 100
time.sleep(100 if rank == "{late_rank}" and rank == "0" else 0)
errors.report(UserError("a.b: expected"))
sys.exit(2)
"""


def start(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """A supervisor over two ranks that run `body`; each writes what happens to it into its own file."""
    script = tmp_path / "script.py"
    script.write_text(RANK + body)
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(script), str(tmp_path)],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key not in ("RANK", "OMP_NUM_THREADS")},
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(tmp_path: Path) -> list[list[str]]:
    return [(tmp_path / f"rank{rank}").read_text().splitlines() for rank in range(2)]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ranks(tmp_path: Path) -> list[psutil.Process]:
    """The two running ranks, once both are up."""
    files = [tmp_path / f"rank{rank}" for rank in range(2)]
    wait_until(lambda: all(file.exists() and "pid" in file.read_text() for file in files))
    return [psutil.Process(int(file.read_text().split()[5])) for file in files]


def test_the_first_failed_rank_gives_the_exit_code_and_the_others_are_ended(tmp_path: Path) -> None:
    fails = """
while rank == "1":
    if (folder / "rank0").exists():
        sys.exit(3)
    time.sleep(0.1)
"""
    process = start(tmp_path, fails + WAIT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 3
    assert [line[:20] for line in errors.splitlines() if line] == ["rank 1 failed with e"]
    assert lines(tmp_path)[0] == [lines(tmp_path)[0][0], "SIGTERM", "saved"]
    assert lines(tmp_path)[0][0].startswith("2 ranks, ")


def test_a_mistake_of_the_user_keeps_exit_code_2_and_nothing_is_added_to_its_lines(tmp_path: Path) -> None:
    process = start(tmp_path, MISTAKE.format(late_rank="1"))
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert errors == "a.b: expected\n"


def test_a_mistake_is_said_though_the_rank_that_would_say_it_is_late(tmp_path: Path) -> None:
    process = start(tmp_path, MISTAKE.format(late_rank="0"))
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert errors == "rank 1: a.b: expected\n"


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_reaches_every_rank_once_and_they_may_finish(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, WAIT)
    ranks(tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + number
    assert [rank[1:] for rank in lines(tmp_path)] == [[number.name, "saved"]] * 2
    assert errors == ""


@pytest.mark.parametrize("victim", ["launcher", "supervisor"])
def test_no_rank_outlives_its_launcher_or_its_supervisor(tmp_path: Path, victim: str) -> None:
    process = start(tmp_path, WAIT)
    started = ranks(tmp_path)
    agent = started[0].parent()
    assert agent is not None
    (agent if victim == "launcher" else process).kill()
    process.communicate(timeout=100)
    assert process.returncode == (137 if victim == "launcher" else -9)
    _, alive = psutil.wait_procs([*started, agent], timeout=60)
    assert alive == []
    assert [rank[1:] for rank in lines(tmp_path)] == [["SIGTERM", "saved"]] * 2


WORLD = """
import os
names = ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "CUDA_VISIBLE_DEVICES")
os.write(1, " ".join(os.environ.get(name, "-") for name in names).encode() + os.linesep.encode())  # at once
"""


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("single", ["- - - -"]),
        ("ddp", ["2 - - -"] * 2),
        ("ddp-cpu", ["2 - - -1,-1"] * 2),
        ("zero1", ["2 true 1 -"] * 2),
        ("zero2", ["2 true 2 -"] * 2),
        ("zero3", ["2 true 3 -"] * 2),
    ],
)
def test_accelerate_starts_what_each_preset_says(tmp_path: Path, preset: str, expected: list[str]) -> None:
    script = tmp_path / "world.py"
    script.write_text(WORLD)
    known = ("WORLD_SIZE", "RANK", "CUDA_VISIBLE_DEVICES")
    output = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            f"launch/{preset}.yaml",
            str(script),
        ],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key not in known} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    ).stdout
    assert [line for line in output.splitlines() if line in expected] == expected


def test_every_preset_says_when_to_use_it_and_how() -> None:
    presets = sorted((ROOT / "launch").glob("*.yaml"))
    assert {preset.stem for preset in presets} >= {"single", "ddp", "ddp-cpu", "zero1", "zero2", "zero3"}
    for preset in presets:
        text = preset.read_text(encoding="utf-8")
        assert "# COMMAND  accelerate launch --config_file launch/" + preset.name in text
        assert "# WHEN" in text
        # The recipe decides the precision, and two runs on one machine do not fight for a port.
        assert yaml.safe_load(text)["mixed_precision"] == "no"


def test_the_exit_code_is_that_of_the_failure_not_of_its_consequences(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert report({0: -signal.SIGTERM, 1: -signal.SIGKILL}) == 137
    assert "rank 1 was killed by SIGKILL" in capsys.readouterr().err
    assert report({1: -signal.SIGTERM, 0: 2}) == 2
    assert capsys.readouterr().err == ""
    assert report({1: -signal.SIGTERM}) == 143
    capsys.readouterr()
    # Rank 1 has lost the rank that left with the mistake.
    assert report({1: 1, 0: 2}) == 2
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- several machines
MACHINE = """
import sys
from dataclasses import replace
from mtl_dist.launch.local import machines_of, plan_launch, supervise

machines = machines_of(2, int(sys.argv[1]), sys.argv[2])
plan = plan_launch([], 1, None, 0, machines)
command = (*plan.command[: plan.command.index("--module")], *sys.argv[3:])
sys.exit(supervise(replace(plan, command=command)))
"""


@pytest.fixture
def two_machines() -> Iterator[tuple[str, list[list[str]]]]:
    """The address of the first of two, and what runs a command on each: network namespaces with a cable
    between them where this machine may make some, else the loopback interface of this one."""
    names = [f"mtl{os.getpid()}{letter}" for letter in "ab"]

    def ip(*arguments: str) -> bool:
        return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0

    try:
        cable = ["link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth1"]
        made = all(ip("netns", "add", name) for name in names) and ip(*cable, "netns", names[1])
        for number, name in enumerate(names if made else ()):
            made = made and ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"veth{number}")
            made = made and all(ip("-n", name, "link", "set", link, "up") for link in ("lo", f"veth{number}"))
        if made:
            yield "10.77.0.1", [["ip", "netns", "exec", name] for name in names]
        else:
            yield "127.0.0.1", [[], []]
    finally:
        for name in names:
            ip("netns", "del", name)


def test_machines_that_are_started_one_by_one_are_one_group(
    tmp_path: Path, two_machines: tuple[str, list[list[str]]]
) -> None:
    address, run_on = two_machines
    script = tmp_path / "script.py"
    script.write_text(RANK + 'note(os.environ["MASTER_ADDR"])\n')
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    environ = {key: value for key, value in os.environ.items() if key not in ("RANK", "OMP_NUM_THREADS")}
    machines = [
        subprocess.Popen(
            [*inside, sys.executable, "-c", MACHINE, str(number), f"{address}:{port}", script, tmp_path],
            cwd=ROOT,
            env=environ,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, inside in enumerate(run_on)
    ]
    try:
        errors = [machine.communicate(timeout=100)[1] for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()
    assert [machine.returncode for machine in machines] == [0, 0], errors
    assert [rank[0][:7] for rank in lines(tmp_path)] == ["2 ranks"] * 2
    assert [rank[1] for rank in lines(tmp_path)] == [address] * 2
