"""What an exported model says of itself, as JSON: what goes in, what comes out, which run it is of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtl_dist import __version__
from mtl_dist.assemble import Trained
from mtl_dist.checkpoint import step_of
from mtl_dist.prediction.exported import (
    VERSION,
    Network,
    images_in_words,
    plain_facts,
    portable,
    tasks_in_words,
)
from mtl_dist.run_folder import RunFolder


@dataclass(frozen=True)
class Form:
    """How a model is taken out: whether the graph takes any size, and whether it resizes by itself."""

    any_size: bool = False
    resize_inside: bool = False


def describe(folder: RunFolder, trained: Trained, network: Network, form: Form) -> dict[str, Any]:
    """The description; `recipe`, `data` and `thresholds` are what `mtl_dist.load` answers by."""
    assert network.module is not None
    mean, std = (
        [round(float(value), 6) for value in getattr(network.module, name).flatten()]
        for name in ("mean", "std")
    )
    return {
        "version": VERSION,
        "library_name": "mtl_dist",
        "made_by": f"mtl_dist {__version__}",
        "run": {
            "name": trained.recipe.name,
            "id": folder.directory.resolve().name,
            "step": step_of(trained.path),
        },
        "images": images_in_words(network)
        | {
            "any_size": form.any_size or form.resize_inside,
            "resize_inside": form.resize_inside,
        },
        "normalisation": {"mean": mean, "std": std, "inside": True},
        "tasks": tasks_in_words(network),
        "recipe": portable(trained.recipe),
        "data": plain_facts(trained.facts),
        "thresholds": {task: dict(chosen) for task, chosen in trained.thresholds.items()},
        "temperatures": dict(trained.temperatures),
    }
