"""The package from Python: train a recipe, and a run as an object.

import mtl_dist

run = mtl_dist.train("configs/digits.yaml", "optim.lr=1e-3", {"train.epochs": 5})
run.metrics["test"]["digit"]["accuracy"]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mtl_dist.config.loading import to_yaml
from mtl_dist.config.yaml_text import parse
from mtl_dist.errors import UserError
from mtl_dist.recipe import Recipe, load_recipe, load_recipe_of
from mtl_dist.run_folder import RunFolder, checked_tags
from mtl_dist.status import Status, read_status
from mtl_dist.tracking.files import history_of, read_rows

if TYPE_CHECKING:
    from mtl_dist.checkpoint import Best

Metrics: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""By split, task and name; NaN where one is undefined."""


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *overrides: str | Mapping[str, Any],
    run_dir: str | Path | None = None,
    tags: Sequence[str] = (),
    start_from: str | Path | Run | None = None,
    data_moved: bool = False,
) -> Run:
    """Train a recipe in this process (under a launcher, in each of its processes), and its run.

    `recipe` is a file, a dictionary as the file would hold it (lists for lists, text for paths), or a
    `Recipe`; `overrides` are `"a.b=value"` or `{"a.b": value}`. With `run_dir` that folder is the run's,
    and one that exists is taken up again; `tags` are added to the run's. A new run begins with the best
    weights of the run `start_from`, as far as they fit; with `data_moved` the data of one that goes on may
    lie in another place, and is checked to be the same. An interrupt (Ctrl-C, a notebook's stop) saves, and
    ends with `run.status.state` "stopped": `run.resume()` goes on.

    A process alone is left as it was: no process group, its signal handlers and environment restored.

    Raises:
        UserError: one line per mistake.
    """
    from mtl_dist.engine.world import left_as_found
    from mtl_dist.runs.train import train as train_recipe

    if start_from is not None:
        place = start_from.path if isinstance(start_from, Run) else start_from
        overrides = (*overrides, {"start_from": str(place)})
    resolved = read_recipe(recipe, overrides)
    with left_as_found():
        directory = Path(run_dir) if run_dir is not None else None
        outcome = train_recipe(resolved, directory, tags=checked_tags(tags), data_moved=data_moved)
    assert outcome.directory is not None
    return Run(outcome.directory)


def read_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str | Mapping[str, Any]] = ()
) -> Recipe:
    """The recipe that `train` trains, complete with defaults.

    Raises:
        UserError: one line per mistake.
    """
    if isinstance(recipe, Recipe):
        if not overrides:
            return recipe
        recipe = parse(to_yaml(recipe))[0]
    if not isinstance(recipe, str | Path | Mapping):
        raise UserError(
            f"recipe: expected a path, a dictionary or a Recipe, found {type(recipe).__name__}. "
            "Write for example train('configs/digits.yaml')."
        )
    return load_recipe(Path(recipe) if isinstance(recipe, str) else recipe, overrides)


class Run:
    """A run folder: what was asked for, what came out, and the trained model."""

    def __init__(self, path: str | Path) -> None:
        """Open the run folder at `path`; nothing is loaded before it is asked for.

        Raises:
            UserError: it is not one.
        """
        self._folder = RunFolder.open(Path(path))
        self.path = self._folder.directory

    def __repr__(self) -> str:
        status, best = self.status, self.best
        parts = [str(self.path)]
        if status is not None:
            parts.append(f"{status.state} at step {status.step} of {status.total_steps}")
        if best is not None:
            parts.append(f"best {best.metric} {best.value:.4g} at step {best.step}")
        return f"Run({', '.join(parts)})"

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return load_recipe_of(self._folder.directory)

    @property
    def status(self) -> Status | None:
        """Where the run stands; None before its first word."""
        return read_status(self.path)

    @property
    def tags(self) -> list[str]:
        """The words by which `mtl status --tag` and `mtl runs --tag` find it."""
        return self._folder.read_tags()

    @property
    def best(self) -> Best | None:
        """The best checkpoint so far; None before the first evaluation."""
        from mtl_dist.checkpoint import known_bests

        bests = known_bests(self._folder.checkpoints)
        return bests[0] if bests else None

    @property
    def metrics(self) -> Metrics:
        """The metrics of the best weights, of every split that was evaluated with them."""
        return {
            split: {
                task: {name: math.nan if value is None else value for name, value in values.items()}
                for task, values in tasks.items()
            }
            for split, tasks in self._folder.read_metrics().items()
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every row of metrics.jsonl."""
        return read_rows(self.path)

    @property
    def history(self) -> dict[str, Any]:
        """The epochs as columns: `{"step": [...], "epoch": [...], "train": {"loss": [...]}, "val": ...}`."""
        return history_of(self.rows)

    def predict(self, image: Any, threshold: float | None = None) -> Any:
        """Every task's answer for one image, or a list of them for a list of images; see `Predictor`.

        Raises:
            UserError: no checkpoint yet, or not a readable image.
        """
        if isinstance(image, list | tuple):
            return self._predictor.predict_many(image, threshold)
        return self._predictor.predict(image, threshold)

    def evaluate(
        self, split: str | None = None, checkpoint: str | int = "best"
    ) -> dict[str, dict[str, float]]:
        """Measure the best weights on a split of the run's data; also kept in evaluation/ and `metrics`.

        Without a `split`: on test or, where there is none, on val. `checkpoint` chooses others, as in `load`:
        "last", a step, or "best/TASK"; what they reach is kept under a name of its own, as `val-best-digit`.

        Raises:
            UserError: no such split, no checkpoint yet, or the data is not where it was.
        """
        from mtl_dist.engine.world import left_as_found
        from mtl_dist.runs.evaluation import evaluate_run

        with left_as_found():
            measured = evaluate_run(self.path, split, checkpoint=checkpoint)
        return self.metrics[measured]

    def report(self, out: str | Path | None = None, pictures: bool = True) -> Path:
        """Write the page of `mtl report`, by default report.html in the run folder; where it is.

        Raises:
            UserError: the run has not begun, or the page cannot be written.
        """
        from mtl_dist.report.page.write import write_report

        return write_report([self.path], None if out is None else Path(out), pictures)

    def export(
        self,
        format: Literal["onnx", "torch", "safetensors"] = "onnx",
        out: str | Path | None = None,
        checkpoint: str | int = "best",
        *,
        any_size: bool = False,
        resize_inside: bool = False,
        temperature: bool = False,
    ) -> Path:
        """Take the model out as `mtl export` does, by default into RUN/export/FORMAT; the folder.

        Raises:
            UserError: no such checkpoint, a package is missing, or the model cannot be taken out so.
        """
        from mtl_dist.exporting.description import Form
        from mtl_dist.exporting.export import export_run

        place = None if out is None else Path(out)
        form = Form(any_size, resize_inside)
        return export_run(self.path, format, place, checkpoint, form, temperature=temperature).path

    def resume(self, *overrides: str | Mapping[str, Any], data_moved: bool = False) -> Run:
        """Go on from the newest checkpoint, with `overrides` such as `"train.epochs=20"`.

        With `data_moved` one may say where the data lies now; it is checked to be the same.

        Raises:
            UserError: an override would make it another run, or the data is not what it was.
        """
        return train(self.recipe, *overrides, run_dir=self.path, data_moved=data_moved)

    @cached_property
    def _predictor(self) -> Any:
        from mtl_dist.prediction.predictor import Predictor

        return Predictor(self.path)
