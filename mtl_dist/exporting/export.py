"""`mtl export`: a run's weights as a model that runs elsewhere, checked against the run before it is kept."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl_dist.assemble import Trained, WhichCheckpoint, read_trained
from mtl_dist.config.trust import MARK, mark
from mtl_dist.durable import write_text
from mtl_dist.errors import UserError
from mtl_dist.exporting.card import card
from mtl_dist.exporting.checking import Images, difference, images_for
from mtl_dist.exporting.description import Form, describe
from mtl_dist.exporting.graph import Graph, check_resize, traced
from mtl_dist.exporting.packages import Format, check_packages
from mtl_dist.prediction.exported import (
    CONFIG_FILE,
    EMBEDDED,
    INPUT,
    ONNX_FILE,
    TORCH_FILE,
    WEIGHTS_FILE,
    network_of,
    open_exported,
)
from mtl_dist.prediction.predictor import Predictor
from mtl_dist.printable import say
from mtl_dist.run_folder import RunFolder
from mtl_dist.tensor_files import write_tensors

CARD = "README.md"
FILES: Mapping[Format, str] = {"onnx": ONNX_FILE, "torch": TORCH_FILE, "safetensors": WEIGHTS_FILE}


@dataclass(frozen=True)
class Exported:
    """What came of it.

    path        the folder; `file` in it holds the weights
    difference  the largest from the run's own outputs, and `images` what it was measured on
    """

    path: Path
    file: Path
    num_bytes: int
    seconds: float
    difference: float
    images: str


def export_run(
    run: Path,
    format: Format,
    out: Path | None = None,
    checkpoint: WhichCheckpoint = "best",
    form: Form = Form(),  # noqa: B008  (frozen)
    images: Path | None = None,
    say: Callable[[str], None] = say,
    temperature: bool = False,
) -> Exported:
    """Write a run's model into the folder `out`, by default RUN/export/FORMAT, and hold it against the run.

    Args:
        images: what to check with, in place of the run's data.
        temperature: whether the description has the run's temperatures, by which it is read back.

    Raises:
        UserError: no such checkpoint, a package is missing, the model cannot be taken out so, or `out` holds
            something else than an earlier export.
    """
    begin = time.monotonic()
    out = out or run / "export" / format
    check_place(out)
    if format not in FILES:
        raise UserError(f"--format: expected {', '.join(FILES)}, found {format!r}.")
    check_packages(format)
    folder = RunFolder.open(run)
    trained = read_trained(folder, say, checkpoint, temperature)
    if form.resize_inside:
        check_resize(trained.recipe.data)
    taken = trained.merged()
    network = network_of(taken, "cpu")
    description = describe(folder, taken, network, form)
    found = images_for(trained.recipe, network, images)
    with _folder(out, say) as partial:
        if format == "safetensors":
            write_tensors(
                {k: t.contiguous() for k, t in taken.weights.items()},
                partial / WEIGHTS_FILE,
                {"format": "pt"},
            )
            write_text(partial / CONFIG_FILE, json.dumps(description, indent=1))
            write_text(partial / CARD, card(description, taken, network, folder.read_metrics()))
        else:
            with quiet():
                graph = Graph(network, trained.recipe.data.size, form.resize_inside)
                program = traced(graph, network, trained.facts.image_size, form.any_size)
                write = write_onnx if format == "onnx" else write_torch
                write(program, graph.tasks, description, partial)
        mark(partial, CONFIG_FILE if format == "safetensors" else FILES[format])
        worst = _checked(partial / FILES[format], trained, form, found)
    file = out / FILES[format]
    seconds = time.monotonic() - begin
    return Exported(out, file, file.stat().st_size, seconds, worst, found.source)


def check_place(out: Path) -> None:
    """Refuse a folder of other things: an export replaces files by their names.

    Raises:
        UserError: it is no folder, or neither empty nor of an earlier export.
    """
    is_export = (out / MARK).exists() and not RunFolder(out).recipe_path.exists()
    if out.is_dir() and any(out.iterdir()) and not is_export:
        raise UserError(
            f"--out {out}: expected a new or empty folder, or one of an earlier export, found other files."
        )


def set_aside(path: Path, say: Callable[[str], None]) -> None:
    """Keep a card that may have been edited, under a name that is free."""
    kept = next(
        name
        for number in itertools.count(1)
        if not (name := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists()
    )
    path.rename(kept)
    say(f"{path} was another, and is kept as {kept.name}")


@contextmanager
def _folder(out: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """A folder in `out`, whose files take their places there when the block ends well."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        partial = out / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"--out {out}: expected a folder to write into, found: {error.strerror}.") from None
    try:
        yield partial
        for path in sorted(partial.iterdir()):
            place = out / path.name
            if path.name == CARD and place.exists() and place.read_bytes() != path.read_bytes():
                set_aside(place, say)
            path.replace(place)
    except OSError as error:
        raise UserError(f"{out}: expected it to take the model, found: {error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            out.rmdir()  # where nothing came of it


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch and onnxscript say while they translate: what matters comes as an error."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def write_onnx(
    program: torch.export.ExportedProgram,
    tasks: tuple[str, ...],
    description: Mapping[str, Any],
    folder: Path,
) -> None:
    """One file with the weights inside; those of more than 2 GB, which it cannot hold, lie beside it."""
    # A dictionary's outputs are given out by position: in the order in which the graph made them.
    made = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT], output_names=list(tasks), verbose=False
    )
    assert made is not None
    for key, value in description.items():
        made.model.metadata_props[key] = json.dumps(value)
    made.save(folder / ONNX_FILE)


def write_torch(
    program: torch.export.ExportedProgram,
    tasks: tuple[str, ...],
    description: Mapping[str, Any],
    folder: Path,
) -> None:
    del tasks
    torch.export.save(program, folder / TORCH_FILE, extra_files={EMBEDDED: json.dumps(description)})


def _checked(file: Path, trained: Trained, form: Form, images: Images) -> float:
    """Read the file back, and hold its outputs against the run's, in batches of other sizes too."""
    own, other = network_of(trained, "cpu"), open_exported(file, "cpu")
    assert own.module is not None
    graph = Graph(own, trained.recipe.data.size, form.resize_inside).eval()
    predictor = Predictor.of(own)
    worst = 0.0
    for batch in _batches(images, predictor, form):
        with torch.no_grad():
            expected, found = graph(batch), other.predict(batch)
        worst = max(worst, difference(expected, found, str(file)))
    return worst


def _batches(images: Images, predictor: Predictor, form: Form) -> Iterator[Tensor]:
    if form.resize_inside:
        yield from (original[None] for original in images.originals)
        return
    inputs = predictor.inputs(images.originals)
    yield inputs
    yield inputs[:1]
    if form.any_size:
        yield torch.nn.functional.pad(inputs, (0, 32, 0, 64))
