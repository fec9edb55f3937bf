"""The record of a run in plain files: log.txt, metrics.jsonl, history.json, skipped_steps.jsonl.

metrics.jsonl has one row per logged step (`"kind": "step"`), per epoch (`"epoch"`) and per comparison of
the tasks' gradients (`"balance"`). A resumed run cuts it back to its checkpoint, so that it is the record of
a run that never stopped. history.json holds the epochs' rows as columns. skipped_steps.jsonl is there
once a step was not finite: one line per such step, with the keys of its samples, cut back in the same way.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mtl_dist.durable import write_text
from mtl_dist.tracking.sink import Row, Sink, SkippedStep

METRICS, HISTORY, LOG = "metrics.jsonl", "history.json", "log.txt"
SKIPPED = "skipped_steps.jsonl"


class FilesSink(Sink):
    """Writes the files in `directory`, from `resumed_step` on.

    `record` is what metrics.jsonl held at that step, as the checkpoint has it; None where nobody knows.
    `rewritten` holds (kind, step) of the rows that were cut off, `notes` what was damaged, `lines` those of
    metrics.jsonl.
    """

    def __init__(self, directory: Path, resumed_step: int = 0, record: str | None = None) -> None:
        self._directory = directory
        self.notes: list[str] = []
        rows = read_rows(directory)
        self.rewritten = frozenset((row["kind"], row["step"]) for row in rows if row["step"] > resumed_step)
        self._rows = [row for row in rows if row["step"] <= resumed_step]
        if record is not None:
            kept = [json.loads(line) for line in record.splitlines()]
            if kept != self._rows:
                self.notes.append(
                    f"warning  {directory / METRICS} was damaged or cut: it is rebuilt from the checkpoint, "
                    f"up to step {resumed_step}."
                )
            self._rows = kept
        self.lines = [json.dumps(row) + "\n" for row in self._rows]
        write_text(directory / METRICS, "".join(self.lines))
        if self._rows:
            write_text(directory / HISTORY, json.dumps(history_of(self._rows), indent=1))
        self._metrics = open(directory / METRICS, "a", encoding="utf-8")  # noqa: SIM115  (closed in close)
        self._log = open(directory / LOG, "a", encoding="utf-8")  # noqa: SIM115
        skipped = _rows_in(directory / SKIPPED)
        if skipped:
            kept = [json.dumps(row) + "\n" for row in skipped if row["step"] <= resumed_step]
            write_text(directory / SKIPPED, "".join(kept))

    def row(self, row: Row) -> None:
        """One line; what is undefined becomes null. An epoch's is synced, and history.json follows it."""
        entry = {"kind": row.kind, "step": row.step, "epoch": round(row.epoch, 6), "time": round(row.time, 3)}
        entry |= {name: value if math.isfinite(value) else None for name, value in row.metrics.items()}
        self._rows.append(entry)
        self.lines.append(json.dumps(entry) + "\n")
        self._metrics.write(self.lines[-1])
        self._metrics.flush()
        if row.kind == "epoch":
            os.fsync(self._metrics.fileno())
            write_text(self._directory / HISTORY, json.dumps(history_of(self._rows), indent=1))

    def skipped(self, skipped: SkippedStep) -> None:
        """One line, synced: whoever looks for a bad sample needs it most after a crash."""
        with open(self._directory / SKIPPED, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(skipped)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def text(self, line: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        self._log.flush()

    def close(self) -> None:
        self._metrics.close()
        self._log.close()


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; none without the file.

    In the place of a line that is damaged stands a row of the kind "damaged" with its number; the last line
    of a run that was killed while writing it is left out.
    """
    return _rows_in(directory / METRICS, ("kind",))


def _rows_in(path: Path, needed: Sequence[str] = ()) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    content = path.read_bytes()
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        row = _row_in(line, needed)
        if row is not None:
            rows.append(row)
        elif line.endswith(b"\n"):
            step = rows[-1]["step"] if rows else 0
            rows.append({"kind": "damaged", "step": step, "epoch": 0.0, "line": number})
    return rows


def _row_in(line: bytes, needed: Sequence[str]) -> dict[str, Any] | None:
    """The row in a line; None where it is damaged, or has not what every row has."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    if row.get("kind") == "epoch":
        needed = (*needed, "epoch")
    if not row.keys() >= set(needed):
        return None
    return row


def history_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The epochs as columns: `{"step": [...], "epoch": [...], "train": {"loss": [...], "digit/loss": [...]},
    "val": {...}}`; null where a metric was not measured."""
    epochs = [row for row in rows if row["kind"] == "epoch"]
    history: dict[str, Any] = {
        "step": [row["step"] for row in epochs],
        "epoch": [row["epoch"] for row in epochs],
        "train": {},
        "val": {},
    }
    for split in ("train", "val"):
        names = dict.fromkeys(key for row in epochs for key in row if key.startswith(f"{split}/"))
        for name in names:
            history[split][name.removeprefix(f"{split}/")] = [row.get(name) for row in epochs]
    return history
