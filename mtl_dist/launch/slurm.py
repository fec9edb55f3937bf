"""Submitting a recipe to Slurm: run folder, snapshot, batch script, job (through submitit).

RUN/recipe.yaml                  resolved, with absolute paths
RUN/jobs.json                    the jobs of this run, oldest first
RUN/attempts.json                every start of a job, and why it ended
RUN/submissions/001/             one per submission; a sweep's is shared by its points
    submission.json              profile, shape, and the run folders of the job's array tasks
    code/                        the snapshot that the ranks import
    jobs/                        submitit's: batch script, pickles, one log per rank
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from submitit.core.utils import FailedJobError, FailedSubmissionError

from mtl_dist.config.loading import load_settings, to_yaml
from mtl_dist.config.trust import mark, parts_of
from mtl_dist.durable import write_text
from mtl_dist.errors import UserError
from mtl_dist.launch.profile import ClusterProfile
from mtl_dist.launch.rank import EvaluationJob, TrainingJob
from mtl_dist.launch.records import (
    JobRecord,
    Kind,
    Submission,
    read_jobs,
    read_submission,
    record_jobs,
    write_submission,
)
from mtl_dist.launch.script import Shape, build_executor, script_text
from mtl_dist.launch.snapshot import take_snapshot
from mtl_dist.launch.squeue import cluster_name, live_jobs
from mtl_dist.launch.sweep import point_labels, sweep_points
from mtl_dist.run_folder import RunFolder, checked_tags, new_run_directory
from mtl_dist.status import read_status

_SILENT_S = 600
"""After this time without a word a run of another cluster is not taken to be running."""

_OF_A_JOB = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SUBMITIT_")
_OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS", "SBATCH_CLUSTERS", "SLURM_CONF_SERVER")

if TYPE_CHECKING:
    from submitit.slurm.slurm import SlurmExecutor

    from mtl_dist.recipe import Recipe


@dataclass(frozen=True)
class Submitted:
    """What `submit` did: the run folders, and their jobs' ids in the same order (none in a dry run)."""

    runs: list[Path]
    job_ids: list[str]
    script: str


def submit(
    recipe: Path,
    cluster: Path,
    shape: Shape,
    *,
    overrides: Sequence[str] = (),
    sweeps: Sequence[str] = (),
    parallel: int | None = None,
    then: Literal["evaluate"] | None = None,
    run_dir: Path | None = None,
    tags: Sequence[str] = (),
    start_from: Path | None = None,
    data_moved: bool = False,
    dry_run: bool = False,
) -> Submitted:
    """Submits one job, or one job array with a run per point of the sweeps.

    `recipe` is a recipe file, or the folder of a run that is to go on, maybe on another number of ranks. A
    sweep is `a.b=1,2,3`; several are multiplied. `then` chains a job that starts when training is done. A
    new run may begin with the weights of the run `start_from`; with `data_moved` the data of one that goes on
    may lie in another place. With `dry_run` nothing is written or submitted.

    Raises:
        UserError: a mistake in recipe, profile or sweep; the data is not there; no Slurm here; Slurm refuses
            the job; the run has a job already; the folder holds another run.
    """
    profile = load_profile(cluster)
    checked_tags(tags)
    points = list(sweep_points(sweeps))
    start = [] if start_from is None else [{"start_from": str(start_from)}]
    recipes = resolved_recipes(recipe, [*overrides, *start], points, shape)
    directory = (
        run_dir or (recipe if recipe.is_dir() else new_run_directory(recipes[0].name or "run"))
    ).resolve()
    runs = [directory / label for label in point_labels(points)] if sweeps else [directory]
    if dry_run:
        return Submitted(runs, [], _script_of_no_job(directory, recipes, profile, shape, parallel))
    require_slurm()
    if profile.check_data:
        check_data(recipes)
    check_backbones(recipes)
    cluster_here = cluster_name()
    for run, point in zip(runs, recipes, strict=True):
        refuse_if_other(run, point, data_moved)
        refuse_if_active(run, cluster_here)
    with removed_on_failure(directory):
        folder = new_submission_folder(directory)
        _write_runs(runs, recipes, tags)
        write_submission(folder, _submission(folder, runs, recipes, profile, shape, data_moved))
        executor = build_executor(folder, job_name(recipes[0]), profile, shape, **limit(parallel))
        job_ids = submit_jobs(executor, [TrainingJob(run, folder) for run in runs])
        script = script_of(folder, job_ids[0])
    record_jobs(runs, job_ids, "train", folder, cluster_here)
    if then is not None:
        chain(then, folder, profile, job_name(recipes[0]), runs, job_ids, cluster_here)
    return Submitted(runs, job_ids, script)


def _script_of_no_job(
    directory: Path, recipes: Sequence[Recipe], profile: ClusterProfile, shape: Shape, parallel: int | None
) -> str:
    """The script as it would be submitted; nothing is written."""
    folder = directory / "submissions" / "001"
    executor = build_executor(folder, job_name(recipes[0]), profile, shape, dry_run=True, **limit(parallel))
    if len(recipes) > 1:
        executor.parameters["map_count"] = len(recipes)
    return script_text(executor)


def _write_runs(runs: Sequence[Path], recipes: Sequence[Recipe], tags: Sequence[str]) -> None:
    for run, recipe in zip(runs, recipes, strict=True):
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "recipe.yaml", to_yaml(recipe))
        mark(run, "recipe.yaml")
        RunFolder(run).change_tags(tags)


def _submission(
    folder: Path,
    runs: Sequence[Path],
    recipes: Sequence[Recipe],
    profile: ClusterProfile,
    shape: Shape,
    data_moved: bool,
) -> Submission:
    """What the jobs are told, with a snapshot of the code in `folder`."""
    return Submission(
        **asdict(shape),
        runs=[os.path.relpath(run, folder) for run in runs],
        requeue=profile.requeue.model_dump(),
        profile=profile.model_dump(mode="json"),
        modules=take_snapshot(folder / "code"),
        name=job_name(recipes[0]),
        working_directory=os.getcwd(),
        data_moved=data_moved,
    )


def load_profile(path: Path) -> ClusterProfile:
    """A cluster profile; its mistakes name the file, as a recipe is read in the same command.

    Raises:
        UserError: one line for every mistake.
    """
    try:
        return load_settings(ClusterProfile, path)
    except UserError as error:
        lines = str(error).splitlines()
        named = [line if line.startswith(str(path)) else f"{path}: {line}" for line in lines]
        raise UserError("\n".join(named)) from None


def require_slurm() -> None:
    """Refuses where nothing can be submitted."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch: expected Slurm on this machine, found none. Go to a login node of the cluster, "
            "or start a small cluster here with slurm/devcluster."
        )


def chain(
    kind: Kind,
    folder: Path,
    profile: ClusterProfile,
    name: str,
    runs: Sequence[Path],
    after: Sequence[str],
    cluster: str,
) -> None:
    """Submits a job of one rank per run that starts when that run's training is done, or never."""
    array = after[0].split("_")[0]
    dependency = f"aftercorr:{array}" if len(runs) > 1 else f"afterok:{array}"
    once = profile.model_copy(update={"sbatch": {**profile.sbatch, "kill-on-invalid-dep": "yes"}})
    executor = build_executor(
        folder, f"{name}-{kind}", once, Shape(1, 1), verdict=False, dependency=dependency
    )
    record_jobs(runs, submit_jobs(executor, [EvaluationJob(run) for run in runs]), kind, folder, cluster)


def submit_again(run: Path, profile: ClusterProfile, job: JobRecord, cluster: str) -> str:
    """Submits the job of a run a second time, with the code that it had and what was chained to it; its id.

    Raises:
        UserError: Slurm refuses the job.
    """
    before = (run / job.submission).resolve()
    asked = read_submission(before)
    folder = new_submission_folder(run)
    shutil.copytree(before / "code", folder / "code")
    write_submission(folder, replace(asked, runs=[os.path.relpath(run, folder)]))
    if asked.working_directory:
        chdir = {"chdir": asked.working_directory}
        profile = profile.model_copy(update={"sbatch": {**chdir, **profile.sbatch}})
    shape = Shape(asked.nodes, asked.tasks_per_node)
    (new,) = submit_jobs(build_executor(folder, asked.name, profile, shape), [TrainingJob(run, folder)])
    chained = {each.kind for each in read_jobs(run) if each.submission == job.submission} - {"train"}
    record_jobs([run], [new], "train", folder, cluster, again=True)
    for kind in sorted(chained):
        chain(kind, folder, profile, asked.name, [run], [new], cluster)
    return new


# -- recipes ----------------------------------------------------------------------------------------------


def resolved_recipes(
    recipe: Path,
    overrides: Sequence[str | Mapping[str, object]],
    points: Sequence[Sequence[str]],
    shape: Shape,
) -> list[Recipe]:
    """The recipe of every point, checked as far as it can be checked before the job starts."""
    from mtl_dist.recipe import load_recipe

    whose = parts_of(recipe, "recipe.yaml") if recipe.is_dir() else nullcontext()
    path = recipe / "recipe.yaml" if recipe.is_dir() else recipe
    with whose:
        recipes = [load_recipe(path, [*overrides, *point]).with_absolute_paths() for point in points]
    for point in recipes:
        point.train.accumulation_on(shape.nodes * shape.tasks_per_node)
    return recipes


def check_data(recipes: Sequence[Recipe]) -> None:
    """Refuses data that is not there, or is none, before anything waits in a queue for it.

    Raises:
        UserError: what is missing, and what to say if it is on the nodes alone.
    """
    from mtl_dist.importers.external import check_present

    for recipe in recipes:
        try:
            check_present(recipe.data, recipe.tasks)
            if recipe.start_from is not None:
                RunFolder.open(recipe.start_from)
        except UserError as error:
            raise UserError(
                f"{error} If it is on the nodes alone, say check_data: false in the profile."
            ) from None


def check_backbones(recipes: Sequence[Recipe]) -> None:
    """Refuses names that no backbone has.

    Raises:
        UserError: torchvision or timm has no such network; timm is not installed.
    """
    for model in {recipe.model.backbone_name: recipe.model for recipe in recipes}.values():
        if model.backbone_name != "simple_cnn":  # torch takes seconds
            from mtl_dist.models.backbones import check_backbone

            check_backbone(model)


# -- folders and records ----------------------------------------------------------------------------------


def new_submission_folder(directory: Path) -> Path:
    submissions = directory / "submissions"
    number = len(list(submissions.iterdir())) + 1 if submissions.is_dir() else 1
    folder = submissions / f"{number:03d}"
    folder.mkdir(parents=True)
    return folder


@contextmanager
def removed_on_failure(directory: Path) -> Iterator[None]:
    """Leaves no folder of a run that was not submitted, unless it was there before."""
    existed = directory.exists()
    try:
        yield
    except BaseException:
        if not existed:
            shutil.rmtree(directory, ignore_errors=True)
        raise


def refuse_if_other(run: Path, recipe: Recipe, data_moved: bool) -> None:
    """Refuses a folder that holds a run which this recipe cannot go on with: its recipe would be lost."""
    from mtl_dist.recipe import load_recipe_of
    from mtl_dist.resuming import refuse_other_run

    if (run / "recipe.yaml").is_file():
        refuse_other_run(load_recipe_of(run), recipe, run, data_moved)


def refuse_if_active(run: Path, cluster: str) -> None:
    """Refuses to submit a run a second time while a job of it waits or runs, here or on another cluster."""
    jobs = read_jobs(run)
    live = live_jobs() if jobs else {}
    status = read_status(run)
    for job in jobs:
        elsewhere = job.cluster not in ("", cluster)
        if elsewhere and status is not None and status.state == "running":
            if time.time() - status.updated < _SILENT_S:
                raise UserError(
                    f"{run}: job {job.id} of this run is running on cluster {job.cluster}. "
                    "Wait for it, or end it there with `mtl cancel`."
                )
        elif job.id in live and not elsewhere:
            raise UserError(
                f"{run}: job {job.id} of this run is {live[job.id].state.lower()}. "
                "Wait for it, or end it with `mtl cancel`."
            )


# -- submitit ---------------------------------------------------------------------------------------------


def submit_jobs(executor: SlurmExecutor, calls: Sequence[Callable[[], None]]) -> list[str]:
    """Submits one job, or several as one array; returns the job ids.

    Raises:
        UserError: Slurm refuses, with what it said.
    """
    try:
        # submitit prints what sbatch says; it is in the error too.
        with redirect_stderr(io.StringIO()), _outside_of_jobs():
            if len(calls) == 1:
                return [executor.submit(calls[0]).job_id]
            with executor.batch():
                jobs = [executor.submit(call) for call in calls]
            return [job.job_id for job in jobs]
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        lines = str(error).splitlines()
        said = [line.removeprefix("sbatch: ") for line in lines if line.startswith("sbatch: ")] or lines
        advice = (
            "Is SLURM_CONF right?" if "configuration source" in said[-1] else "Look at the cluster profile."
        )
        raise UserError(f"sbatch refused the job: {'; '.join(said)}. {advice}") from None


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """sbatch hands its environment on: submitted from a job, the new one would take itself for that one.

    It would also read that job's shape (SLURM_NTASKS_PER_NODE, SLURM_MEM_PER_NODE, ...) as its own.
    """
    of_job = [name for name in os.environ if name.startswith(_OF_A_JOB) and name not in _OF_THE_CLUSTER]
    kept = {name: os.environ.pop(name) for name in of_job}
    try:
        yield
    finally:
        os.environ.update(kept)


def script_of(folder: Path, job_id: str) -> str:
    return (folder / "jobs" / f"{job_id.split('_')[0]}_submission.sh").read_text(encoding="utf-8")


def job_name(recipe: Recipe) -> str:
    return f"mtl-{recipe.name or 'run'}"


def limit(parallel: int | None) -> dict[str, Any]:
    return {"array_parallelism": parallel} if parallel is not None else {}
