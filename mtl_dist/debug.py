"""`mtl train --debug`: one process, no workers, one small batch that the model must be able to overfit.

A model that cannot learn eight samples by heart will not learn the dataset: a wrong label, a dead head or a
broken loss shows within a minute, in a plain process where a breakpoint works.
"""

from __future__ import annotations

import pdb
import sys
import traceback

import torch
from rich.console import Console
from torch import Tensor, nn

from mtl_dist.assemble import build_root, facts_of
from mtl_dist.balancing import Balancing
from mtl_dist.batch import Batch
from mtl_dist.cell_table import CellTable
from mtl_dist.data.loader import open_data, train_loader
from mtl_dist.engine.accelerated import AccelerateEngine, connect_accelerate
from mtl_dist.engine.world import World, launched_size
from mtl_dist.errors import UserError
from mtl_dist.importers.external import with_indexes
from mtl_dist.models.describe import describe
from mtl_dist.recipe import Recipe
from mtl_dist.step import RootModule, WindowTotals, count_labels

NUM_SAMPLES = 8
MAX_STEPS = 500
CHECK_EVERY = 10


def overfit_one_batch(recipe: Recipe, console: Console | None = None) -> bool:
    """Overfit one batch of `recipe`; whether every labelled task reached its goal.

    Runs with anomaly detection, without augmentation, dropout or workers. A failure prints the shapes that
    went in, and opens the debugger where there is a terminal.

    Raises:
        UserError: started as several processes, or no task of the recipe has a label among the samples.
    """
    console = console or Console()
    if launched_size() > 1:
        raise UserError(
            "--debug: expected one process, found a launcher with several. Run `mtl train` itself."
        )
    _, world = connect_accelerate()
    recipe = recipe.with_absolute_paths()
    recipe = recipe.model_copy(update={"data": recipe.data.without_augmentation()})
    data = open_data(with_indexes(recipe.data), recipe.tasks)
    torch.manual_seed(recipe.train.seed)
    root = build_root(recipe, facts_of(data), world).to(world.device)
    console.print(describe(root.model, data.image_size), markup=False, highlight=False)

    loader = train_loader(
        data,
        seed=recipe.train.seed,
        global_batch=NUM_SAMPLES,
        accumulation=1,
        rank=0,
        world_size=1,
        start_position=0,
        end_position=NUM_SAMPLES,
        workers=0,
        pin_memory=False,
    )
    batch = next(iter(loader)).to(world.device)
    console.print(shapes_of(batch), markup=False, highlight=False)
    counts_T = count_labels(root.tasks, [batch], root.joints)
    if not (counts_T > 0).any():
        raise UserError(
            f"--debug: none of the first {NUM_SAMPLES} samples has a label of this recipe's tasks."
        )
    try:
        with torch.autograd.set_detect_anomaly(True):
            reached = _overfit(root, batch, counts_T, recipe, world)
    except Exception as error:
        error.add_note(shapes_of(batch))
        if sys.stdin.isatty() and sys.stdout.isatty():
            traceback.print_exc()
            pdb.post_mortem(error.__traceback__)
        raise
    console.print(_verdict(root, reached))
    return all(root.tasks[name].settings.has_learnt(value) for name, value in reached.items())


def _overfit(
    root: RootModule, batch: Batch, counts_T: Tensor, recipe: Recipe, world: World
) -> dict[str, float]:
    """Train on `batch` until every labelled task reaches its goal; the goals' metrics at the end."""
    root.train()
    for module in root.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    optimizer = torch.optim.Adam([p for p in root.parameters() if p.requires_grad], lr=recipe.optim.lr)
    engine = AccelerateEngine(None, world, root, optimizer)
    balancing = Balancing(root, engine, recipe.train.seed)
    reached: dict[str, float] = {}
    for step in range(1, MAX_STEPS + 1):
        totals = WindowTotals(counts_T, 1, step)
        engine.forward_backward(batch, totals, balancing.solve([batch], totals), last=True)
        engine.step(root.absent_parameters(totals), clip_norm=None)
        if step % CHECK_EVERY == 0:
            reached = _measure(root, batch)
            if all(root.tasks[name].settings.has_learnt(value) for name, value in reached.items()):
                break
    return reached


@torch.no_grad()
def _measure(root: RootModule, batch: Batch) -> dict[str, float]:
    outputs = root.predict(batch.images_BCHW)
    reached = {}
    for name, task in root.tasks.items():
        if not batch.labelled[name].any():
            continue
        metrics = task.metrics().to(batch.images_BCHW.device)
        metrics.update(outputs[name], batch.targets[name], batch.labelled[name])
        reached[name] = metrics.compute()[task.settings.learnt_by_heart[0]]
    return reached


def _verdict(root: RootModule, reached: dict[str, float]) -> CellTable:
    table = CellTable(box=None, pad_edge=False)
    for column in ("task", "metric on the batch", "reached", "wanted", ""):
        table.add_column(column)
    for name, task in root.tasks.items():
        metric, goal = task.settings.learnt_by_heart
        value = reached.get(name)
        if value is None:
            table.add_row(name, metric, "-", f"{goal:g}", f"no label among the {NUM_SAMPLES} samples")
        else:
            learnt = task.settings.has_learnt(value)
            verdict = "overfitted" if learnt else "NOT overfitted: look at its labels, loss and head"
            table.add_row(name, metric, f"{value:.4f}", f"{goal:g}", verdict)
    return table


def shapes_of(batch: Batch) -> str:
    """The batch in words: shapes, dtypes and ranges."""

    def line(name: str, tensor: torch.Tensor) -> str:
        values = tensor.float()
        values = values[values.isfinite()]  # what is not says "no label"
        values = values if len(values) else torch.zeros(1)
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        return f"  {name}: {shape} {dtype} from {values.min():g} to {values.max():g}"

    lines = ["batch", line("images", batch.images_BCHW)]
    for name, target in batch.targets.items():
        lines.append(f"{line(name, target)}, {int(batch.labelled[name].sum())} of {len(batch)} labelled")
    return "\n".join(lines)
