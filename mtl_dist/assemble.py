"""Parts from a recipe: root module, plan, monitor; and a trained root module from a run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mtl_dist.balance.checks import check_balance
from mtl_dist.balance.methods import build_balancer
from mtl_dist.checkpoint import (
    DATA,
    RECIPE,
    Checkpoint,
    best_checkpoint,
    known_bests,
    newest_good,
    problems_of,
    read_checkpoint,
    step_directory,
    steps_in,
    task_bests_as_of,
)
from mtl_dist.config.errors import suggest
from mtl_dist.config.nearest import nearest
from mtl_dist.config.trust import parts_of
from mtl_dist.data.disjoint_tasks import disjoint_tasks
from mtl_dist.data.facts import DataFacts, identities, meaning_differences
from mtl_dist.data.loader import Data
from mtl_dist.engine.connect import EngineChoice, connect_without_engine
from mtl_dist.engine.world import World
from mtl_dist.errors import NotInstalledError, UserError
from mtl_dist.json_files import DamagedFile
from mtl_dist.models.adapters import merge_adapters
from mtl_dist.models.settings import ModelSettings
from mtl_dist.models.weights import is_adapter, without_base
from mtl_dist.models.whole import model_of
from mtl_dist.monitor import Monitor
from mtl_dist.plural import plural
from mtl_dist.recipe import Recipe, load_recipe, load_recipe_of
from mtl_dist.run_folder import RunFolder
from mtl_dist.step import RootModule, at_temperatures, decided_by
from mtl_dist.tasks.registry import build_tasks
from mtl_dist.tasks.task import Task
from mtl_dist.training.plan import Plan

WhichCheckpoint: TypeAlias = str | int
"""best, last, a step, or best/TASK: that of a task, where `monitor.per_task` keeps it."""


def facts_of(data: Data) -> DataFacts:
    return DataFacts(data.task_infos, data.channels, data.image_dtype, data.image_size, data.pixels)


def identified(data: Data) -> DataFacts:
    """The facts with by what the data is known again."""
    return replace(facts_of(data), sources=identities(data))


def build_root(recipe: Recipe, facts: DataFacts, world: World) -> RootModule:
    tasks = build_tasks(recipe.tasks, facts.task_infos)
    heads = [task.head for task in tasks.values()]
    measured = None if facts.pixels is None else (facts.pixels.mean, facts.pixels.std)
    is_picture = facts.image_dtype == "uint8" and facts.channels == 3
    model = model_of(
        recipe.model, heads, facts.channels, facts.image_size, measured=measured, is_picture=is_picture
    )
    model.use_memory_format(torch.channels_last if recipe.train.channels_last else torch.contiguous_format)
    joints = [settings.build(name, tasks) for name, settings in recipe.joint_losses.items()]
    factors = {name: settings.noise_factor for name, settings in recipe.tasks.items()}
    weights = {name: settings.weight for name, settings in recipe.tasks.items()}
    weights |= {joint.name: joint.weight for joint in joints}
    balancer = build_balancer(recipe.balance, list(weights), factors, weights)
    return RootModule(model, tasks, balancer, world, recipe.train.precision, joints)


def build_monitor(recipe: Recipe) -> Monitor:
    names = [f"val/{task}/{settings.compared[0]}" for task, settings in recipe.tasks.items()]
    task_modes = {name: recipe.mode_of(name) for name in names} if recipe.monitor.per_task else None
    return Monitor(recipe.monitor, recipe.monitor_mode, recipe.optim.schedule, task_modes)


def plan_of(recipe: Recipe, data: Data, accumulation: int) -> Plan:
    settings = recipe.train
    end = settings.epochs * data.num_train_samples
    if settings.max_steps is not None:
        end = min(end, settings.max_steps * settings.global_batch)
    return Plan(
        samples_per_epoch=data.num_train_samples,
        end_position=end,
        global_batch=settings.global_batch,
        accumulation=accumulation,
        seed=settings.seed,
        evaluate_every=settings.evaluate_every,
        checkpoint_every=settings.checkpoint_every,
        log_every=settings.log_every,
    )


def check_metrics(recipe: Recipe, root: RootModule, data: Data) -> None:
    """Refuse to follow a metric that the data's classes do not have, or to choose on a missing split.

    Raises:
        UserError: one line for each.
    """
    problems = []
    for name, task in root.tasks.items():
        if task.rule is not None and "val" not in data.splits:
            problems.append(
                f"tasks.{name}.threshold: expected a probability for data without a val split, found "
                f"{task.rule}. State one."
            )
        names = ("loss", *task.reported, *task.settings.metrics)
        for followed in recipe.monitor.names:
            metric = followed.partition(f"/{name}/")[2]
            if metric and metric not in names:
                problems.append(
                    f"monitor.metric: expected a metric of a task of {len(task.info.classes)} classes, found "
                    f"{followed}. {suggest(metric, names)}"
                )
    if problems:
        raise UserError("\n".join(problems))


def check_labels(data: Data, recipe: Recipe) -> None:
    """Refuse a recipe none of whose tasks has a training label."""
    if all(info.num_labelled == 0 for info in data.task_infos.values()):
        names = ", ".join(recipe.tasks)
        raise UserError(
            f"tasks: expected training labels for at least one of {names}, found none in data.train."
        )


def check_numbers(data: Data, root: RootModule) -> None:
    """Refuse labels of any split that a task could not learn or measure.

    Raises:
        UserError: one line for each task with such labels.
    """
    problems = []
    for name in (name for name, task in root.tasks.items() if task.wants_positive):
        for split, sources in data.sources.items():
            columns = [source.reader.label_columns() for source in sources]
            values = [own[name] for own in columns if own is not None and name in (own.dtype.names or ())]
            refused = np.concatenate([own[own <= 0] for own in values]) if values else np.empty(0)
            if len(refused):
                problems.append(
                    f"tasks.{name}.space: expected positive labels for log, found {refused.min():.6g} in "
                    f"{split} ({plural(len(refused), 'label')}). Correct these labels, or use linear."
                )
    if problems:
        raise UserError("\n".join(problems))


def check_balancing(recipe: Recipe, root: RootModule, data: Data, choice: EngineChoice) -> None:
    """Refuse a method of balancing that does not fit the engine, the model or the labels."""
    if root.balancer.level is not None and root.balancer.every > 1 and not root.model.heads_follow_features:
        raise UserError(
            "balance.every: expected 1 with model.network, whose gradients are weighted as they are found, "
            f"found {root.balancer.every}."
        )
    check_balance(
        root.balancer,
        recipe.balance.method,
        engine=choice,
        num_shared=len(root.shared),
        features={
            term: list(dict.fromkeys(name for task in tasks for name in root.model.feature_names(task)))
            for term, tasks in root.terms.items()
        },
        disjoint=disjoint_tasks(data) if root.balancer.level == "features" else [],
        meet_at_features=root.model.compared_at_features,
    )


def check_device(recipe: Recipe, device: torch.device, choice: EngineChoice) -> None:
    """Refuse what does not run on this device, or under this engine."""
    problems = []
    if recipe.model.norm == "sync" and device.type == "cpu":
        problems.append(
            "model.norm: expected batch, group or frozen on CPUs, found sync, which torch has for GPUs only. "
            "Use group."
        )
    if recipe.train.compile and choice.shards_parameters:
        problems.append(
            f"train.compile: expected false under {choice.name}, which gathers the weights of every layer as "
            f"it is reached, found true. Set it to false, or {choice.WHOLE_PARAMETERS}."
        )
    if recipe.joint_losses and choice.shards_parameters:
        problems.append(
            f"joint_losses: expected none under {choice.name}, where a head runs once in a step, and not for "
            f"a joint loss again, found {', '.join(recipe.joint_losses)}. Remove them, or "
            f"{choice.WHOLE_PARAMETERS}."
        )
    if choice.divides_updates and not recipe.optim.is_elementwise:
        problems.append(
            f"optim.kind: expected an optimizer that updates every element for itself under {choice.name}, "
            f"which divides parameters over the ranks, found {recipe.optim.kind}. Use DDP or another one."
        )
    if problems:
        raise UserError("\n".join(problems))


def inference_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights to use: the averaged ones where the run keeps an average."""
    return checkpoint.tensors["model"] | checkpoint.tensors.get("ema", {})


def best_or_newest(folder: RunFolder, say: Callable[[str], None]) -> Path:
    """The best checkpoint, or the newest good one where there is no whole best one (reported to `say`).

    Raises:
        UserError: the run has no good checkpoint.
    """
    if known_bests(folder.checkpoints):
        best = best_checkpoint(folder.checkpoints, say)
        if best is not None:
            return best
        say(f"{folder.checkpoints}: the newest good checkpoint is used in its place.")
    newest = newest_good(folder.checkpoints, say)
    if newest is None:
        raise UserError(
            f"{folder.directory}: expected a checkpoint, found no whole one. Train the run first."
        )
    return newest


def chosen_checkpoint(folder: RunFolder, which: WhichCheckpoint, say: Callable[[str], None]) -> Path:
    """The checkpoint of a step, the newest good one ("last"), the best, or a task's best ("best/TASK").

    Raises:
        UserError: there is none, or that of the step is damaged.
    """
    if which == "best":
        found = best_or_newest(folder, say)
        if not known_bests(folder.checkpoints):
            say(
                f"{folder.directory}: no evaluation has chosen the best weights yet; {found.name}, the "
                "newest, is used."
            )
        return found
    if which == "last":
        newest = newest_good(folder.checkpoints, say)
        if newest is not None:
            return newest
        raise UserError(
            f"{folder.directory}: expected a checkpoint, found no whole one. Train the run first."
        )
    steps = steps_in(folder.checkpoints)
    if isinstance(which, str) and which.startswith("best/") and steps:
        whole = (task_bests_as_of(step_directory(folder.checkpoints, step)) for step in sorted(steps)[::-1])
        bests = next((found for found in whole if found), {})
        if which.removeprefix("best/") not in bests:
            kept = ", ".join(bests) or "none, without monitor.per_task"
            near = nearest(which.removeprefix("best/"), bests)
            hint = f" Did you mean best/{near}?" if near else ""
            raise UserError(
                f"checkpoint: expected a task whose best is kept ({kept}), found {which!r}.{hint}"
            )
        which = bests[which.removeprefix("best/")].step
    if isinstance(which, bool) or not isinstance(which, int) or which not in steps:
        kept = ", ".join(str(step) for step in sorted(steps)) or "no step"
        raise UserError(
            f'checkpoint: expected "best", "last" or a step that {folder.checkpoints} keeps ({kept}), '
            f"found {which!r}."
        )
    path = step_directory(folder.checkpoints, which)
    problems = problems_of(path)
    if problems:
        raise UserError("\n".join(problems))
    return path


@dataclass(frozen=True)
class Trained:
    """What a run has learnt, as one whole checkpoint holds it: of the folder it needs the thresholds."""

    path: Path
    recipe: Recipe
    facts: DataFacts
    weights: dict[str, Tensor]
    thresholds: Mapping[str, Mapping[str, float]]
    """By which it decides, where they were chosen on val."""
    temperatures: Mapping[str, float] = field(default_factory=dict)
    """What logits are divided by, where that was asked."""

    def root(self, world: World) -> RootModule:
        """The root module with these weights, in evaluation mode.

        Raises:
            UserError: no model can be made of its recipe and data that these weights fit.
        """
        model = self.recipe.model.model_copy(update={"weights": None})
        try:
            root = build_root(self.recipe.model_copy(update={"model": model}), self.facts, world)
            root.load_state_dict(self.weights)
        except NotInstalledError:
            raise
        except (RuntimeError, ValueError, OverflowError, MemoryError) as error:
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise UserError(
                f"{self.path}: expected weights that fit its own recipe.yaml and data.json, found: {reason}. "
                "Use another copy of the run."
            ) from error
        root.decide_by(self.thresholds)
        root.tasks = at_temperatures(root.tasks, self.temperatures)
        return root.to(world.device).eval()

    def merged(self) -> Trained:
        """The same model with its adapters in the weights that they are beside; itself where it has none.

        Raises:
            UserError: no model can be made of it.
        """
        adapter = self.recipe.model.adapter
        if adapter is None:
            return self
        root = self.root(connect_without_engine(self.recipe.engine, "cpu"))
        merge_adapters(root.model)
        changes: dict[str, Any] = {"adapter": None}
        if adapter.per_task:
            changes["sharing"] = ModelSettings(sharing="separate").sharing  # type: ignore[arg-type]
        model = self.recipe.model.model_copy(update=changes)
        weights = {name: tensor.clone() for name, tensor in root.state_dict().items()}
        return replace(self, recipe=self.recipe.model_copy(update={"model": model}), weights=weights)


def tasks_of(
    recipe: Recipe, facts: DataFacts, thresholds: Mapping[str, Mapping[str, float]]
) -> dict[str, Task]:
    """The tasks of a trained model alone, deciding by the thresholds that its run has chosen."""
    return decided_by(build_tasks(recipe.tasks, facts.task_infos), thresholds)


def read_trained(
    folder: RunFolder,
    say: Callable[[str], None],
    which: WhichCheckpoint = "best",
    temperature: bool = False,
) -> Trained:
    """The best weights of a run, or others, and what they were trained for; with `temperature` also the
    temperatures that were fitted for the best ones.

    Raises:
        UserError: the run has no such checkpoint that is whole, or no temperatures for it.
    """
    if temperature and which != "best":
        raise UserError(
            f"--temperature: expected the best weights, for which temperatures are kept, found {which}. "
            "Leave one of the two out."
        )
    load_recipe_of(folder.directory)  # a stranger's is refused before anything else of it is read
    path = chosen_checkpoint(folder, which, say)
    checkpoint = read_checkpoint(path)
    with parts_of(folder.directory, folder.recipe_path.name):
        recipe = load_recipe(path / RECIPE)
    try:
        facts = DataFacts.parse(checkpoint.data)
    except DamagedFile as error:
        raise UserError(f"{path / DATA}: expected what the run's data is, found: {error}.") from None
    return Trained(
        path,
        recipe,
        folder.checked(facts),
        inference_weights(checkpoint),
        folder.read_thresholds(),
        folder.read_temperatures(path.name) if temperature else {},
    )


def begin_with(root: RootModule, run: Path, say: Callable[[str], None]) -> None:
    """Give `root` the best weights of a run, as far as they fit; what begins untrained is said, and whose
    labels mean something else now.

    Images are normalised as the recipe and its data want it.

    Raises:
        UserError: not a run with a checkpoint, or nothing of it fits.
    """
    trained = read_trained(RunFolder.open(run), say)
    state = root.model.state_dict()
    found = _of_model(trained)
    own = [name for name in state if is_adapter(name)]
    if not own or not all(name in found and found[name].shape == state[name].shape for name in own):
        found = _of_model(trained.merged())
    fitting = {
        name: found[known]
        for name, tensor in state.items()
        for known in [name if name in found else without_base(name)]
        if known in found and found[known].shape == tensor.shape and name not in ("mean", "std")
    }
    if not any(name in fitting for name, _ in root.model.named_parameters()):
        raise UserError(
            f"start_from: expected a run whose weights fit this model, found none in {trained.path} that do. "
            "Choose its model, or another run."
        )
    root.model.load_state_dict(fitting, strict=False)
    parameters = [name for name, _ in root.model.named_parameters() if not is_adapter(name)]
    missing = [name for name in parameters if name not in fitting]
    untrained = dict.fromkeys(".".join(name.split(".")[:2]) for name in missing)
    rest = f"; untrained: {', '.join(untrained)}" if untrained else ""
    say(f"begins with the weights of {trained.path}{rest}")
    task_infos = {name: task.info for name, task in root.tasks.items() if f"heads.{name}" not in untrained}
    for difference in meaning_differences(trained.facts.task_infos, task_infos):
        say(f"{difference} Its head begins with the old weights, class by class in their order.")


def _of_model(trained: Trained) -> dict[str, Tensor]:
    prefix = "model."
    return {name.removeprefix(prefix): t for name, t in trained.weights.items() if name.startswith(prefix)}
