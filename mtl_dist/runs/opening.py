"""Opening a run folder to train in: made, or taken up again, and locked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtl_dist.checkpoint import newest_good
from mtl_dist.config.loading import to_yaml
from mtl_dist.config.trust import mark
from mtl_dist.data.decode import decoder_name
from mtl_dist.durable import write_text
from mtl_dist.engine.world import World
from mtl_dist.recipe import Recipe, load_recipe_of, refuse_other_run
from mtl_dist.run_folder import RunFolder
from mtl_dist.runs.announcements import warn


@contextmanager
def training_folder(directory: Path, recipe: Recipe, world: World) -> Iterator[tuple[RunFolder, Path | None]]:
    """The run folder, made or taken up again by rank 0 and locked while training; its newest good checkpoint.

    Raises:
        UserError: another process trains in it, or it holds another run, or none of its checkpoints is whole.
            Then it is left as it was.
    """
    folder = RunFolder(directory)

    def enter() -> Path | None:
        directory.mkdir(parents=True, exist_ok=True)
        lock.__enter__()
        if folder.recipe_path.is_file():
            refuse_other_run(load_recipe_of(directory), recipe, directory)
        saved = newest_good(folder.checkpoints, warn)
        write_text(folder.recipe_path, to_yaml(recipe))
        mark(directory, folder.recipe_path.name)
        before = folder.write_environment(world.size, str(world.device), decoder_name())
        if before is not None:
            now = decoder_name()
            warn(f"{directory}: images were decoded by {before} so far, and are by {now} from here on.")
        return saved

    lock = folder.locked()
    saved = world.on_main(enter)
    try:
        yield folder, saved
    finally:
        if world.is_main:
            lock.__exit__(None, None, None)
