"""Opening a run folder to train in: made, or taken up again, and locked.

Whether the run there may go on is known before the first byte is written: a start that is refused leaves the
folder as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mtl_dist.checkpoint import DATA, RECIPE, newest_good, shapes_in
from mtl_dist.config.loading import to_yaml
from mtl_dist.config.trust import mark, parts_of
from mtl_dist.data.decode import decoder_name
from mtl_dist.data.facts import DataFacts
from mtl_dist.engine.world import World
from mtl_dist.errors import UserError
from mtl_dist.json_files import DamagedFile, read_json
from mtl_dist.recipe import Recipe, load_recipe
from mtl_dist.resuming import refuse_other_data, refuse_other_run
from mtl_dist.run_folder import RunFolder, writing_to
from mtl_dist.runs.announcements import warn
from mtl_dist.status import Status

Shapes = Mapping[str, tuple[int, ...]]
"""Of the model's weights and buffers, by name."""


@dataclass(frozen=True)
class Opened:
    """A run folder to train in.

    saved          its newest good checkpoint; None at the beginning
    facts          what the data is
    changes        one line for everything that is another than at that checkpoint
    restarts_best  whether later evaluations cannot be compared with the best one so far
    """

    folder: RunFolder
    saved: Path | None
    facts: DataFacts
    changes: tuple[str, ...] = ()
    restarts_best: bool = False


@contextmanager
def training_folder(
    directory: Path,
    recipe: Recipe,
    facts: Callable[[], DataFacts],
    shapes: Shapes,
    world: World,
    data_moved: bool = False,
) -> Iterator[Opened]:
    """The run folder, made or taken up again by rank 0 and locked while training.

    `facts` are those of the data, asked for on rank 0 alone. With `data_moved` the data may lie in another
    place.

    Raises:
        UserError: another process trains in it, it holds a run that cannot go on so, or none of its
            checkpoints is whole. Then it is left as it was.
    """
    with ExitStack() as held:
        folder = RunFolder(directory)

        def opened() -> Opened:
            found = facts()
            with writing_to(directory):
                return _open(folder, recipe, found, shapes, world, data_moved, held)

        yield world.on_main(opened)


def _open(
    folder: RunFolder,
    recipe: Recipe,
    facts: DataFacts,
    shapes: Shapes,
    world: World,
    data_moved: bool,
    held: ExitStack,
) -> Opened:
    folder.directory.mkdir(parents=True, exist_ok=True)
    held.enter_context(folder.locked())
    saved = newest_good(folder.checkpoints, warn)
    if saved is None:
        _check_nothing_is_lost(folder)
    changes: list[str] = []
    restarts_best, resized = False, ""
    kept = saved / RECIPE if saved is not None else folder.recipe_path
    if kept.is_file():
        with parts_of(folder.directory, folder.recipe_path.name):
            kept_recipe = load_recipe(kept)
        for change in refuse_other_run(kept_recipe, recipe, folder.directory, data_moved):
            changes.append(change.describe())
            resized = resized or (change.briefly() if change.resizes else "")
            restarts_best = restarts_best or change.verdict == "the best restarts"
    before = _facts_before(folder, saved)
    if before is not None:
        continuation = refuse_other_data(before, facts, folder.directory)
        changes += continuation.lines
        restarts_best = restarts_best or continuation.restarts_best
    if saved is not None:
        _check_fits(saved, shapes, resized)
    device = "cpu" if world.device.type == "cpu" else str(world.device)  # of launched ranks it is cpu:0
    changes += folder.write_start(to_yaml(recipe), facts, world.size, device, decoder_name())
    mark(folder.directory, folder.recipe_path.name)
    return Opened(folder, saved, facts, tuple(changes), restarts_best)


def _check_nothing_is_lost(folder: RunFolder) -> None:
    """Refuse a run that has saved checkpoints, and has none: beginning again would erase its record."""
    advice = (
        "Bring it back from a copy of the run, or begin again in another --run-dir; nothing here was changed."
    )
    try:
        status = read_json(Status, folder.directory / "status.json")
    except DamagedFile as error:
        raise UserError(
            f"{folder.checkpoints}: expected a checkpoint, found none, and status.json, which says "
            f"whether there was one, is damaged ({error}). {advice}"
        ) from None
    if status is not None and status.saved > 0:
        raise UserError(
            f"{folder.checkpoints}: expected the checkpoint of step {status.saved}, found none. {advice}"
        )


def _facts_before(folder: RunFolder, saved: Path | None) -> DataFacts | None:
    """What the data was at the checkpoint, or when the run began; None where that is not known."""
    if saved is not None:
        return DataFacts.parse((saved / DATA).read_bytes())
    try:
        return folder.read_data()
    except UserError:
        return None  # nothing was trained on it


def _check_fits(saved: Path, shapes: Shapes, resized: str) -> None:
    """Refuse a checkpoint of another network: some follow the size of the images, of which `resized` says
    what is another; and user-defined code may have changed under the same recipe."""
    found = shapes_in(saved)
    for name, shape in shapes.items():
        grows = name in found and 0 in shape  # a balancer's memory that has its size from the first step on
        if found.get(name) != shape and not grows:
            has = f"the shape {found[name]}" if name in found else "none"
            if resized:
                raise UserError(
                    f"{resized}, where {name} has the shape {shape}, and in {saved} {has}. "
                    "This model is made for one size of images: set it back, or choose another --run-dir."
                )
            raise UserError(
                f"{saved}: expected {name} of the shape {shape}, as the model has it now, found {has}. "
                "Bring the model's code back to what it was, or choose another --run-dir."
            )
    odd = next((name for name in found if name not in shapes), None)
    if odd is not None:
        raise UserError(
            f"{saved}: expected the weights of the model as it is now, found {odd} beside them. "
            "Bring the model's code back to what it was, or choose another --run-dir."
        )
