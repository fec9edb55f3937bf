"""Pages as files: one HTML file each, with everything in it; user text is escaped by the template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import mtl_dist
from mtl_dist.durable import write_text
from mtl_dist.errors import UserError
from mtl_dist.report.page.build import build_page
from mtl_dist.report.page.record import read_run
from mtl_dist.report.page.several import build_several
from mtl_dist.run_folder import RunFolder

HERE = Path(__file__).parent
NAME = "report.html"


def _runs_of(paths: Sequence[Path]) -> list[Path]:
    """The runs that are meant: a folder of runs, such as a sweep's, stands for those begun in it."""
    runs: list[Path] = []
    for path in paths:
        is_folder = path.is_dir() and not RunFolder(path).recipe_path.is_file()
        within = sorted(path.iterdir()) if is_folder else []
        runs += [one for one in within if RunFolder(one).has_begun] or [path]
    return runs


def write_report(runs: Sequence[Path], out: Path | None = None, pictures: bool = True) -> Path:
    """Write the page of a run, or of several side by side (a folder of runs: all in it); returns where it is.

    Without `out` it is report.html in the run folder; of several, in the working directory.

    Raises:
        UserError: not a run that has begun, the same run twice, or `out` cannot be written.
    """
    runs = _runs_of(runs)
    resolved = [run.resolve() for run in runs]
    if len(set(resolved)) < len(resolved):
        raise UserError("RUN: expected different runs, found one of them twice. Name each once.")
    records = [read_run(run) for run in runs]
    if len(records) == 1:
        text = rendered("run.html.j2", build_page(records[0], pictures))
        path = out or runs[0] / NAME
    else:
        text = rendered("several.html.j2", build_several(records))
        path = out or Path(NAME)
    if not path.parent.is_dir():
        raise UserError(
            f"--out {path}: expected a folder that is there, found no {path.parent}. Make it first."
        )
    try:
        write_text(path, text, sync=False)
    except OSError as error:
        raise UserError(f"{path}: expected a file that can be written, found: {error.strerror}.") from None
    return path


def rendered(template: str, page: object) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    style = (HERE / "style.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(page=page, style=style, version=mtl_dist.__version__)
