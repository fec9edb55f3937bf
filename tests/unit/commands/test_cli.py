"""The command line: quick help, exit codes that scripts can trust, and options that reach their function."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from mtl_dist import __version__
from mtl_dist.cli import app
from mtl_dist.commands.options import named
from mtl_dist.errors import UserError
from mtl_dist.importers.options import PackOptions
from mtl_dist.importers.wanted import class_names
from mtl_dist.launch.agent import report
from mtl_dist.launch.local import Launch, Machines, check_rendezvous, machines_of, plan_launch

ROOT = Path(__file__).parents[3]
DIGITS = ROOT / "configs" / "digits.yaml"

COMMANDS = ["prepare digits", "prepare folders", "prepare table", "prepare idx", "prepare cifar"]
COMMANDS += ["prepare stacks", "inspect", "train", "launch"]
COMMANDS += ["evaluate", "predict", "verify", "submit", "status", "logs", "cancel", "doctor"]
COMMANDS += ["compare", "sweep", "runs", "tag"]


def mtl(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


# ---------------------------------------------------------------- help
HELP = """
import sys
from mtl_dist.cli import main

sys.argv = ["mtl", *sys.argv[1:], "--help"]
try:
    main()
finally:
    heavy = ("torch", "torchvision", "deepspeed", "accelerate", "matplotlib", "numpy", "omegaconf")
    print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""


def test_the_list_of_commands_has_panels_and_whole_sentences() -> None:
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).stdout
    panels = re.findall(r"^(\w[\w ]+):$", text, re.MULTILINE)
    assert panels == ["Options", "Start", "Data", "Train", "Use a run", "Cluster and jobs", "Machine"]
    assert "..." not in text.partition("Start:")[2]
    assert max(map(len, text.splitlines())) <= 88


@pytest.mark.parametrize(
    ("command", "imported"), [("", []), ("train", []), ("prepare", []), ("prepare table", ["numpy"])]
)
def test_help_waits_for_no_heavy_import(command: str, imported: list[str]) -> None:
    done = python(HELP, *command.split())
    assert (done.returncode, done.stderr) == (0, f"{imported}\n")
    assert "mtl " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example_and_explains_every_argument(command: str) -> None:
    found = typer.main.get_command(app)
    for name in command.split():
        found = found.get_command(typer.Context(found), name)  # type: ignore[attr-defined]
    assert f"mtl {command}" in (found.help or "")
    assert [parameter.name for parameter in found.params if not getattr(parameter, "help", None)] == []


def test_the_commands_are_these_and_no_others() -> None:
    group = typer.main.get_command(app)
    names = set()
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        listed = command.list_commands(typer.Context(command)) if hasattr(command, "list_commands") else [""]
        names |= {f"{name} {sub}".strip() for sub in listed}
    assert names >= set(COMMANDS)


def test_the_version_is_printed() -> None:
    result = mtl("--version")
    assert (result.exit_code, result.stdout) == (0, f"mtl_dist {__version__}\n")


# ---------------------------------------------------------------- exit codes
LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", LONG],
        ["inspect", LONG],
        ["runs", LONG],
        ["train", f"{LONG}.yaml"],
        ["prepare", "idx", LONG, "out"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_path_that_cannot_be_one_is_a_line(arguments: list[str]) -> None:
    result = mtl(*arguments)
    assert result.exit_code == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert LONG in line and line.endswith("expected a path that can be used, found: File name too long.")


def test_a_path_that_is_not_the_users_is_a_line_and_a_bug_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int) -> None:
        def is_file(path: Path) -> bool:
            raise OSError(number, os.strerror(number), str(path))

        monkeypatch.setattr(Path, "is_file", is_file)

    refuse(errno.EACCES)
    result = mtl("evaluate", "theirs")
    assert (result.exit_code, result.stderr) == (
        2,
        "theirs/recipe.yaml: expected a path that can be used, found: Permission denied.\n",
    )
    refuse(errno.EBADF)
    result = mtl("evaluate", "theirs")
    assert result.exit_code == 1 and isinstance(result.exception, OSError)


def test_mistakes_of_the_user_are_lines_on_stderr_and_exit_code_2() -> None:
    result = mtl("train", DIGITS, "optim.lr=-1", "tasks.digit.kind=clasification", "train.epoch=3")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == [
        "tasks.digit.kind",
        "optim.lr",
        "train.epoch",
    ]


@pytest.mark.parametrize(
    "arguments", [["train"], ["trian"], ["train", str(DIGITS), "--lr", "3"], ["prepare", "folders", "a"]]
)
def test_a_wrong_use_of_the_options_is_exit_code_2(arguments: list[str]) -> None:
    result = mtl(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


DOCTOR = """
import sys, types

def run_doctor(cluster, **size):
    raise {exception}

sys.modules["mtl_dist.report.doctor"] = types.SimpleNamespace(run_doctor=run_doctor)
sys.argv = ["mtl", "doctor"]
from mtl_dist.cli import main
from mtl_dist.errors import UserError
main()
"""


@pytest.mark.parametrize(
    ("exception", "code", "last_line"),
    [
        ('UserError("x: expected 1, found 2.")', 2, "x: expected 1, found 2."),
        ('RuntimeError("a bug")', 1, "RuntimeError: a bug"),
        ("KeyboardInterrupt", 130, ""),
    ],
)
def test_a_process_says_by_its_exit_code_whose_fault_it_was(
    exception: str, code: int, last_line: str
) -> None:
    done = python(DOCTOR.format(exception=exception))
    assert done.returncode == code
    assert done.stderr.splitlines()[-1:] == ([last_line] if last_line else [])
    assert ("Traceback" in done.stderr) == (code == 1)


def test_a_rank_alone_with_its_mistake_speaks_for_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mtl_dist.commands.errors.tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("mtl_dist.commands.errors.SECONDS_FOR_RANK_0", 0.1)
    monkeypatch.setenv("RANK", "1")
    result = mtl("train", "no.yaml")
    assert result.exit_code == 2
    assert result.stderr.startswith("rank 1: no.yaml: expected a YAML file, found none.")
    monkeypatch.setenv("RANK", "0")
    assert mtl("train", "another.yaml").stderr.startswith("another.yaml: expected")


# ---------------------------------------------------------------- train and launch
def test_print_config_prints_a_recipe_that_loads_into_the_same(tmp_path: Path) -> None:
    from mtl_dist.recipe import load_recipe

    result = mtl("train", DIGITS, "optim.lr=1e-5", "tasks.ink=null", "--print-config")
    assert result.exit_code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(result.stdout)
    assert load_recipe(printed) == load_recipe(DIGITS, ["optim.lr=1e-5", "tasks.ink=null"])


def test_a_stopped_run_is_130_and_0_for_a_rank_whose_launcher_would_end_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mtl_dist.training.plan import Outcome

    fields = dict.fromkeys(Outcome.__dataclass_fields__, 0) | {"state": "stopped", "reason": "signal SIGINT"}
    stopped = Outcome(**fields)  # type: ignore[arg-type]
    monkeypatch.setattr("mtl_dist.runs.train.train", lambda *given, **named: stopped)
    monkeypatch.delenv("RANK", raising=False)
    assert mtl("train", DIGITS).exit_code == 130
    monkeypatch.setenv("RANK", "0")
    assert mtl("train", DIGITS).exit_code == 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What `mtl launch` would have started."""
    plans: list[Launch] = []

    def supervise(plan: Launch) -> int:
        plans.append(plan)
        return 7

    monkeypatch.setattr("mtl_dist.launch.local.supervise", supervise)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    return plans


def test_launch_hands_recipe_and_overrides_to_the_ranks_and_returns_their_exit_code(
    launched: list[Launch],
) -> None:
    result = mtl("launch", DIGITS, "--nproc", "2", "optim.lr=1e-3", "--run-dir", "runs/x")
    assert result.exit_code == 7
    (plan,) = launched
    assert plan.num_processes == 2
    tail = ["--module", "mtl_dist", "train", str(DIGITS), "optim.lr=1e-3", "--run-dir", "runs/x"]
    assert list(plan.command[-len(tail) :]) == tail


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (["optim.lr=0"], "optim.lr: "),
        (["--nproc", "7"], "train.global_batch: "),
        (["--config-file", "launch/no.yaml"], "launch/no.yaml: "),
    ],
)
def test_launch_refuses_a_mistake_before_anything_starts(
    launched: list[Launch], arguments: list[str], where: str
) -> None:
    result = mtl("launch", DIGITS, *(arguments if "--nproc" in arguments else ["--nproc", "2", *arguments]))
    assert result.exit_code == 2
    assert result.stderr.startswith(where)
    assert launched == []


def test_a_plan_names_the_ranks_and_shares_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(12))
    plan = plan_launch(["train", "r.yaml"], 4, None, num_gpus=0)
    assert plan is not None
    assert (plan.num_processes, plan.threads) == (4, 3)
    assert "--multi_gpu" in plan.command
    per_gpu = plan_launch(["train", "r.yaml"], None, None, num_gpus=8)
    assert per_gpu is not None
    assert (per_gpu.num_processes, per_gpu.threads) == (8, 1)
    preset = plan_launch(["train", "r.yaml"], None, ROOT / "launch" / "zero2.yaml", num_gpus=0)
    assert preset is not None
    assert preset.num_processes == 2
    assert preset.command[3:5] == ("--config_file", str(ROOT / "launch" / "zero2.yaml"))


def test_one_process_needs_no_launcher() -> None:
    assert plan_launch(["train", "r.yaml"], 1, None, num_gpus=4) is None
    assert plan_launch(["train", "r.yaml"], None, None, num_gpus=0) is None


def test_more_processes_than_gpus_are_refused_but_may_run_on_the_cpus() -> None:
    with pytest.raises(UserError, match="--nproc: expected at most 2, the GPUs of this machine, found 4"):
        plan_launch(["train", "r.yaml"], 4, None, num_gpus=2)
    assert plan_launch(["train", "r.yaml"], 4, ROOT / "launch" / "ddp-cpu.yaml", num_gpus=2) is not None


def test_a_plan_for_several_machines_names_them_and_counts_all_ranks() -> None:
    machines = machines_of(3, 1, "gpu1.lab:29500")
    plan = plan_launch(["train", "r.yaml"], 2, None, num_gpus=0, machines=machines)
    assert plan is not None and plan.num_processes == 6
    options = dict(zip(plan.command[3:], plan.command[4:], strict=False))
    assert (options["--num_processes"], options["--num_machines"], options["--machine_rank"]) == (
        "6",
        "3",
        "1",
    )
    assert (options["--main_process_ip"], options["--main_process_port"]) == ("gpu1.lab", "29500")
    assert plan_launch(["train", "r.yaml"], None, None, num_gpus=1, machines=machines) is not None
    assert machines_of(1, None, None) is None
    assert machines_of(2, 0, "[fe80::1]:29500") == Machines(2, 0, "fe80::1", 29500)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--nodes 2", "--node-rank: expected 0 to 1, another on each machine, found none"),
        ("--nodes 2 --node-rank 2 --rendezvous a:1", "--node-rank: expected 0 to 1, .* found 2"),
        ("--nodes 2 --node-rank 0", "--rendezvous: expected HOST:PORT, .* found none"),
        ("--nodes 2 --node-rank 0 --rendezvous gpu1", "--rendezvous: expected HOST:PORT, .* found gpu1"),
        ("--rendezvous gpu1:29500", "--nodes: expected the number of machines"),
    ],
)
def test_machines_that_cannot_meet_are_refused(options: str, line: str) -> None:
    done = mtl("launch", DIGITS, "--nproc", "2", *options.split())
    assert done.exit_code == 2
    assert re.search(line, done.output)


def test_a_meeting_place_that_cannot_be_one_is_refused_before_anything_waits_for_it() -> None:
    def refused(rank: int, host: str, port: int) -> str:
        with pytest.raises(UserError) as caught:
            check_rendezvous(Machines(2, rank, host, port))
        return str(caught.value)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert refused(0, "127.0.0.1", port).endswith(f"found {port}, which is in use.")
        check_rendezvous(Machines(2, 1, "127.0.0.1", port))  # where the first machine listens already
    check_rendezvous(Machines(2, 0, "localhost", port))
    for rank in (0, 1):
        assert "first machine, found no.such.host.invalid: " in refused(rank, "no.such.host.invalid", 29500)
    assert "found 192.0.2.1, which is none of this machine's" in refused(0, "192.0.2.1", 29500)


def test_a_rank_that_fails_points_to_the_other_machines_where_there_are_some(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (report({1: 1}), report({1: 1}, num_machines=2)) == (1, 1)
    alone, among = capsys.readouterr().err.splitlines()
    assert among == f"{alone} If the first failure was another machine's, it is said there."


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1", "found no distributed_type"),
        ("a: [", "expected a config file of `accelerate launch`, found: "),
        ("distributed_type: MULTI_GPU\nnum_machines: 2", "expected num_machines 1, found 2"),
    ],
)
def test_a_file_that_is_no_config_for_this_machine_is_refused(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=line):
        plan_launch(["train", "r.yaml"], 2, path, num_gpus=0)


# ---------------------------------------------------------------- datasets and runs
def test_prepare_and_inspect_work_together_and_a_full_directory_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    out = tmp_path / "digits"
    result = mtl("prepare", "digits", out, "--workers", "1")
    assert result.exit_code == 0
    assert "1,258 train, 270 val, 269 test" in result.stdout
    shown = mtl("inspect", out, "--verify", "--sheet", tmp_path / "sheet.png", "--split", "val")
    assert shown.exit_code == 0
    assert (tmp_path / "sheet.png").stat().st_size > 0
    again = mtl("prepare", "digits", out)
    assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
    next(out.glob("val*.tar")).write_bytes(b"damaged")
    assert mtl("inspect", out, "--verify").exit_code == 1


def test_the_options_of_prepare_table_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run(*arguments: Any) -> None:
        seen.extend(arguments)
        raise UserError("seen")

    monkeypatch.setattr("mtl_dist.importers.run", run)
    text = (
        "prepare table a.csv b --image f --root r --regression z=e --classification x=c --classification y=d"
    )
    text += " --segmentation m=masks/ --classes m=0:no,255:yes --unit z=cm --split 0.9,0.1 --max-skipped 3"
    text += " --label classification:w=v --compute h=page*2 --group slide --stratify x --val 0.2"
    assert mtl(*text.split(), "--no-verify", "--seed", "5", "--workers", "2").exit_code == 2
    name, out, settings, options, _ = seen
    assert (name, out) == ("table", Path("b"))
    assert options == PackOptions(
        "0.9,0.1", 0.2, "slide", "x", seed=5, workers=2, max_skipped=3, verify=False
    )
    assert settings == {
        "source": "a.csv",
        "image": "f",
        "root": "r",
        "labels": {
            "w": "classification:v",
            "x": "classification:c",
            "y": "classification:d",
            "z": "regression:e",
            "m": "segmentation:masks/",
        },
        "classes": {"m": "0:no,255:yes"},
        "units": {"z": "cm"},
        "separator": "|",
        "strict": False,
        "compute": {"h": "page*2"},
    }
    assert list(settings["labels"]) == ["w", "x", "y", "z", "m"]  # by kind, however they are typed


@pytest.mark.parametrize(
    ("read", "line"),
    [
        (lambda: named("--unit", ["age"]), '--unit: expected TASK=COLUMN, found "age".'),
        (lambda: named("--unit", ["a=b", "a=c"]), "--unit: expected each task once, found a twice."),
        (
            lambda: class_names("m", "0:no,yes"),
            '--classes: expected m=NAME,NAME,... or m=0:NAME,1:NAME,..., found "0:no,yes".',
        ),
    ],
)
def test_a_malformed_option_is_one_line(read: Any, line: str) -> None:
    with pytest.raises(UserError) as error:
        read()
    assert str(error.value) == line


def test_class_names_go_by_index_or_by_value() -> None:
    assert class_names("a", "no,yes") == ["no", "yes"] == class_names("a", ["no", "yes"])
    assert (
        class_names("b", "0:no, 255:yes")
        == {0: "no", 255: "yes"}
        == class_names("b", {"0": "no", "255": "yes"})
    )


def test_images_that_cannot_be_read_make_exit_code_1_when_the_rest_is_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def predict_files(run: Path, given: list[str], **options: Any) -> tuple[int, int]:
        asked.update(options, given=given)
        return len(given), given.count("bad.png")

    asked: dict[str, Any] = {}
    monkeypatch.setattr("mtl_dist.prediction.files.predict_files", predict_files)
    out = tmp_path / "answers.csv"
    result = mtl(
        "predict", tmp_path, "a.png", "bad.png", "--out", out, "--threshold", "0.25", "--split", "val"
    )
    assert result.exit_code == 1
    assert result.stdout == f"{out}: 2 images\n"
    assert "1 of 2 images could not be read." in result.stderr
    assert asked["given"] == ["a.png", "bad.png"]
    assert (asked["out"], asked["threshold"], asked["split"]) == (out, 0.25, "val")
    assert mtl("predict", tmp_path, "a.png").exit_code == 0


def test_verify_fails_if_a_checkpoint_is_damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[tuple[list[str], list[str]]] = [(["step_1"], []), (["step_1"], ["step_2: damaged."])]
    monkeypatch.setattr("mtl_dist.runs.verification.verify", lambda run: found.pop(0))
    whole = mtl("verify", tmp_path)
    assert (whole.exit_code, whole.stdout) == (0, "step_1: good\n")
    damaged = mtl("verify", tmp_path)
    assert (damaged.exit_code, damaged.stderr) == (1, "step_2: damaged.\n")
