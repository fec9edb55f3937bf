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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mtl_dist.durable import write_text
from mtl_dist.tracking.sink import Row, Sink, SkippedStep

METRICS, HISTORY, LOG = "metrics.jsonl", "history.json", "log.txt"
SKIPPED = "skipped_steps.jsonl"


class FilesSink(Sink):
    """Writes the files in `directory`, from `resumed_step` on.

    `rewritten` holds (kind, step) of the rows that were cut off.
    """

    def __init__(self, directory: Path, resumed_step: int = 0) -> None:
        self._directory = directory
        rows = read_rows(directory)
        self._rows = [row for row in rows if row["step"] <= resumed_step]
        self.rewritten = frozenset((row["kind"], row["step"]) for row in rows if row["step"] > resumed_step)
        write_text(directory / METRICS, "".join(json.dumps(row) + "\n" for row in self._rows))
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
        self._metrics.write(json.dumps(entry) + "\n")
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
    """The rows of a run's metrics.jsonl, up to the first line that is cut off; none without the file."""
    return _rows_in(directory / METRICS)


def _rows_in(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # The last line of a run that was killed while writing it.
    return rows


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
