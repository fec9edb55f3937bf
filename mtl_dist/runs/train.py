"""Training: the parts of a recipe built in the order in which data meets them, then trained to the end."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from mtl_dist.assemble import (
    begin_with,
    build_monitor,
    build_root,
    check_balancing,
    check_device,
    check_labels,
    check_metrics,
    check_numbers,
    facts_of,
    identified,
    plan_of,
)
from mtl_dist.balancing import Balancing
from mtl_dist.caveats import check_monitor, check_norms
from mtl_dist.checkpoint import CheckpointWriter, read_checkpoint, steps_in
from mtl_dist.config.loading import to_yaml
from mtl_dist.data.loader import Data, open_data, train_loader
from mtl_dist.data.partition import micro_batch_size
from mtl_dist.ema import Ema
from mtl_dist.engine.connect import Connection, connect
from mtl_dist.engine.engine import Engine
from mtl_dist.errors import UserError
from mtl_dist.evaluator import Evaluation
from mtl_dist.figures.run_figures import RunFigures
from mtl_dist.hangs.watch import HangWatch
from mtl_dist.heartbeat import beat
from mtl_dist.importers.external import with_indexes
from mtl_dist.models.compiling import compile_parts
from mtl_dist.models.describe import parameters_in_words
from mtl_dist.optim import build_optimizer
from mtl_dist.recipe import Recipe, with_launcher
from mtl_dist.run_folder import RunFolder, new_run_directory, writing_to
from mtl_dist.runs.announcements import farewell, introduce, warn
from mtl_dist.runs.checking import checking_shards
from mtl_dist.runs.evaluation import evaluate_at_end, evaluate_split
from mtl_dist.runs.opening import Opened, training_folder
from mtl_dist.runs.progress import showing
from mtl_dist.status import write_last_status
from mtl_dist.step import RootModule
from mtl_dist.stopping import StopSignal, agreed_stop
from mtl_dist.tasks.trying import try_parts
from mtl_dist.tracking.registry import check_tracking, open_tracker
from mtl_dist.tracking.tracker import Tracker
from mtl_dist.training.callbacks import Callbacks
from mtl_dist.training.plan import Outcome
from mtl_dist.training.running_metrics import RunningMetrics
from mtl_dist.training.trainer import Trainer


def train(
    recipe: Recipe,
    run_dir: Path | None = None,
    stop: StopSignal | None = None,
    tags: Sequence[str] = (),
    data_moved: bool = False,
) -> Outcome:
    """Train `recipe` in `run_dir`, from its newest good checkpoint if the folder has one.

    Called by every rank of the group that the launcher started. `stop` knows a deadline besides the signals;
    `tags` are added to the run's. With `data_moved` the run's data may lie in another place than before.

    Raises:
        UserError: the recipe does not fit its data, the number of ranks, or the run that the folder holds.
    """
    recipe, notes = with_launcher(recipe, os.environ)
    connection = connect(recipe.engine, recipe.train.precision)
    stop = stop or StopSignal()
    timeout_s = None if recipe.train.hang_timeout is None else 60 * recipe.train.hang_timeout
    with HangWatch(connection.world, timeout_s, stop, compiling=recipe.train.compile) as watch:
        return train_connected(
            recipe.with_absolute_paths(), run_dir, stop, tags, data_moved, connection, watch, notes
        )


def train_connected(
    recipe: Recipe,
    run_dir: Path | None,
    stop: StopSignal,
    tags: Sequence[str],
    data_moved: bool,
    connection: Connection,
    watch: HangWatch,
    notes: Sequence[str],
) -> Outcome:
    """`train`, by ranks that have joined and are watched; `notes` go into the log."""
    world = connection.world
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
    check_metrics(recipe, root, data)
    check_numbers(data, root)
    check_monitor(recipe, data)
    try_parts(root.tasks, root.joints)
    few = check_norms(
        root, data, micro_batch_size(recipe.train.global_batch, world.size, accumulation), world
    )
    if recipe.start_from is not None and world.on_main(lambda: run_dir is None or not is_begun(run_dir)):
        begin_with(root, recipe.start_from, warn if world.is_main else lambda line: None)
    shapes = {name: tuple(tensor.shape) for name, tensor in root.state_dict().items()}
    parameters = parameters_in_words(root)
    if recipe.train.compile:
        compile_parts(root.model, world.device, recomputing=recipe.model.checkpointing != "off")

    # ---- engine
    optimizer = build_optimizer(recipe.optim, root.model, list(root.tasks), list(root.balancer.parameters()))
    engine = connection.build(root, optimizer, root.parts)
    balancing = Balancing(root, engine, recipe.train.seed, recipe.balance.diagnose_every)

    # ---- run folder, trainer
    directory = world.broadcast(run_dir or new_run_directory(recipe.name or "run"))
    with training_folder(directory, recipe, lambda: identified(data), shapes, world, data_moved) as opened:
        watch.directory = directory
        with writing_to(directory):
            if world.is_main:
                opened.folder.change_tags(tags)
            trainer = build_trainer(recipe, data, engine, root, balancing, opened, accumulation, stop)
        introduce(trainer, recipe, data, opened.folder, connection.describe(), parameters)
        for note in notes:
            trainer.tracker.say(note)
        if few:
            trainer.tracker.say(f"warning  {few}")
        for line in opened.changes:
            trainer.tracker.say(f"changed  {line}")
        return replace(run_to_the_end(trainer, recipe, data, opened.folder, watch), directory=directory)


def is_begun(directory: Path) -> bool:
    """Whether the run in `directory` has saved a checkpoint."""
    return bool(steps_in(RunFolder(directory).checkpoints))


def build_trainer(
    recipe: Recipe,
    data: Data,
    engine: Engine,
    root: RootModule,
    balancing: Balancing,
    opened: Opened,
    accumulation: int,
    stop: StopSignal,
) -> Trainer:
    """The trainer, in the state of the folder's newest good checkpoint, or at the beginning."""
    world, folder = engine.world, opened.folder
    resumed = read_checkpoint(opened.saved) if opened.saved is not None else None
    plan = plan_of(recipe, data, accumulation)

    metrics = RunningMetrics(root.tasks, world) if recipe.train.metrics else None
    if metrics is not None:
        metrics.check_followed(recipe.monitor.names, recipe.data)

    first = [True]

    def evaluate_val() -> Evaluation:
        batch_size = plan.micro_batch_on(world.size)
        with_baselines, first[0] = first[0], False  # constant answers are measured once
        return evaluate_split(
            root, data, "val", batch_size, world, stop, choosing=True, with_baselines=with_baselines
        )

    tracker = (
        open_tracker(
            folder.directory,
            resumed_step=resumed.step if resumed else 0,
            record=resumed.record if resumed else None,
            tracking=recipe.tracking,
            name=recipe.name or "run",
            recipe=recipe.model_dump(mode="json"),
            ended=resumed is not None and folder.has_ended_at(resumed.step),
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
        figures=RunFigures(tracker.directory, recipe.monitor.name, tracker.say),
        stop=stop,
        recipe_text=to_yaml(recipe),
        data_text=opened.facts.to_json(),
        max_bad_steps=recipe.train.max_bad_steps,
        metrics=metrics,
        callbacks=Callbacks(recipe.callbacks, world, folder.directory, tracker.say),
    )
    if resumed is not None:
        trainer.load(resumed, opened.restarts_best)
    return trainer


def run_to_the_end(
    trainer: Trainer, recipe: Recipe, data: Data, folder: RunFolder, watch: HangWatch
) -> Outcome:
    """Train, evaluate the best weights, and leave the folder complete, however it ends."""
    world, plan, tracker = trainer.world, trainer.plan, trainer.tracker
    batches = train_loader(
        data,
        seed=plan.seed,
        global_batch=plan.global_batch,
        accumulation=plan.accumulation,
        rank=world.rank,
        world_size=world.size,
        start_position=trainer.progress.position,
        end_position=plan.end_position,
        workers=recipe.data.workers,
        pin_memory=world.device.type == "cuda",
    )
    metrics: dict[str, float] = {}
    trainer.stop.install()
    say = tracker.say if world.is_main else warn
    try:
        with writing_to(folder.directory), checking_shards(data, data.splits, world, say) as check:
            with showing(tracker, plan, lambda: peak_memory(world.device)):
                trainer.call("start", {})
                outcome = trainer.run(check.watched(batches))
            beat("the end", slow=True)
            trainer.saving.finish()
            if outcome.state == "done":
                check.finish()
            world.barrier()
            if outcome.state == "done" and recipe.train.evaluate_at_end:
                reason = agreed_stop(trainer.stop, world)
                if not reason:
                    reason, metrics = evaluate_at_end(trainer, data, folder, recipe.train.predictions)
                if reason:
                    outcome = Outcome("stopped", outcome.step, reason)
            beat("drawing the curves", slow=True)
            trainer.figures.draw_curves()
            beat("drawing the conflicts", slow=True)
            trainer.figures.draw_conflicts()
            if outcome.state == "done":
                trainer.call("end", metrics)
    except BaseException as error:
        cause = watch.first_cause(error)
        with suppress(Exception):  # the last good state, which a thread may still be writing
            trainer.saving.finish()
        if world.is_main or cause.rank == 0:  # who may not be there any more
            failed = replace(trainer.status("failed", cause.reason), retry=not cause.mistake)
            with suppress(OSError):  # the disk is what failed
                write_last_status(folder.directory, failed)
        if trainer.stop.aborting and isinstance(error, RuntimeError):
            raise KeyboardInterrupt from error  # a collective that broke because the others ended at once
        if cause.mistake and cause.rank != world.rank and isinstance(error, RuntimeError):
            # A collective that broke because of it: no traceback of that, and the line is printed once.
            raise UserError(cause.reason.partition(": ")[2]) from error
        raise
    finally:
        trainer.stop.restore()
    tracker.status(trainer.status(outcome.state, outcome.reason))
    peaks = world.gather(peak_memory(world.device))
    if world.is_main:
        try:
            folder.write_peak_memory(max(peaks))
        except OSError as error:
            tracker.say(f"warning  environment.json cannot be written, the run is done without it: {error}")
        if outcome.state == "done":
            tracker.pictures(folder.pictures(), outcome.step)
    farewell(tracker, outcome, folder)
    tracker.close()
    return outcome


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held at once: on the GPU, or of the host's memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
