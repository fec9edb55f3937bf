"""What is submitted: the batch script, the snapshot, the points of a sweep, the profile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mtl_dist.config import user_modules
from mtl_dist.config.loading import load_settings
from mtl_dist.config.user_defined import imported
from mtl_dist.errors import UserError
from mtl_dist.launch.profile import ClusterProfile, Prefix, Pyxis
from mtl_dist.launch.script import CHOOSE_PORT, Shape, build_executor, script_text, with_variables
from mtl_dist.launch.slurm import new_submission_folder, removed_on_failure
from mtl_dist.launch.snapshot import differences, take_snapshot
from mtl_dist.launch.sweep import point_labels, split_values, sweep_points

PROFILES = sorted((Path(__file__).parents[3] / "slurm").glob("*.yaml"))


def script(**settings: Any) -> str:
    profile = ClusterProfile(**settings)
    return script_text(build_executor(Path("/runs/x"), "mtl-x", profile, Shape(2, 4), dry_run=True))


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


# -- the script -------------------------------------------------------------------------------------------


def test_a_dead_rank_ends_the_step_and_each_rank_gets_its_cpus() -> None:
    (srun,) = lines_of(script(cpus_per_task=6), "srun ")
    assert "--kill-on-bad-exit=1" in srun
    assert "--wait=60" in srun
    assert "--cpus-per-task=6" in srun


def test_one_rank_per_gpu_or_ranks_without_gpus() -> None:
    assert "#SBATCH --gpus-per-node=4" in script()
    assert "gpus" not in script(gpus_per_task=0)


def test_slurm_is_asked_for_a_signal_in_time_and_may_requeue() -> None:
    text = script(signal_lead_s=90)
    assert "#SBATCH --signal=USR2@90" in text
    assert "#SBATCH --requeue" in text
    assert "#SBATCH --open-mode=append" in text


def test_the_ranks_import_the_snapshot_before_anything_else() -> None:
    (line,) = lines_of(script(), "export PYTHONPATH=")
    assert line.startswith("export PYTHONPATH=/runs/x/code:")
    assert "PYTHONSAFEPATH=1" in line


def test_options_of_the_profile_reach_sbatch_srun_and_the_ranks() -> None:
    text = script(
        partition="gpu",
        account="lab",
        memory_gb=64,
        network_interface="ib0",
        modules=("cuda/12.4",),
        environment={"NCCL_DEBUG": "a b"},
        setup=("ulimit -n 65536",),
        sbatch={"exclusive": True, "nodelist": "gpu[1-4]"},
        srun=("--mpi=none",),
    )
    for wanted in (
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --mem=64G",
        "#SBATCH --exclusive",
        "#SBATCH --nodelist='gpu[1-4]'",
        "module load cuda/12.4",
        "export NCCL_DEBUG='a b'",
        "export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0",
        "ulimit -n 65536",
    ):
        assert wanted in text.splitlines(), wanted
    assert "--mpi=none" in lines_of(text, "srun ")[0]


def test_a_container_of_pyxis_holds_the_ranks_and_the_verdict_but_not_scontrol() -> None:
    container = Pyxis(kind="pyxis", image="nvcr.io#pytorch", mounts=("/data:/data:ro", "/runs:/runs"))
    text = script(container=container, python="python3")
    (srun,) = lines_of(text, "srun ")[:1]
    assert "--container-image=nvcr.io#pytorch" in srun
    assert "--container-mounts=/data:/data:ro,/runs:/runs" in srun
    (verdict,) = [line for line in text.splitlines() if "launch.attempts" in line]
    assert verdict.startswith("srun --nodes=1 --ntasks=1 '--container-image")
    assert verdict.endswith('&& persist scontrol requeue "$JOB"')


def test_a_prefix_command_comes_before_python() -> None:
    container = Prefix(kind="prefix", command="apptainer exec --nv image.sif")
    text = script(container=container, python="python3")
    assert "apptainer exec --nv image.sif python3 -u -m submitit" in text
    assert "apptainer exec --nv image.sif python3 -m mtl_dist.launch.attempts" in text


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("0:30:00", 30), ("12:00:00", 720), ("1-00:00", 1440), ("0:01:30", 2), ("2-1:30:00", 2970)],
)
def test_the_time_limit_is_slurms_and_never_shorter_than_asked(limit: str, minutes: int) -> None:
    assert f"#SBATCH --time={minutes}" in script(time_limit=limit, signal_lead_s=20, save_margin_s=20)


def test_the_script_is_valid_shell() -> None:
    text = script(setup=("true",), modules=("x",), network_interface="ib0")
    result = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_port_is_free_and_not_one_that_connections_are_given() -> None:
    code = f"MASTER_ADDR=127.0.0.1\n{CHOOSE_PORT}\necho $MASTER_PORT"
    result = subprocess.run(["bash", "-c", code], text=True, capture_output=True, check=True)
    assert 20000 <= int(result.stdout) < 32768


ARRAY = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.parametrize(
    ("code", "verdict", "array", "calls"),
    [
        (0, 0, {}, "requeue 7"),
        (1, 0, {}, "requeue 7"),
        (0, 0, ARRAY, "requeue 7_3"),
        (0, 1, {}, ""),
        (9, 1, {}, ""),
    ],
)
def test_the_verdict_alone_decides_about_the_requeue(
    tmp_path: Path, code: int, verdict: int, array: dict[str, str], calls: str
) -> None:
    programs = {"squeue": "echo RUNNING", "scontrol": "true", "srun": f"exit {code}"}
    result = run_script(tmp_path, {**programs, "python": f"exit {verdict}"}, array)
    assert result.returncode == code
    assert requeues(tmp_path) == ([calls] if calls else [])


def run_script(
    work: Path, programs: dict[str, str], environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the batch script of job 7 with pretended programs; what they get is in `calls`."""
    profile = ClusterProfile(python=str(work / "python"))
    text = script_text(build_executor(work, "x", profile, Shape(1, 1), dry_run=True))
    for name, body in programs.items():
        path = work / name
        path.write_text(f'#!/bin/bash\necho "{name} $@" >> {work}/calls\n{body}\n')
        path.chmod(0o755)
    environment = os.environ | {"PATH": f"{work}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "SLURM_JOB_NODELIST": "localhost", **(environ or {})}
    return subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, check=False)


def calls_of(work: Path, name: str) -> list[str]:
    calls = [line.partition(" ") for line in (work / "calls").read_text().splitlines()]
    return [arguments for program, _, arguments in calls if program == name]


def requeues(work: Path) -> list[str]:
    return [call for call in calls_of(work, "scontrol") if call.startswith("requeue")]


def test_a_controller_that_does_not_answer_at_once_is_asked_again(tmp_path: Path) -> None:
    busy = f"(( $(grep -c ^$(basename $0) {tmp_path}/calls) % 3 )) && exit 1"
    programs = {"squeue": f"{busy}\necho RUNNING", "scontrol": f"[ $1 = show ] && exit\n{busy}", "srun": ""}
    assert run_script(tmp_path, {**programs, "python": "", "sleep": ""}).returncode == 0
    assert requeues(tmp_path)[-2:] == ["requeue 7", "requeue 7"]
    assert calls_of(tmp_path, "python")[0].endswith("--job-state RUNNING")
    assert calls_of(tmp_path, "sleep")[:2] == ["5", "20"]


@pytest.mark.parametrize("answer", ["exit 1", "echo NONE", "date -d 2030-01-01T00:00:00Z +%FT%T%z"])
def test_the_ranks_learn_the_jobs_end_or_that_nobody_knows_it(tmp_path: Path, answer: str) -> None:
    programs = {"squeue": answer, "scontrol": "", "python": "exit 1", "sleep": ""}
    run_script(tmp_path, {**programs, "srun": f'echo "end $MTL_END_TIME" >> {tmp_path}/calls'})
    assert calls_of(tmp_path, "end") == ["1893456000" if answer.startswith("date") else ""]


@pytest.mark.parametrize("restarts", ["", "0", "3", "8", "11"])
def test_the_ranks_of_attempts_that_follow_each_other_are_steps_of_different_numbers(
    tmp_path: Path, restarts: str
) -> None:
    programs = {"squeue": "echo RUNNING", "scontrol": "", "python": "exit 1", "srun": ""}
    run_script(tmp_path, programs, {"SLURM_RESTART_COUNT": restarts})
    *before, ranks = calls_of(tmp_path, "srun")
    assert len(before) == int(restarts or 0) % 8
    assert "submitit" in ranks and all(call.endswith(" true") for call in before)


def test_signals_to_the_script_do_not_reach_the_verdict(tmp_path: Path) -> None:
    signals = "for name in USR1 USR2 TERM; do kill -$name $PPID; kill -$name $$; done; exit 0"
    programs = {"squeue": "echo RUNNING", "scontrol": "", "srun": "kill -USR2 $PPID", "python": signals}
    assert run_script(tmp_path, programs).returncode == 0
    assert requeues(tmp_path) == ["requeue 7"]


def test_a_failing_setup_or_module_starts_no_rank(tmp_path: Path) -> None:
    for number, options in enumerate(({"setup": ("true", "false --really")}, {"modules": ("missing/1.0",)})):
        work = tmp_path / str(number)
        work.mkdir()
        profile = ClusterProfile(python="true", **options)
        text = script_text(build_executor(work, "x", profile, Shape(1, 1), dry_run=True))
        (work / "srun").write_text(f"#!/bin/bash\ntouch {work}/started\n")
        (work / "srun").chmod(0o755)
        for name in ("squeue", "scontrol"):
            (work / name).symlink_to("/bin/true")
        environ = os.environ | {"PATH": f"{work}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        environ |= {"MASTER_ADDR": "127.0.0.1", "SLURM_JOB_NODELIST": "localhost"}
        result = subprocess.run(
            ["bash", "-c", text], env=environ, capture_output=True, text=True, check=False
        )
        assert result.returncode == 1
        assert "setup failed: " in result.stdout
        assert not (work / "started").exists()


def test_the_environment_knows_the_nodes_variables_and_runs_nothing(tmp_path: Path) -> None:
    value = f"$HOME/a b:${{USER}}:$(touch {tmp_path}/ran)"
    done = subprocess.run(
        ["bash", "-c", f'export X={with_variables(value)}; printf %s "$X"'],
        env={"HOME": "/home/me", "USER": "me", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"/home/me/a b:me:$(touch {tmp_path}/ran)"
    assert not (tmp_path / "ran").exists()


def test_the_shell_reads_setup_lines_as_they_stand() -> None:
    assert (
        'export DATA="${DATA:-/scratch}"' in script(setup=('export DATA="${DATA:-/scratch}"',)).splitlines()
    )


def test_no_wckey_is_named_but_the_profiles() -> None:
    assert "wckey" not in script()
    assert "#SBATCH --wckey=mine" in script(sbatch={"wckey": "mine"}).splitlines()


def test_a_time_limit_without_time_for_a_step_is_refused() -> None:
    with pytest.raises(
        ValidationError, match="time_limit: expected at least signal_lead_s and 60 s to start"
    ):
        ClusterProfile(time_limit="0:03:30", signal_lead_s=180)
    assert ClusterProfile(time_limit="0:04:00", signal_lead_s=180).time_limit_s == 240


# -- profiles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_that_we_ship_loads_and_makes_a_script(path: Path) -> None:
    profile = load_settings(ClusterProfile, path)
    assert "srun" in script_text(build_executor(Path("/r"), "x", profile, Shape(1, 2), dry_run=True))


@pytest.mark.parametrize("limit", ["90", "12:00", "1:2:3:4", "soon", "1-00"])
def test_a_time_limit_that_slurm_would_read_otherwise_is_refused(limit: str) -> None:
    with pytest.raises(ValidationError, match="HOURS:MINUTES"):
        ClusterProfile(time_limit=limit)


def test_the_ranks_must_have_time_to_save_before_the_end() -> None:
    with pytest.raises(ValidationError, match="save_margin_s"):
        ClusterProfile(time_limit="0:02:00", save_margin_s=120)


def test_a_misspelt_key_of_a_profile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("partitoin: gpu\n")
    with pytest.raises(UserError, match="partition"):
        load_settings(ClusterProfile, path)


# -- sweeps -----------------------------------------------------------------------------------------------


def test_without_a_sweep_there_is_one_point_without_overrides() -> None:
    assert list(sweep_points([])) == [[]]


@pytest.mark.parametrize("sweep", ["a.b", "a.b=", "a.b=1,,2", "=1,2", "a.b=1,2,1"])
def test_a_sweep_without_values_or_with_one_twice_is_refused(sweep: str) -> None:
    with pytest.raises(UserError, match="sweep: expected"):
        list(sweep_points([sweep]))


def test_a_key_that_is_swept_twice_is_refused() -> None:
    with pytest.raises(UserError, match="found a twice"):
        list(sweep_points(["a=1,2", "a=3"]))


@given(st.lists(st.sampled_from(["1", "a", "[1,2]", "{k: 1, l: [2,3]}", "'a, b'", '"[,"']), min_size=1))
def test_values_may_hold_commas_in_brackets_and_quotes(values: list[str]) -> None:
    assert split_values(",".join(values)) == values


def test_the_folders_of_a_sweep_are_distinct_short_and_those_of_a_wider_sweep_too() -> None:
    def labels(sweeps: list[str]) -> list[str]:
        return point_labels(list(sweep_points(sweeps)))

    narrow = labels(["optim.lr=1e-3,1e-4", "model.lr=[1,2],x/y,x_y"])
    wide = labels(["optim.lr=1e-2,1e-3,1e-4", "model.lr=[1,2],x/y,x_y," + "z" * 300])
    assert len(set(wide)) == len(wide)
    assert set(narrow) < set(wide)
    assert "optim.lr=1e-3-model.lr=x_y" in narrow
    assert all(len(label) < 120 and "/" not in label for label in wide)


# -- snapshot and folders ---------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a user's code, where `mtl` is started; what is imported from it is forgotten again."""
    before, path = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(user_modules, "_brought_in", set())
    yield tmp_path
    for name in sys.modules.keys() - before:
        del sys.modules[name]
    sys.path[:] = path


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


PROJECT = {
    "part.py": "import importlib, json, numpy\nimport helper\nfrom spread.inner import x\n"
    "importlib.import_module('by_' + 'name')\nclass Part:\n    def late(self): import later.inside\n",
    "helper.py": "import proj.deep.leaf\n",
    "by_name.py": "",
    "proj/__init__.py": "",
    "proj/deep/__init__.py": "",
    "proj/deep/leaf.py": "from . import table",
    "proj/deep/table.py": "",
    "proj/deep/weights.txt": "1 2 3",
    "spread/inner.py": "x = 1",
    "spread/runs/of/others.txt": "large",
    "later/__init__.py": "import even_later",
    "later/inside.py": "",
    "even_later.py": "",
    "data/v1/readme.py": "",
    "unrelated.py": "",
}


def test_the_snapshot_holds_the_package_and_all_that_a_users_part_imports(project: Path) -> None:
    write(project, PROJECT)
    imported("part.Part")
    taken = take_snapshot(project / "proj" / "runs" / "code")
    modules = ["by_name.py", "even_later.py", "helper.py", "later", "part.py", "proj", "spread"]
    assert sorted(taken) == modules
    code = project / "proj" / "runs" / "code"
    assert sorted(path.name for path in code.iterdir()) == sorted([*modules, "mtl_dist"])
    assert (code / "mtl_dist" / "launch" / "rank.py").is_file()
    assert (code / "proj" / "deep" / "weights.txt").is_file()
    assert not (code / "proj" / "runs").exists()
    assert [path.name for path in (code / "spread").rglob("*")] == ["inner.py"]
    assert not list(code.rglob("__pycache__"))


def test_later_edits_do_not_change_a_snapshot_and_those_of_it_are_said(project: Path) -> None:
    write(project, {"mine.py": "import other", "other.py": "version = 1"})
    imported("mine.__name__")
    code = project / "code"
    taken = take_snapshot(code)
    (project / "other.py").write_text("version = 2")
    assert (code / "other.py").read_text() == "version = 1"
    assert list(differences(code, taken)) == [
        f"module {name}: imported from {project / name}.py, not from the copy of the submission"
        for name in ("mine", "other")
    ]
    (code / "other.py").write_text("version = 3")
    assert next(differences(code, taken)) == f"{code}/other.py: another source than at submission"


def test_a_job_imports_the_snapshot_whatever_is_edited_where_it_was_submitted(project: Path) -> None:
    write(project, {"mine.py": "import other", "other.py": "version = 1"})
    imported("mine.__name__")
    taken = take_snapshot(project / "code")
    write(project, {"mine.py": "import other", "other.py": "version = 2"})
    code = (
        "import sys, other; from pathlib import Path; from mtl_dist.launch.snapshot import differences;"
        "from mtl_dist.config.user_defined import imported; imported('mine.__name__');"
        f"print(other.version, list(differences(Path('code'), {taken})))"
    )
    path = f"{project / 'code'}:{project}"
    command = [sys.executable, "-P", "-c", code]
    environ = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == "1 []\n"


def test_submissions_are_numbered(tmp_path: Path) -> None:
    assert [new_submission_folder(tmp_path).name for _ in range(2)] == ["001", "002"]


def test_a_refused_submission_leaves_no_folder_but_never_removes_an_old_one(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("old", "new"):
        with pytest.raises(UserError), removed_on_failure(tmp_path / name):
            (tmp_path / name).mkdir(exist_ok=True)
            raise UserError("refused")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
