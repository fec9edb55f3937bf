"""The model card of an exported run: README.md in the layout of the Hugging Face hub, filled from the run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtl_dist.assemble import Trained
from mtl_dist.config.yaml_text import dump
from mtl_dist.models.describe import parameters_in_words
from mtl_dist.plural import first_few, plural
from mtl_dist.prediction.exported import Network
from mtl_dist.printable import printable
from mtl_dist.recipe import Recipe

_MOST_CLASSES = 20


def card(
    description: Mapping[str, Any],
    trained: Trained,
    network: Network,
    metrics: Mapping[str, Mapping[str, Mapping[str, float | None]]],
) -> str:
    """The card. What only its author can know (intended use, licence) is left to be written, and says so."""
    recipe, run = trained.recipe, description["run"]
    head = {
        "library_name": "mtl_dist",
        "tags": [
            "multi-task-learning",
            "computer-vision",
            *sorted({_tag(t) for t in description["tasks"].values()}),
        ],
    }
    name = run["name"] or run["id"]
    assert network.module is not None
    lines = [
        "---",
        dump(head).rstrip("\n"),
        "---",
        "",
        f"# {_text(name)}",
        "",
        f"A {_text(recipe.model.backbone_name)} of {parameters_in_words(network.module)} that answers "
        f"{plural(len(network.tasks), 'question')} about an image, trained with mtl_dist. "
        f"These are the weights of step {run['step']} of the run {_text(run['id'])}.",
        "",
        "## Tasks",
        "",
        *_table(["task", "kind", "output", "classes or unit"], _task_rows(description["tasks"])),
        "",
        "## Use",
        "",
        "```python",
        "import mtl_dist",
        "",
        'predictor = mtl_dist.load("path/of/this/folder")',
        'predictor.predict("photo.jpg")',
        "```",
        "",
        *_image_lines(description),
        "",
        "## Metrics",
        "",
        *_metric_lines(metrics),
        "",
        "## Training",
        "",
        *_training_lines(trained),
        "",
        "## Intended use, limits, licence",
        "",
        "To be written by whoever publishes this model: for what and whom it is meant, on whose images it "
        "has not been tested, and under which licence weights and data are.",
    ]
    return "\n".join(lines) + "\n"


def _tag(task: Mapping[str, Any]) -> str:
    return "image-" + str(task["kind"]).rpartition(".")[2]


def _task_rows(tasks: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    for name, task in tasks.items():
        classes = list(task["classes"])
        shape = f"({task['num_outputs']}, H, W)" if task["layout"] == "map" else f"({task['num_outputs']},)"
        answer = first_few(classes, _MOST_CLASSES) if classes else task["unit"] or "a number"
        yield [name, task["kind"], shape, answer]


def _image_lines(description: Mapping[str, Any]) -> list[str]:
    images, normal = description["images"], description["normalisation"]
    height, width = images["size"]
    return [
        f"Images are raw {images['dtype']} of {plural(images['channels'], 'channel')} ({images['values']}), "
        f"resized to {height} x {width} pixels ({images['resize']}). The model itself subtracts "
        f"{_numbers(normal['mean'])} and divides by {_numbers(normal['std'])}. `config.json` has it all."
    ]


def _metric_lines(metrics: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> list[str]:
    if not metrics:
        return ["The run has not been evaluated."]
    lines = []
    for split, tasks in metrics.items():
        rows = [
            [task, name, "undefined" if value is None or math.isnan(value) else f"{value:.4g}"]
            for task, values in tasks.items()
            for name, value in values.items()
        ]
        lines += [f"On {split}:", "", *_table(["task", "metric", "value"], rows), ""]
    return lines[:-1]


def _training_lines(trained: Trained) -> list[str]:
    recipe, facts = trained.recipe, trained.facts
    rows = [[name, f"{info.num_labelled:,}"] for name, info in facts.task_infos.items()]
    sources = dict.fromkeys(
        f"{source.name} ({split}, {source.num_samples:,} samples)"
        for split, found in facts.sources.items()
        for source in found
    )
    return [
        f"Data: {', '.join(map(_text, sources)) or 'not recorded'}.",
        "",
        *_table(["task", "training labels"], rows),
        "",
        f"At most {plural(recipe.train.epochs, 'epoch')}, global batch {recipe.train.global_batch}, "
        f"{recipe.optim.kind} with lr {recipe.optim.lr:g}, {recipe.train.precision}, "
        f"losses balanced by {_method(recipe)}, seed {recipe.train.seed}. `recipe` in "
        "config.json states every setting that the model needs.",
    ]


def _method(recipe: Recipe) -> str:
    method = recipe.balance.method
    return str(getattr(method, "method", method))


def _table(header: Sequence[str], rows: Iterator[list[str]] | Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" * len(header)
    for row in rows:
        yield "| " + " | ".join(_text(cell) for cell in row) + " |"


def _numbers(values: Sequence[float]) -> str:
    return " / ".join(f"{value:g}" for value in values)


def _text(text: object) -> str:
    """Names of unknown origin as Markdown shows them: no markup of theirs, no controls."""
    plain = printable(str(text)).replace("\n", " ")
    return "".join(f"\\{c}" if c in "\\|`*_<>[]#" else c for c in plain)
