"""Runs: the parts of a recipe built in the order in which data meets them, then trained or evaluated."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from mtl_dist.assemble import (
    best_or_newest,
    build_monitor,
    build_root,
    check_balancing,
    check_device,
    check_labels,
    facts_of,
    inference_weights,
    load_root,
    plan_of,
)
from mtl_dist.balancing import Balancing
from mtl_dist.caveats import caveats, check_norms
from mtl_dist.checkpoint import (
    CheckpointWriter,
    newest_good,
    problems_of,
    read_checkpoint,
    step_directory,
    steps_in,
)
from mtl_dist.config.describe import listed
from mtl_dist.config.loading import to_yaml
from mtl_dist.data.decode import decoder_name
from mtl_dist.data.loader import Data, eval_loader, open_data, train_loader
from mtl_dist.data.partition import micro_batch_size
from mtl_dist.durable import write_text
from mtl_dist.ema import Ema
from mtl_dist.engine.connect import connect, connect_without_engine
from mtl_dist.engine.engine import Engine
from mtl_dist.engine.world import World
from mtl_dist.errors import UserError
from mtl_dist.evaluator import Evaluation, evaluate
from mtl_dist.figures.run_figures import RunFigures
from mtl_dist.importers.external import with_indexes
from mtl_dist.models.compiling import compile_parts
from mtl_dist.optim import build_optimizer
from mtl_dist.plural import plural
from mtl_dist.recipe import Recipe, load_recipe, refuse_other_run
from mtl_dist.results import print_results, write_evaluation
from mtl_dist.run_folder import RunFolder, new_run_directory
from mtl_dist.step import RootModule
from mtl_dist.stopping import StopAsked, StopSignal, agreed_stop, until_stopped
from mtl_dist.tracking.registry import check_tracking, open_tracker
from mtl_dist.tracking.tracker import Tracker
from mtl_dist.trainer import Outcome, Trainer


def train(recipe: Recipe, run_dir: Path | None = None, stop: StopSignal | None = None) -> Outcome:
    """Train `recipe` in `run_dir`, from its newest good checkpoint if the folder has one.

    Called by every rank of the group that the launcher started. `stop` knows a deadline besides the signals.

    Raises:
        UserError: the recipe does not fit its data, the number of ranks, or the run that the folder holds.
    """
    connection = connect(recipe.engine, recipe.train.precision)
    world = connection.world
    recipe = recipe.with_absolute_paths()
    accumulation = recipe.train.accumulation_on(world.size)
    check_device(recipe, world.device, connection.choice)
    check_tracking(recipe.tracking)

    # ---- data
    data = open_data(with_indexes(recipe.data), recipe.tasks)
    check_labels(data, recipe)

    # ---- tasks, model, balancing: one root module
    torch.manual_seed(recipe.train.seed)
    root = build_root(recipe, facts_of(data), world)
    check_balancing(recipe, root, data, connection.choice)
    few = check_norms(
        root, data, micro_batch_size(recipe.train.global_batch, world.size, accumulation), world
    )
    num_parameters = sum(p.numel() for p in root.parameters())
    if recipe.train.compile:
        compile_parts(root.model, world.device, recomputing=recipe.model.checkpointing != "off")

    # ---- engine
    optimizer = build_optimizer(recipe.optim, root.model, list(root.tasks), list(root.balancer.parameters()))
    parts = [root.task_parameters(task) for task in root.tasks]
    engine = connection.build(root, optimizer, parts)
    balancing = Balancing(root, engine, recipe.train.seed, recipe.balance.diagnose_every)

    # ---- run folder, trainer
    directory = world.broadcast(run_dir or new_run_directory(recipe.name or "run"))
    with training_folder(directory, recipe, world) as (folder, saved):
        if world.is_main:
            folder.write_data(facts_of(data))
        trainer = build_trainer(
            recipe, data, engine, root, balancing, folder, saved, accumulation, stop or StopSignal()
        )
        introduce(trainer, recipe, data, folder, connection.describe(), num_parameters)
        if few:
            trainer.tracker.say(f"warning  {few}")
        return replace(run_to_the_end(trainer, recipe, data, folder), directory=directory)


def evaluate_run(run: Path, split: str) -> None:
    """Evaluate the best weights of a run on one split; metrics go to its evaluation/ folder.

    Raises:
        UserError: not a run folder, no good checkpoint, or no such split.
    """
    folder = RunFolder.open(run)
    recipe = load_recipe(folder.recipe_path)
    world = connect_without_engine(recipe.engine)
    data = open_data(with_indexes(recipe.data), recipe.tasks)
    if split not in data.splits:
        raise UserError(f"--split: expected one of {', '.join(data.splits)}, found {split!r}.")
    root = load_root(folder, recipe, world, warn)
    accumulation = recipe.train.accumulation_on(world.size)
    batch_size = micro_batch_size(recipe.train.global_batch, world.size, accumulation)
    evaluation = evaluate_split(root, data, split, batch_size, world)
    if world.is_main:
        write_evaluation(folder, split, evaluation, data.task_infos)
        print_results({split: evaluation})


def verify(run: Path) -> tuple[list[str], list[str]]:
    """Check every checkpoint of a run: the good ones' names, and one line per problem."""
    folder = RunFolder.open(run)
    good: list[str] = []
    problems: list[str] = []
    for step in steps_in(folder.checkpoints):
        path = step_directory(folder.checkpoints, step)
        found = problems_of(path)
        problems += found
        if not found:
            good.append(path.name)
    return good, problems


# ---------------------------------------------------------------- parts of train
def build_trainer(
    recipe: Recipe,
    data: Data,
    engine: Engine,
    root: RootModule,
    balancing: Balancing,
    folder: RunFolder,
    saved: Path | None,
    accumulation: int,
    stop: StopSignal,
) -> Trainer:
    """The trainer, in the state of the checkpoint at `saved`, or at the beginning."""
    world = engine.world
    resumed = read_checkpoint(saved) if saved is not None else None
    plan = plan_of(recipe, data, accumulation)

    def evaluate_val() -> Evaluation:
        return evaluate_split(root, data, "val", plan.micro_batch_on(world.size), world, stop)

    tracker = (
        open_tracker(
            folder.directory,
            resumed_step=resumed.step if resumed else 0,
            tracking=recipe.tracking,
            name=recipe.name or "run",
            recipe=recipe.model_dump(mode="json"),
        )
        if world.is_main
        else Tracker(None)
    )
    trainer = Trainer(
        engine=engine,
        root=root,
        balancing=balancing,
        optim=recipe.optim,
        plan=plan,
        monitor=build_monitor(recipe),
        ema=Ema(engine, recipe.optim.ema) if recipe.optim.ema is not None else None,
        evaluate=evaluate_val if "val" in data.splits else None,
        writer=CheckpointWriter(folder.checkpoints, recipe.train.keep_last) if world.is_main else None,
        tracker=tracker,
        figures=RunFigures(tracker.directory, recipe.monitor.metric, tracker.say),
        stop=stop,
        recipe_text=to_yaml(recipe),
        max_bad_steps=recipe.train.max_bad_steps,
    )
    if resumed is not None:
        trainer.load(resumed)
    return trainer


def run_to_the_end(trainer: Trainer, recipe: Recipe, data: Data, folder: RunFolder) -> Outcome:
    """Train, evaluate the best weights, and leave the folder complete, however it ends."""
    world, plan, tracker = trainer.world, trainer.plan, trainer.tracker
    batches = train_loader(
        data,
        seed=plan.seed,
        global_batch=plan.global_batch,
        accumulation=plan.accumulation,
        rank=world.rank,
        world_size=world.size,
        start_position=trainer.position,
        end_position=plan.end_position,
        workers=recipe.data.workers,
        pin_memory=world.device.type == "cuda",
    )
    trainer.stop.install()
    try:
        with progress_bar(tracker, plan.end_position, trainer.position) as advance:
            outcome = trainer.run(batches, advance)
        if trainer.writer is not None:
            trainer.writer.finish()
        world.barrier()
        if outcome.state == "done" and recipe.train.evaluate_at_end:
            reason = agreed_stop(trainer.stop, world) or evaluate_at_end(trainer, data, folder)
            if reason:
                outcome = Outcome("stopped", outcome.step, reason)
    except BaseException as error:
        failed = trainer.status("failed", last_line(error))
        tracker.status(replace(failed, retry=not isinstance(error, UserError)))
        raise
    finally:
        trainer.stop.restore()
    tracker.status(trainer.status(outcome.state, outcome.reason))
    trainer.figures.draw_curves()
    trainer.figures.draw_conflicts()
    peaks = world.gather(peak_memory(world.device))
    if world.is_main:
        folder.write_peak_memory(max(peaks))
        if outcome.state == "done":
            tracker.pictures(folder.pictures(), outcome.step)
    farewell(tracker, outcome, folder)
    tracker.close()
    return outcome


@contextmanager
def training_folder(directory: Path, recipe: Recipe, world: World) -> Iterator[tuple[RunFolder, Path | None]]:
    """The run folder, made or taken up again by rank 0 and locked while training; its newest good checkpoint.

    Raises:
        UserError: another process trains in it, or it holds another run, or none of its checkpoints is whole.
            Then it is left as it was.
    """
    folder = RunFolder(directory)

    def enter() -> Path | None:
        directory.mkdir(parents=True, exist_ok=True)
        lock.__enter__()
        if folder.recipe_path.is_file():
            refuse_other_run(load_recipe(folder.recipe_path), recipe, directory)
        saved = newest_good(folder.checkpoints, warn)
        write_text(folder.recipe_path, to_yaml(recipe))
        before = folder.write_environment(world.size, str(world.device), decoder_name())
        if before is not None:
            now = decoder_name()
            warn(f"{directory}: images were decoded by {before} so far, and are by {now} from here on.")
        return saved

    lock = folder.locked()
    saved = world.on_main(enter)
    try:
        yield folder, saved
    finally:
        if world.is_main:
            lock.__exit__(None, None, None)


def evaluate_split(
    root: RootModule,
    data: Data,
    split: str,
    batch_size: int,
    world: World,
    stop: StopSignal | None = None,
) -> Evaluation:
    """Collective: the metrics of one split.

    Raises:
        StopAsked: a rank was asked to stop before the end.
    """
    loader = eval_loader(
        data,
        split,
        batch_size=batch_size,
        rank=world.rank,
        world_size=world.size,
        workers=data.settings.workers,
        pin_memory=world.device.type == "cuda",
    )
    return evaluate(root, loader if stop is None else until_stopped(loader, stop, world), world)


def evaluate_at_end(trainer: Trainer, data: Data, folder: RunFolder) -> str:
    """Evaluate the best weights on every split but the training one; write and print the metrics.

    Returns the reason to stop, if any rank was asked to before all was evaluated: then nothing is written,
    and the next start of the run evaluates.
    """
    engine, root, tracker, world = trainer.engine, trainer.root, trainer.tracker, trainer.world
    batch_size = trainer.plan.micro_batch_on(world.size)
    path = world.on_main(lambda: best_or_newest(folder, tracker.say))
    engine.load_full_state(inference_weights(read_checkpoint(path)), {})
    evaluations: dict[str, Evaluation] = {}
    try:
        with engine.evaluating():
            for split in ("val", "test"):
                if split in data.splits:
                    evaluations[split] = evaluate_split(root, data, split, batch_size, world, trainer.stop)
    except StopAsked as asked:
        return asked.reason
    if world.is_main and evaluations:
        for split, evaluation in evaluations.items():
            write_evaluation(folder, split, evaluation, data.task_infos)
            tracker.results(evaluation.flat(f"best/{split}"), trainer.step)
        tracker.say(f"Results of {path.name}:")
        print_results(evaluations, tracker.console)
    return ""


def introduce(
    trainer: Trainer, recipe: Recipe, data: Data, folder: RunFolder, engine: str, num_parameters: int
) -> None:
    """Say what is about to run, and what is odd about it."""
    plan, world, tracker = trainer.plan, trainer.world, trainer.tracker
    micro_batch = plan.micro_batch_on(world.size)
    tracker.say(f"run      {folder.directory}")
    tracker.say(f"data     {data.describe()}")
    tracker.say(f"tasks    {', '.join(f'{name} ({info.kind})' for name, info in data.task_infos.items())}")
    if data.not_learnt:
        tracker.say(f"         not learnt, because the recipe does not name them: {listed(data.not_learnt)}")
    if recipe.absent_tasks:
        tracker.say(f"         not in the data, and optional: {listed(recipe.absent_tasks)}")
    model = f"{recipe.model.backbone_name}, {num_parameters:,} parameters"
    tracker.say(f"model    {model}, {recipe.train.precision}")
    tracker.say(f"engine   {engine}")
    tracker.say(
        f"batch    {plan.global_batch} = {plural(world.size, 'rank')} x {plan.accumulation} x {micro_batch} "
        f"on {world.device.type}, {plural(plan.total_steps, 'step')}"
    )
    why_not = trainer.balancing.why_no_diagnosis
    if recipe.balance.diagnose_every and why_not and len(recipe.tasks) > 1:
        tracker.say(f"balance  the tasks' gradients are not compared: {why_not}.")
    for line in caveats(recipe, data, trainer.root, world):
        tracker.say(f"warning  {line}")
    if trainer.step:
        tracker.say(f"resume   from step {trainer.step}, position {trainer.position}")


def farewell(tracker: Tracker, outcome: Outcome, folder: RunFolder) -> None:
    """Say how the run ended and where its files are."""
    if outcome.state == "stopped":
        tracker.say(
            f"Stopped at step {outcome.step} ({outcome.reason}); everything is saved. "
            f"The same command with --run-dir {folder.directory} goes on from there."
        )
        return
    if outcome.reason:
        tracker.say(f"Stopped early at step {outcome.step}: {outcome.reason}.")
    tracker.say(f"The run is in {folder.directory}:")
    for name, what in RunFolder.FILES.items():
        if (folder.directory / name).exists():
            tracker.say(f"  {name:<22} {what}")


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held at once: on the GPU, or of the host's memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


@contextmanager
def progress_bar(tracker: Tracker, plan_total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar over the samples of the run, on rank 0's terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if tracker.directory is None or not tracker.console.is_terminal:
        yield lambda samples: None
        return
    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=tracker.console, transient=True) as progress:
        bar = progress.add_task("train", total=plan_total, completed=done)
        yield lambda samples: progress.advance(bar, samples)


def warn(line: str) -> None:
    print(line, file=sys.stderr)
