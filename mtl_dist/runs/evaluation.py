"""Evaluating a run's weights: on a split, at the end of training, or once more later."""

from __future__ import annotations

from pathlib import Path

from mtl_dist.assemble import best_or_newest, inference_weights, load_root
from mtl_dist.checkpoint import read_checkpoint
from mtl_dist.data.loader import Data, eval_loader, open_data
from mtl_dist.data.partition import micro_batch_size
from mtl_dist.engine.connect import connect_without_engine
from mtl_dist.engine.world import World
from mtl_dist.errors import UserError
from mtl_dist.evaluator import Evaluation, evaluate
from mtl_dist.heartbeat import during
from mtl_dist.importers.external import with_indexes
from mtl_dist.recipe import load_recipe_of
from mtl_dist.results import print_results, write_evaluation
from mtl_dist.run_folder import RunFolder
from mtl_dist.runs.announcements import warn
from mtl_dist.step import RootModule
from mtl_dist.stopping import StopAsked, StopSignal, until_stopped
from mtl_dist.training.trainer import Trainer


def evaluate_run(run: Path, split: str | None = None) -> str:
    """Evaluate the best weights of a run on one split; metrics go to its evaluation/ folder.

    Without a `split` it is test or, where the data has none, val; that is said. Returns the split.

    Raises:
        UserError: not a run folder, no good checkpoint, or no such split.
    """
    folder = RunFolder.open(run)
    recipe = load_recipe_of(folder.directory)
    world = connect_without_engine(recipe.engine)
    data = open_data(with_indexes(recipe.data), recipe.tasks)
    if split is None:
        split = next((one for one in ("test", "val") if one in data.splits), None)
        if split is None:
            raise UserError("--split: the data has neither a test nor a val split. State --split train.")
        if world.is_main:
            why = "" if split == "test" else ": the data has no test split"
            warn(f"split    {split}{why}")
    if split not in data.splits:
        raise UserError(f"--split: expected one of {', '.join(data.splits)}, found {split!r}.")
    root = load_root(folder, recipe, world, warn)
    accumulation = recipe.train.accumulation_on(world.size)
    batch_size = micro_batch_size(recipe.train.global_batch, world.size, accumulation)
    choosing = split == "val" and not folder.read_thresholds()
    if not choosing:
        for name, task in root.tasks.items():
            if task.rule is not None and not task.chosen and world.is_main:
                warn(
                    f"tasks.{name}.threshold: {task.rule} was not chosen yet, 0.5 is used. "
                    f"mtl evaluate {run} --split val chooses it."
                )
    evaluation = evaluate_split(root, data, split, batch_size, world, choosing=choosing)
    if world.is_main:
        if evaluation.thresholds:
            folder.write_thresholds(evaluation.thresholds)
        write_evaluation(folder, split, evaluation, data.task_infos)
        print_results({split: evaluation})
    return split


def evaluate_split(
    root: RootModule,
    data: Data,
    split: str,
    batch_size: int,
    world: World,
    stop: StopSignal | None = None,
    choosing: bool = False,
) -> Evaluation:
    """Collective: the metrics of one split, by thresholds that are chosen from it where `choosing`.

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
    until_then = loader if stop is None else until_stopped(loader, stop, world)
    with during(f"evaluation of {split}"):
        return evaluate(root, until_then, world, choosing)


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
                    evaluations[split] = evaluate_split(
                        root, data, split, batch_size, world, trainer.stop, choosing=split == "val"
                    )
                    root.decide_by(evaluations[split].thresholds)
    except StopAsked as asked:
        return asked.reason
    if world.is_main and evaluations:
        for split, evaluation in evaluations.items():
            write_evaluation(folder, split, evaluation, data.task_infos)
            if evaluation.thresholds:
                folder.write_thresholds(evaluation.thresholds)
            tracker.results(evaluation.flat(f"best/{split}"), trainer.progress.step)
        tracker.say(f"Results of {path.name}:")
        print_results(evaluations, tracker.console)
    return ""
