"""The recipe: everything that decides what a run computes, checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from mtl_dist.balance.fixed import Fixed
from mtl_dist.balance.methods import BalanceSettings
from mtl_dist.config.errors import Location, Mistake, suggest
from mtl_dist.config.loading import load_settings, resolved_settings
from mtl_dist.config.settings import Settings
from mtl_dist.config.trust import parts_of, parts_of_recipe
from mtl_dist.data.settings import DataSettings
from mtl_dist.engine.deepspeed_keys import said as deepspeed_said
from mtl_dist.engine.launcher import Launcher
from mtl_dist.engine.settings import EngineSettings, Precision
from mtl_dist.errors import UserError
from mtl_dist.models.settings import ModelSettings
from mtl_dist.monitor import MonitorSettings
from mtl_dist.optim import OptimSettings
from mtl_dist.recipe_tasks import with_tasks_of_the_data
from mtl_dist.shipped import shipped_files
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.joint import JointName, UserJointLoss
from mtl_dist.tasks.metrics import MEAN_ACCURACY, PER_CLASS
from mtl_dist.tasks.registry import TaskSettings
from mtl_dist.tasks.task import Mode
from mtl_dist.tracking.registry import DEFAULT as DEFAULT_TRACKING
from mtl_dist.tracking.registry import TrackingSettings
from mtl_dist.training.callbacks import CallbacksSettings

Count = Annotated[int, Field(ge=1)]

_LONGEST_NAME = 255
"""Bytes of a folder's name, on every file system in use."""


class TrainSettings(Settings):
    """How far and in which steps a run trains."""

    epochs: Count = 10
    """How often every training sample is seen."""
    max_steps: Count | None = None
    """Stop after so many optimizer steps, even within an epoch."""
    global_batch: Count = 64
    """Samples per optimizer step over all ranks; the number of ranks only changes how it is divided."""
    accumulation: Count | None = None
    """Micro-batches per step and rank; null: as few as `micro_batch` allows."""
    micro_batch: Count | None = None
    """The most samples one rank takes at a time; null: global_batch / (ranks x accumulation)."""
    precision: Precision = "fp32"
    """What the model computes in; weights, losses and optimizer are kept in float32. fp16 scales the loss."""
    channels_last: bool = True
    """Whether maps lie in memory with their channels together (NHWC): what tensor cores and most CPU kernels
    want. docs/benchmarks.md has what it brings."""
    compile: bool = False
    """Whether backbones and heads are compiled by `torch.compile`, which takes minutes at the first step. Not
    where the engine divides the weights over the ranks."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the order, the augmentations, the first weights and dropout."""
    evaluate_every: Count = 1
    """Epochs between evaluations on the validation split."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints, besides the one after every epoch."""
    keep_last: Count = 2
    """Checkpoints kept besides the best one."""
    log_every: Count = 10
    """Steps between rows of metrics.jsonl."""
    max_bad_steps: Annotated[int, Field(ge=0)] = 10
    """A step with a loss or gradient that is not finite is skipped, and its samples are named in
    skipped_steps.jsonl; more than so many of 100 steps in a row end the run. 0: the first one does."""
    metrics: bool = True
    """Whether every metric of a task is computed for the training steps as well, from their own outputs."""
    hang_timeout: Annotated[float, Field(gt=0)] | None = 5.0
    """Minutes without progress after which the run ends and says where it hung; the start, a save, and
    everything under `compile` may take six times as long. null: never."""
    evaluate_at_end: bool = True
    """Whether the best weights are evaluated on `val` and `test` when training is done."""
    predictions: bool = True
    """Whether that evaluation writes a row for each sample, evaluation/SPLIT_predictions.csv, of splits up to
    200,000 samples."""

    @model_validator(mode="after")
    def _one_way_to_divide(self) -> TrainSettings:
        if self.accumulation is not None and self.micro_batch is not None:
            raise ValueError("expected accumulation or micro_batch, found both. Remove one of them.")
        return self

    def accumulation_on(self, num_ranks: int) -> int:
        """Micro-batches per step on each of `num_ranks` ranks.

        Raises:
            UserError: the global batch does not divide into equal micro-batches.
        """
        if self.global_batch % num_ranks:
            fitting = [n for n in range(1, self.global_batch + 1) if self.global_batch % n == 0]
            raise UserError(
                f"train.global_batch: expected a multiple of the {num_ranks} processes, "
                f"found {self.global_batch}. Start {_nearest(num_ranks, fitting)} processes, "
                "or change the global batch."
            )
        per_rank = self.global_batch // num_ranks
        if self.micro_batch is not None:
            return next(
                a for a in range(1, per_rank + 1) if per_rank % a == 0 and per_rank // a <= self.micro_batch
            )
        accumulation = self.accumulation or 1
        if per_rank % accumulation:
            raise UserError(
                f"train.accumulation: expected a divisor of {per_rank} (global_batch {self.global_batch} / "
                f"{num_ranks} processes), found {accumulation}."
            )
        return accumulation


def _nearest(wanted: int, choices: Sequence[int]) -> int:
    return min(choices, key=lambda choice: (abs(choice - wanted), choice))


class Recipe(Settings):
    """One training run. A recipe file states departures from the defaults, which stand beside the code."""

    name: str | None = None
    """The folder below `runs/`; null: the recipe file's name."""
    start_from: Path | None = None
    """A run whose best weights this one begins with, as far as they fit; `--from RUN` on the command line."""
    tasks: dict[str, TaskSettings] = Field(default_factory=dict)
    """What to learn. `"*"` stands for all tasks of the training data that are not named, each with these
    settings; without `tasks`, or with null, it is all of them. A kind that is not stated is the data's."""
    joint_losses: dict[JointName, UserJointLoss] = Field(default_factory=dict)
    """Losses of yours of several tasks' outputs, each a term of the total loss, by their import paths."""
    absent_tasks: tuple[str, ...] = ()
    """Optional tasks that the training data lacks: reading the recipe fills it in."""
    data: DataSettings
    model: ModelSettings = ModelSettings()
    balance: BalanceSettings = Fixed()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()
    engine: EngineSettings = EngineSettings()
    monitor: MonitorSettings = MonitorSettings()
    tracking: TrackingSettings = DEFAULT_TRACKING
    """Where the run's rows go besides its folder: tensorboard, wandb, mlflow, trackio or your own."""
    callbacks: CallbacksSettings = ()
    """Code of yours that is called at the start, after evaluations and epochs, and at the end."""

    @field_validator("name")
    @classmethod
    def _below_runs(cls, name: str | None) -> str | None:
        if name is not None and (not name.isprintable() or name in ("", ".", "..") or "/" in name):
            raise ValueError(f"expected a folder's name, which is made below runs/, found {name!r}.")
        if name is not None and len(name.encode()) > _LONGEST_NAME:
            raise ValueError(
                f"expected a folder's name of at most {_LONGEST_NAME} bytes, found {len(name.encode())}."
            )
        return name

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        problems = self.problems() if self.names_tasks else []
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def names_tasks(self) -> bool:
        """Whether it says what to learn: else the data decides, which only reading the data can show."""
        return "tasks" in self.model_fields_set

    def with_absolute_paths(self) -> Recipe:
        """The recipe with absolute paths, so that the run folder's copy works from anywhere."""
        start = None if self.start_from is None else self.start_from.absolute()
        return self.model_copy(
            update={"data": self.data.with_absolute_paths(Path.cwd()), "start_from": start}
        )

    def problems(self) -> list[str]:
        """What does not fit together, one line each."""
        backbone = self.model.backbone_problem
        problems = [f"model.backbone: {backbone}"] if backbone else []
        return [*self._task_problems(), *self._monitor_problems(), *problems]

    def _task_problems(self) -> list[str]:
        if not self.tasks:
            return ["tasks: expected at least one task, found none."]
        problems = []
        for where, names in (
            ("optim.task_lr", self.optim.task_lr),
            ("model.heads", self.model.heads),
        ):
            problems += [
                f"{where}.{name}: expected one of the tasks, found {name!r}. {suggest(name, self.tasks)}"
                for name in names
                if name not in self.tasks
            ]
        for name, joint in self.joint_losses.items():
            if name in self.tasks:
                problems.append(f"joint_losses.{name}: expected another name, found that of a task.")
            problems += [
                f"joint_losses.{name}.tasks: expected tasks of the recipe, found {task!r}. "
                f"{suggest(task, self.tasks)}"
                for task in joint.tasks
                if task not in self.tasks
            ]
        problems += [
            f"tasks.{name}.metrics.{metric}: expected another name, found that of a metric of its kind."
            for name, task in self.tasks.items()
            for metric in task.metrics
            if metric in ("loss", "num_samples", PER_CLASS, *task.modes)
        ]
        if all(task.weight == 0 for task in self.tasks.values()):
            problems.append("tasks: expected a weight > 0 for at least one task, found 0 for all.")
        return problems

    @property
    def monitor_mode(self) -> Mode:
        """Whether the monitored metric is to grow or to fall.

        Raises:
            UserError: it is a user-defined metric that does not say, or a mean of metrics of both sorts.
        """
        if self.monitor.mode is not None:
            return self.monitor.mode
        modes = {metric: self.mode_of(metric) for metric in self.monitor.names}
        if len(set(modes.values())) > 1:
            listing = ", ".join(f"{metric} ({mode})" for metric, mode in modes.items())
            raise UserError(
                f"monitor.mean: expected metrics that are all to grow or all to fall, found {listing}. "
                "Take those of one sort."
            )
        return next(iter(modes.values()))

    def mode_of(self, metric: str) -> Mode:
        """Whether a metric, such as `val/digit/accuracy`, is to grow or to fall.

        Raises:
            UserError: it is a user-defined metric that does not say.
        """
        task, _, name = metric.partition("/")[2].rpartition("/")
        if name == "loss" or name == MEAN_ACCURACY:
            return "min" if name == "loss" else "max"
        if name in self.tasks[task].modes:
            return self.tasks[task].modes[name]
        higher = getattr(self.tasks[task].metrics[name].part_class, "higher_is_better", None)
        if higher is None:
            raise UserError(
                f"monitor.mode: expected min or max for {metric}, whose class has no higher_is_better, "
                "found null."
            )
        return "max" if higher else "min"

    def _monitor_problems(self) -> list[str]:
        choices = [f"{split}/loss" for split in ("val", "train")]
        for split in ("val", "train") if self.train.metrics else ("val",):
            if any("accuracy" in task.modes for task in self.tasks.values()):
                choices.append(f"{split}/{MEAN_ACCURACY}")
            for name, task in self.tasks.items():
                choices += [f"{split}/{name}/{metric}" for metric in (*task.modes, *task.metrics)]
        terms = [*self.tasks, *self.joint_losses]
        choices += [f"{split}/{name}/loss" for split in ("val", "train") for name in terms]
        where = "metric" if self.monitor.mean is None else "mean"
        return [
            f"monitor.{where}: expected a metric of validation or training, found {metric!r}. "
            f"{suggest(metric, choices)}"
            for metric in self.monitor.names
            if metric not in choices
        ]


def load_recipe_of(run: Path) -> Recipe:
    """The recipe of a run folder; of one that is not the user's own no code is imported that is not trusted.

    Raises:
        UserError: one line per mistake.
    """
    path = run / "recipe.yaml"
    with parts_of(run, path.name):
        try:
            return load_recipe(path)
        except UserError as error:
            if str(error).startswith(str(path)):
                raise
            lines = "\n".join(f"{path}: {line}" for line in str(error).splitlines())
            raise UserError(lines) from None


def load_recipe(
    source: Path | Mapping[str, Any], overrides: Sequence[str | Mapping[str, Any]] = ()
) -> Recipe:
    """The recipe of a file, or of a mapping in its place, with `a.b=c` overrides, complete with defaults.

    Raises:
        UserError: one line per mistake.
    """
    if isinstance(source, Path) and not source.exists() and source.stem in shipped_files():
        raise UserError(
            f"{source}: expected a recipe, found no such file. `mtl init {source.stem}` writes "
            f"{source.stem}.yaml, the one that comes with the package."
        )
    if not isinstance(source, Path):
        return load_settings(Recipe, source, overrides, _filled)
    with parts_of_recipe(source):
        recipe = load_settings(Recipe, source, overrides, _filled)
    if recipe.name:
        return recipe
    return recipe.model_copy(update={"name": source.stem})


def _filled(data: dict[str, Any], added: set[Location]) -> tuple[dict[str, Any], list[Mistake]]:
    """A recipe's data with the tasks that it leaves to its datasets."""
    rest = {key: value for key, value in data.items() if key != "tasks"}

    def task_infos() -> Mapping[str, TaskInfo]:
        from mtl_dist.data.task_infos import tasks_in  # (only here are datasets looked at while reading)
        from mtl_dist.importers.external import with_indexes

        recipe = resolved_settings(Recipe, rest)
        try:
            return tasks_in(with_indexes(recipe.data))
        except UserError as error:
            raise _NoData(str(error)) from None

    try:
        return with_tasks_of_the_data(data, added, task_infos)
    except _NoData as error:
        return rest, [((), line) for line in str(error).splitlines()]
    except UserError:
        return rest, []  # its mistakes are found again, beside those of the overrides


class _NoData(UserError):
    """The datasets cannot be opened."""


def with_launcher(recipe: Recipe, environment: Mapping[str, str]) -> tuple[Recipe, list[str]]:
    """The recipe with what the launcher, or `engine.deepspeed`, says of settings that it does not state.

    Precision, clipping, accumulation and batch of an `accelerate config` file or a configuration of
    DeepSpeed are taken over, one line each for the log.

    Raises:
        UserError: the recipe states another value; one line each.
    """
    said = Launcher(environment).said()
    for setting, value in deepspeed_said(recipe.engine.deepspeed).items():
        if not setting.startswith("engine."):
            said.setdefault(setting, (value, "engine.deepspeed"))
    notes, problems = [], []
    changes: dict[str, dict[str, Any]] = {}
    for setting, (value, where) in said.items():
        section, _, name = setting.partition(".")
        part = getattr(recipe, section)
        now = getattr(part, name)
        if now == value:
            continue
        stated = section in recipe.model_fields_set and name in part.model_fields_set
        if setting == "train.accumulation" and "micro_batch" in part.model_fields_set:
            stated, now = True, f"train.micro_batch {part.micro_batch}"
        if stated and now is not None:
            problems.append(
                f"{setting}: expected {value}, which {where} has, found {now}. Set the same in both, or "
                "remove one of them."
            )
            continue
        changes.setdefault(section, {})[name] = value
        notes.append(f"{setting} is {value}, as {where} has it.")
    if "accumulation" in changes.get("train", {}) and "micro_batch" in changes["train"]:
        problems.append(
            "train.micro_batch: expected auto beside an accumulation, found "
            f"{changes['train']['micro_batch']}. It follows from train.global_batch; remove one of them."
        )
    if problems:
        raise UserError("\n".join(problems))
    updated = {
        section: validated(type(getattr(recipe, section)), getattr(recipe, section), values)
        for section, values in changes.items()
    }
    return recipe.model_copy(update=updated), notes


def validated(kind: type[Any], part: Any, changes: Mapping[str, Any]) -> Any:
    """A section of the recipe with other values, checked as those of a file are.

    Raises:
        UserError: a value is none of the setting's.
    """
    try:
        kind.model_validate(dict(changes))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(place) for place in first["loc"])
        raise UserError(f"{name}: {first['msg']}, found {first['input']!r} in the launcher's.") from None
    return part.model_copy(update=dict(changes))


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings by their dotted keys, as overrides name them; of what is in a list without nulls.

    >>> flat({"optim": {"lr": 1e-3}, "data": {"train": [{"path": "a", "weight": None}]}})
    {'optim.lr': 0.001, 'data.train.0.path': 'a'}
    """
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {
                str(place): {name: one for name, one in item.items() if one is not None}
                for place, item in enumerate(value)
            }
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
