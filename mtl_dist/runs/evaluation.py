"""Evaluating a run's weights: on a split, at the end of training, or once more later."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from mtl_dist.assemble import Trained, WhichCheckpoint, best_or_newest, inference_weights, read_trained
from mtl_dist.checkpoint import known_bests, read_checkpoint, step_of
from mtl_dist.config.errors import suggest
from mtl_dist.data.facts import DataFacts, identities, meaning_differences, source_differences
from mtl_dist.data.loader import Data, eval_loader, open_data
from mtl_dist.data.partition import micro_batch_size
from mtl_dist.data.remote import Location
from mtl_dist.data.settings import DataSettings, ProportionalMixing, SourceSettings, UniformSampling
from mtl_dist.data.task_infos import source_facts
from mtl_dist.engine.connect import connect_without_engine
from mtl_dist.engine.world import World
from mtl_dist.errors import UserError
from mtl_dist.evaluator import Evaluation, evaluate
from mtl_dist.heartbeat import beat, during, getting_on
from mtl_dist.importers.external import with_indexes
from mtl_dist.plural import readable
from mtl_dist.prediction.evaluated import announce, write_predictions
from mtl_dist.recipe import load_recipe_of
from mtl_dist.results import headlines, print_calibration, print_per_class, print_results, write_evaluation
from mtl_dist.run_folder import RunFolder, writing_to
from mtl_dist.runs.announcements import warn
from mtl_dist.runs.checking import checking_shards
from mtl_dist.sample_rows import SampleRows, Table
from mtl_dist.step import RootModule
from mtl_dist.stopping import StopAsked, StopSignal, until_stopped
from mtl_dist.tracking.files import read_rows
from mtl_dist.training.trainer import Trainer

MOST_PREDICTIONS = 200_000
"""Samples of a split of which the end of a run still writes a row each."""


def evaluate_run(
    run: Path,
    split: str | None = None,
    dataset: Location | None = None,
    predictions: bool = False,
    checkpoint: WhichCheckpoint = "best",
    per_class: bool = False,
    temperature: bool = False,
) -> str:
    """Evaluate the best weights of a run, or others, on one split; metrics go to its evaluation/ folder, with
    `predictions` a table with a row for each sample as well. With `per_class` the metrics of each class are
    printed too. With `temperature` the temperature of each task with probabilities is fitted on the run's val
    split; what it does to the split that is measured is printed, and the temperatures of the best weights are
    kept.

    Without a `split` it is test or, where the data has none, val; that is said. The classes and statistics
    are those of the run. With `dataset` the split is one of that dataset, which may be another one, or the
    run's own in another place. Returns the metrics' name: the split, or `NAME-SPLIT` of another dataset; that
    of another `checkpoint` than the best (as `load` takes it) comes after it, as in `val-best-digit`.

    Raises:
        UserError: not a run folder, no good checkpoint, no such split, or its labels mean something else than
            in training; without `dataset` also, if the split holds other samples than it did.
    """
    folder = RunFolder.open(run)
    trained = read_trained(folder, warn, checkpoint)
    recipe = load_recipe_of(folder.directory)
    world = connect_without_engine(recipe.engine)
    named = split
    data, split = _opened(recipe.data, trained.facts, split, dataset)
    label = world.on_main(lambda: _label_of(folder, trained.facts, data, split, dataset is not None))
    if checkpoint != "best":
        label += f"-step-{checkpoint}" if isinstance(checkpoint, int) else f"-{checkpoint.replace('/', '-')}"
        if world.is_main:
            warn(f"weights  {trained.path}")
    if named is None and world.is_main:
        warn(f"split    {split}" + ("" if split == "test" else ": the data has no test split"))
    root = trained.root(world)
    accumulation = recipe.train.accumulation_on(world.size)
    batch_size = micro_batch_size(recipe.train.global_batch, world.size, accumulation)
    choosing = label == "val" and not folder.read_thresholds()
    if not choosing and world.is_main:
        _warn_of_thresholds(run, root)
    fitted = _temperatures(folder, trained, root, batch_size, world, label) if temperature else None
    with checking_shards(data, [split], world, warn) as check:
        evaluation, table = evaluate_samples(
            root,
            data,
            split,
            batch_size,
            world,
            choosing=choosing,
            predictions=predictions,
            temperatures=fitted,
        )
        check.finish()
    world.barrier()
    if world.is_main:
        print_results({label: evaluation})
        if per_class:
            print_per_class(evaluation)
        if fitted is not None:
            print_calibration(label, evaluation)
        with writing_to(run):
            if evaluation.thresholds:
                folder.write_thresholds(evaluation.thresholds)
            if fitted is not None:
                _keep_temperatures(folder, label, evaluation, trained.path if checkpoint == "best" else None)
            write_evaluation(folder, label, evaluation, trained.facts.task_infos, warn)
            if table is not None:
                announce(write_predictions(folder, label, table), len(table), print)
    return label


def _warn_of_thresholds(run: Path, root: RootModule) -> None:
    for name, task in root.tasks.items():
        if task.rule is not None and not task.chosen:
            warn(
                f"tasks.{name}.threshold: {task.rule} was not chosen yet, 0.5 is used. "
                f"mtl evaluate {run} --split val chooses it."
            )


def _keep_temperatures(folder: RunFolder, label: str, evaluation: Evaluation, best: Path | None) -> None:
    """Write what the temperatures do to a split, and which those of the `best` weights are, if it is they."""
    found = {task: asdict(one) for task, one in evaluation.calibrated.items()}
    folder.write_calibration(label, found)
    known = {task: row["temperature"] for task, row in found.items() if not math.isnan(row["temperature"])}
    if best is not None and known:
        folder.write_temperatures(best.name, known)


def _temperatures(
    folder: RunFolder, trained: Trained, root: RootModule, batch_size: int, world: World, label: str
) -> dict[str, float | None]:
    """Collective: of each task with probabilities the temperature that fits the run's val split; None where
    that split is to be measured itself, so that it is fitted there.

    Raises:
        UserError: no task has probabilities, there is no val split, or it is another than in training.
    """
    wanted: dict[str, float | None] = {
        name: None for name, task in root.tasks.items() if task.has_temperature
    }
    if not wanted:
        raise UserError("--temperature: expected a task of classes or labels, found none in the run.")
    if label == "val":
        if world.is_main:
            warn("temperatures are fitted on val, which is measured: what they gain looks too good")
        return wanted
    try:
        data, _ = _opened(load_recipe_of(folder.directory).data, trained.facts, "val", None)
    except UserError as error:
        raise UserError(
            f"--temperature: expected the run's val split, on which temperatures are fitted, found: {error}"
        ) from None
    if world.on_main(lambda: _label_of(folder, trained.facts, data, "val", False)) != "val":
        raise AssertionError("val of the run is called val")
    if world.is_main:
        warn("temperatures are fitted on val")
    fitted = evaluate_split(root, data, "val", batch_size, world, temperatures=wanted).calibrated
    known: dict[str, float | None] = {}
    for name in wanted:
        value = fitted[name].temperature if name in fitted else math.nan
        if not math.isnan(value):
            known[name] = value
        elif world.is_main:
            warn(f"{name} has no label in val: no temperature is fitted")
    return known


def _opened(
    settings: DataSettings, facts: DataFacts, split: str | None, dataset: Location | None
) -> tuple[Data, str]:
    """The run's data, or the split of `dataset` alone, with the tasks and images as the run knows them; and
    the split: where none is named test, or val where the run's data has no test.

    Raises:
        UserError: no such split, or labels or images that the run has not learnt.
    """
    tasks = list(facts.task_infos)
    if dataset is not None:
        split = split or "test"
        known = source_facts(dataset, split, settings.derive, settings.facts).tasks
        having = [task for task in tasks if task in known]
        if not having:
            raise UserError(
                f"{dataset}: expected labels of a task of the run ({', '.join(tasks)}), found none "
                f"({', '.join(known)})."
            )
        settings, tasks = _of_one_dataset(settings, dataset, split, having), having
    data = open_data(with_indexes(settings), tasks)
    if dataset is not None and split is not None:
        data = replace(data, sources={split: data.sources["train"]})
    if split is None:
        split = next((one for one in ("test", "val") if one in data.splits), None)
        if split is None:
            raise UserError("--split: the data has neither a test nor a val split. State --split train.")
    if split not in data.splits:
        raise UserError(
            f"--split: expected a split of the data, found {split!r}. {suggest(split, data.splits, 'It has')}"
        )
    problems = meaning_differences(facts.task_infos, data.task_infos)
    if data.image_dtype != facts.image_dtype or data.channels not in (1, facts.channels):
        problems.append(
            f"images: expected {facts.channels} channels of {facts.image_dtype}, found {data.channels} of "
            f"{data.image_dtype}."
        )
    if problems:
        raise UserError("\n".join([*problems, "The run has learnt others: prepare the data to match it."]))
    return replace(data, task_infos=facts.task_infos, channels=facts.channels), split


def _of_one_dataset(
    settings: DataSettings, dataset: Location, split: str, tasks: Collection[str]
) -> DataSettings:
    """The same images and labels, of the split of one dataset alone."""
    return settings.model_copy(
        update={
            "train": (SourceSettings(path=dataset, split=split),),
            "val": (),
            "test": (),
            "mixing": ProportionalMixing(),
            "sampling": UniformSampling(),
            "blend": None,
            "boxes": {name: box for name, box in settings.boxes.items() if set(box) <= set(tasks)},
        }
    )


def _label_of(folder: RunFolder, facts: DataFacts, data: Data, split: str, named: bool) -> str:
    """The name of what is evaluated in the run's metrics: of the run's own split its name alone.

    Raises:
        UserError: the data was not named, and is another than it was in training.
    """
    before = (folder.read_data() or facts).sources
    now = {split: identities(data)[split]}
    differences = list(source_differences(before, now, split))
    if not differences:
        return split
    if named:
        return f"{data.sources[split][0].facts.path.name}-{split}"
    raise UserError(
        "\n".join(differences)
        + f"\n{folder.directory}: expected the {split} split as it was in training, found another. Bring it "
        f"back, or name the dataset to measure on this one: mtl evaluate {folder.directory} --split {split} "
        "--data DATASET."
    )


def evaluate_split(
    root: RootModule,
    data: Data,
    split: str,
    batch_size: int,
    world: World,
    stop: StopSignal | None = None,
    choosing: bool = False,
    rows: SampleRows | None = None,
    with_baselines: bool = False,
    temperatures: Mapping[str, float | None] | None = None,
) -> Evaluation:
    """Collective: the metrics of one split, by thresholds that are chosen from it where `choosing`.

    `rows`, `with_baselines` and `temperatures` are `evaluate`'s own.

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
        return evaluate(root, until_then, world, choosing, rows, with_baselines, temperatures)


def evaluate_samples(
    root: RootModule,
    data: Data,
    split: str,
    batch_size: int,
    world: World,
    stop: StopSignal | None = None,
    choosing: bool = False,
    predictions: bool = True,
    temperatures: Mapping[str, float | None] | None = None,
) -> tuple[Evaluation, Table | None]:
    """Collective: the metrics of one split and of constant answers, and on rank 0 with `predictions` a row
    for each sample. From then on the root module decides by the thresholds that were chosen.

    Raises:
        StopAsked: a rank was asked to stop before the end.
    """
    datasets = [(source.facts.path.name, source.reader.num_samples) for source in data.sources[split]]
    rows = SampleRows(root.tasks, world, datasets) if predictions else None
    evaluation = evaluate_split(
        root, data, split, batch_size, world, stop, choosing, rows, True, temperatures
    )
    root.decide_by(evaluation.thresholds)
    if rows is not None and evaluation.thresholds:  # the rows are to say what is decided by these
        rows = SampleRows(root.tasks, world, datasets)
        evaluate_split(root, data, split, batch_size, world, stop, rows=rows)
    beat("the rows of the predictions", slow=True)
    return evaluation, None if rows is None else rows.table()


def evaluate_at_end(
    trainer: Trainer, data: Data, folder: RunFolder, predictions: bool = True
) -> tuple[str, dict[str, float]]:
    """Evaluate the best weights on every split but the training one; write and print the metrics, with
    `predictions` also a row for each sample.

    Returns the reason to stop, if any rank was asked to before all was evaluated: then nothing is written,
    and the next start of the run evaluates. Beside it the metrics, as `best/val/loss`.
    """
    engine, root, tracker, world = trainer.engine, trainer.root, trainer.tracker, trainer.world
    batch_size = trainer.plan.micro_batch_on(world.size)
    path = world.on_main(lambda: best_or_newest(folder, tracker.say))
    engine.load_full_state(inference_weights(read_checkpoint(path)), {})
    evaluations: dict[str, Evaluation] = {}
    tables: dict[str, Table] = {}
    try:
        with engine.evaluating():
            for split in ("val", "test"):
                if split in data.splits:
                    num_samples = data.num_samples(split)
                    evaluations[split], table = evaluate_samples(
                        root,
                        data,
                        split,
                        batch_size,
                        world,
                        trainer.stop,
                        choosing=split == "val",
                        predictions=predictions and num_samples <= MOST_PREDICTIONS,
                    )
                    if table is not None:
                        tables[split] = table
                    elif predictions and num_samples > MOST_PREDICTIONS:
                        tracker.say(
                            f"{split} has {num_samples:,} samples: no row is written for each. "
                            f"mtl evaluate RUN --split {split} --predictions does it."
                        )
    except StopAsked as asked:
        return asked.reason, {}
    metrics: dict[str, float] = {}
    for split, evaluation in evaluations.items():
        metrics |= evaluation.flat(f"best/{split}")
    beat("writing the results", slow=True)
    if world.is_main and evaluations:
        for split, evaluation in evaluations.items():
            write_evaluation(folder, split, evaluation, data.task_infos, tracker.say)
            getting_on()
            if split in tables:
                write_predictions(folder, split, tables[split])
            if evaluation.thresholds:
                folder.write_thresholds(evaluation.thresholds)
            tracker.results(evaluation.flat(f"best/{split}"), trainer.progress.step)
        tracker.say(f"Results of {_which(folder, step_of(path), trainer.progress.step)}:")
        print_results(evaluations, tracker.console)
        last = list(evaluations)[-1]
        tracker.say(f"On {last}, against constant answers (intervals: bootstrap over the samples):")
        with suppress(OSError):  # the terminal was closed
            tracker.console.print(headlines(evaluations[last], root.tasks, tables.get(last)))
    return "", metrics


def _which(folder: RunFolder, step: int, last: int) -> str:
    """Of which step weights are, and why of this one, in the words of a run's page."""
    best = next((best for best in known_bests(folder.checkpoints) if best.step == step), None)
    if best is None:
        return f"step {step:,}" + (", the last" if step == last else "")
    values = {row["step"]: row[best.metric] for row in read_rows(folder.directory) if best.metric in row}
    reached = values.get(last)
    at_last = "none" if reached is None else readable(reached)
    others = "" if step == last else f"; the last, {last:,}: {at_last}"
    return f"step {step:,}, the best by {best.metric} ({readable(best.value)}{others})"
