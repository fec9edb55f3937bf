"""docs/first-hour.ipynb runs as it stands, and shows pictures without a word of the machine it ran on."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import mtl_dist

pytestmark = pytest.mark.slow

NOTEBOOK = Path(mtl_dist.__file__).parents[1] / "docs" / "first-hour.ipynb"


@pytest.mark.timeout(600)
def test_the_first_hour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    here = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=280, coalesce_streams=True, resources=here).execute()
    printed = "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )
    accuracy = re.search(r"all labels +digit (\d\.\d+)", printed)
    assert accuracy is not None and float(accuracy[1]) > 0.8


def test_its_outputs_are_pictures_and_no_machine_paths() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 5
    assert all(base64.b64decode(picture)[:4] == b"\x89PNG" for picture in pictures)
    assert NOTEBOOK.stat().st_size < 1_500_000
    assert [output for output in outputs if output.output_type == "error"] == []
    texts = [
        str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", "")) for output in outputs
    ]
    assert [text for text in texts if re.search(r"/(home|root|tmp|work|Users)/", text)] == []
