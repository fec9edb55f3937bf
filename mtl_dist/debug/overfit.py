"""`mtl train --debug`: one process, no workers, one small batch that the model must be able to overfit.

A model that cannot learn eight samples by heart will not learn the dataset: a wrong label, a dead head or a
broken loss shows within a minute, in a plain process where a breakpoint works.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from torch import Tensor, nn

from mtl_dist.assemble import build_root, facts_of
from mtl_dist.balancing import Balancing
from mtl_dist.batch import Batch
from mtl_dist.cell_table import CellTable
from mtl_dist.data.loader import Data, open_data, train_loader
from mtl_dist.debug.blame import blame
from mtl_dist.debug.gradients import GradientWatch
from mtl_dist.debug.pictures import Section, batch_picture
from mtl_dist.debug.verdict import Seen, verdict
from mtl_dist.engine.accelerated import AccelerateEngine, connect_accelerate
from mtl_dist.engine.world import World, launched_size
from mtl_dist.errors import UserError
from mtl_dist.importers.external import with_indexes
from mtl_dist.models.describe import describe
from mtl_dist.plural import plural, readable
from mtl_dist.recipe import Recipe
from mtl_dist.step import RootModule, WindowTotals, count_labels

NUM_SAMPLES = 8
MAX_STEPS = 500
MAX_SECONDS = 60.0
CHECK_EVERY = 10
LOOKED_AT = 5
"""The first steps, in which gradients are looked at and time is taken."""
PICTURE = Path("debug", "batch.png")
_LINE_EVERY_S = 5.0


def overfit_one_batch(recipe: Recipe, console: Console | None = None, folder: Path | None = None) -> bool:
    """Overfit one batch of `recipe`; whether every labelled task reached its goal.

    Shows the model, the batch (also as `debug/batch.png` in `folder`, by default the current one), the
    gradients and the time of the first steps, and how far each task is; ends after a minute. Without
    augmentation, dropout or workers, under Adam at the recipe's learning rate.

    Raises:
        UserError: started as several processes, or no task of the recipe has a label among the samples.
    """
    console = console or Console()
    if launched_size() > 1:
        raise UserError(
            f"--debug: expected one process, found a launcher with {launched_size()}: it shows one "
            "batch, and breakpoints want a terminal of their own. Run `mtl train RECIPE --debug` itself."
        )
    _, world = connect_accelerate()
    recipe = recipe.with_absolute_paths()
    as_trained = open_data(with_indexes(recipe.data), recipe.tasks)
    recipe = recipe.model_copy(update={"data": recipe.data.without_augmentation()})
    data = open_data(with_indexes(recipe.data), recipe.tasks)
    torch.manual_seed(recipe.train.seed)
    root = build_root(recipe, facts_of(data), world).to(world.device)
    _tell(console, describe(root.model, data.image_size))

    began = time.perf_counter()
    batch = _first_batch(data, recipe)
    loading_s = time.perf_counter() - began
    _tell(console, shapes_of(batch))
    _draw(console, [Section(*both) for both in _sections(as_trained, recipe, batch)], data, folder or Path())
    batch = batch.to(world.device)
    counts_T = count_labels(root.tasks, [batch], root.joints)
    if not (counts_T > 0).any():
        raise UserError(
            f"--debug: none of the first {NUM_SAMPLES} samples has a label of this recipe's tasks."
        )
    gradients = GradientWatch(root.model)
    try:
        seen = _overfit(root, batch, counts_T, recipe, world, gradients, loading_s, console)
    except Exception as error:
        error.add_note(shapes_of(batch))
        raise
    console.print(verdict(root, batch, seen, recipe.optim.lr, gradients.dead))
    learnt = [root.tasks[name].settings.has_learnt(value) for name, value in seen.reached.items()]
    if seen.undecided and not all(learnt):
        _tell(
            console,
            f"{MAX_SECONDS:.0f} s were enough for {plural(seen.steps, 'step')}, which decide little. Where "
            "nothing else keeps this machine busy, try a smaller data.image_size or backbone.",
        )
    return bool(learnt) and all(learnt)  # none was measured where the first steps were not finite


def _first_batch(data: Data, recipe: Recipe) -> Batch:
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
    return next(iter(loader))


def _sections(as_trained: Data, recipe: Recipe, batch: Batch) -> Iterator[tuple[str, Batch]]:
    augmented = _first_batch(as_trained, recipe)
    same = augmented.lam_B is None and torch.equal(augmented.images_BCHW, batch.images_BCHW)
    if not same:
        yield "As training sees them, augmented", augmented
    yield "As they are overfitted here, without augmentation", batch


def _draw(console: Console, sections: list[Section], data: Data, folder: Path) -> None:
    path = folder / PICTURE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        batch_picture(sections, data.task_infos).save(path)
    except OSError as error:
        _tell(console, f"warning  the batch is not drawn: {path}: {error.strerror or error}")
    else:
        _tell(console, f"picture {path}")


def _overfit(
    root: RootModule,
    batch: Batch,
    counts_T: Tensor,
    recipe: Recipe,
    world: World,
    gradients: GradientWatch,
    loading_s: float,
    console: Console,
) -> Seen:
    """Train on `batch` until every labelled task reaches its goal, or the time is over."""
    root.train()
    for module in root.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    optimizer = torch.optim.Adam([p for p in root.parameters() if p.requires_grad], lr=recipe.optim.lr)
    engine = AccelerateEngine(None, world, root, optimizer)
    balancing = Balancing(root, engine, recipe.train.seed)
    seen, clock, began = Seen(losses={name: [] for name in root.tasks}), _Clock(world), time.monotonic()
    with clock.forward(root), _shown(console) as show:
        for step in range(1, MAX_STEPS + 1):
            totals = WindowTotals(counts_T, 1, step)
            clock.begin()
            weights = balancing.solve([batch], totals)
            sums_T, _ = engine.forward_backward(batch, totals, weights, last=True)
            clock.backward()
            if step <= LOOKED_AT:
                gradients.look()
            with clock.optimizer():
                done = engine.step(root.absent_parameters(totals), clip_norm=None)
            for name, loss, count in zip(root.tasks, sums_T.tolist(), counts_T.tolist(), strict=False):
                seen.losses[name].append(loss / count if count else 0.0)
            if step == LOOKED_AT:
                _tell(console, "\n".join([*gradients.lines(), clock.line(loading_s)]))
            if done.skipped:  # the weights are as they were
                seen.bad_gradient = bool(sums_T.isfinite().all())
                seen.blamed = blame(root, batch, totals, engine, balancing)
                break
            seen.out_of_time = time.monotonic() - began > MAX_SECONDS
            if step % CHECK_EVERY == 0 or seen.out_of_time:
                seen.reached = _measure(root, batch)
                show(root, seen, time.monotonic() - began)
                if seen.out_of_time or all(
                    root.tasks[name].settings.has_learnt(value) for name, value in seen.reached.items()
                ):
                    break
    return seen


class _Clock:
    """Where the time of the steps after the first goes, in seconds."""

    def __init__(self, world: World) -> None:
        self._device = world.device
        self._marks: list[float] = []
        self._laps: list[tuple[float, float, float]] = []

    @contextmanager
    def forward(self, root: RootModule) -> Iterator[None]:
        """Takes the time at which each forward of `root` ends."""
        handle = root.register_forward_hook(lambda *_: self._mark())
        try:
            yield
        finally:
            handle.remove()

    def begin(self) -> None:
        self._marks = []
        self._mark()

    def backward(self) -> None:
        self._mark()

    @contextmanager
    def optimizer(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._synchronise()
        first, *_, forward, backward = self._marks
        self._laps.append((forward - first, backward - forward, time.perf_counter() - began))

    def line(self, loading_s: float) -> str:
        """Medians of the steps so far, but for the first."""
        parts = [sorted(part)[len(part) // 2] * 1e3 for part in zip(*self._laps[1:], strict=True)]
        return (
            f"time of a batch of {NUM_SAMPLES}: loading {loading_s * 1e3:.0f} ms (the first one), "
            f"forward {parts[0]:.0f} ms, backward {parts[1]:.0f} ms, optimizer {parts[2]:.0f} ms"
        )

    def _mark(self) -> None:
        self._synchronise()
        self._marks.append(time.perf_counter())

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@contextmanager
def _shown(console: Console) -> Iterator[_Show]:
    """A table that stays in its place in a terminal, elsewhere a line every few seconds."""
    if not console.is_terminal:
        yield _Show(console, None)
        return
    with Live(console=console, transient=True) as live:
        yield _Show(console, live)


class _Show:
    def __init__(self, console: Console, live: Live | None) -> None:
        self._console = console
        self._live = live
        self._next_s = 0.0

    def __call__(self, root: RootModule, seen: Seen, elapsed_s: float) -> None:
        """How far each task is."""
        if self._live is not None:
            table = CellTable(box=None, pad_edge=False)
            for column in (f"step {seen.steps}, {elapsed_s:.0f} s", "loss", "metric", "reached", "wanted"):
                table.add_column(column)
            for name, value in seen.reached.items():
                metric, goal = root.tasks[name].settings.learnt_by_heart
                table.add_row(name, readable(seen.losses[name][-1]), metric, readable(value), f"{goal:g}")
            self._live.update(table, refresh=True)
        elif elapsed_s >= self._next_s:
            self._next_s = elapsed_s + _LINE_EVERY_S
            metrics = {name: task.settings.learnt_by_heart[0] for name, task in root.tasks.items()}
            each = ", ".join(
                f"{name} {metrics[name]} {value:z.3f} (loss {seen.losses[name][-1]:.3g})"
                for name, value in seen.reached.items()
            )
            _tell(self._console, f"step {seen.steps:>3}  {elapsed_s:2.0f} s  {each}")


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


def _tell(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


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
