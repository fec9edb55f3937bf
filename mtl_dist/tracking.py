"""What a run writes down while it trains: log.txt, metrics.jsonl, history.json, TensorBoard, curves.

metrics.jsonl is the record: one row per logged step (`"kind": "step"`) and one per evaluation
(`"kind": "epoch"`). history.json and learning_curves.png are drawn from its rows.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from mtl_dist.durable import write_text
from mtl_dist.status import Status, write_status

SECONDS_BETWEEN_PICTURES = 60.0
CONFLICTS = Path("evaluation") / "conflicts.png"


class Tracker:
    """Rank 0's records; on the other ranks (`directory` None) every call does nothing.

    `monitored` is the figure that chooses the best weights: the learning curves show it in any case.
    """

    def __init__(
        self,
        directory: Path | None,
        resumed_step: int,
        console: Console | None = None,
        monitored: str = "",
    ) -> None:
        self.directory = directory
        self._monitored = monitored
        self.console = console or Console()
        self._rows: list[dict[str, Any]] = []
        self._drawn = time.monotonic()
        if directory is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._log = open(directory / "log.txt", "a", encoding="utf-8")  # noqa: SIM115  (closed in close)
        self._rows = truncated_rows(directory / "metrics.jsonl", resumed_step)
        self._metrics = open(directory / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        purge = resumed_step + 1 if resumed_step else None
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)

    def say(self, text: str) -> None:
        """A line for people: on the terminal and in log.txt."""
        if self.directory is None:
            return
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._log.flush()

    def record(self, kind: str, step: int, epoch: float, figures: Mapping[str, float]) -> None:
        """One row of metrics.jsonl and the same figures in TensorBoard. NaN (undefined) becomes null."""
        if self.directory is None:
            return
        row = {"kind": kind, "step": step, "epoch": round(epoch, 6), "time": round(time.time(), 3), **figures}
        row = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._rows.append(row)
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        for name, value in figures.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)

    def status(self, status: Status) -> None:
        """Say in status.json where the run stands."""
        if self.directory is not None:
            write_status(self.directory, status)

    def update_history(self) -> None:
        """Write history.json anew, and the picture of it if the last one is old: drawing takes a second."""
        if self.directory is None:
            return
        os.fsync(self._metrics.fileno())
        write_text(self.directory / "history.json", json.dumps(history_of(self._rows), indent=1))
        if time.monotonic() - self._drawn > SECONDS_BETWEEN_PICTURES:
            self.draw()

    def draw(self) -> None:
        """Write learning_curves.png anew."""
        if self.directory is None:
            return
        history = history_of(self._rows)
        if history["step"]:
            from mtl_dist.curves import draw_learning_curves

            draw_learning_curves(history, self.directory / "learning_curves.png", self._monitored)
        self._drawn = time.monotonic()

    def draw_conflicts(self) -> None:
        """Write evaluation/conflicts.png and say which tasks fought over the run, if that was looked at."""
        if self.directory is None:
            return
        from mtl_dist.conflicts import conflicts_in, draw_conflicts

        found = conflicts_in(self._rows)
        if found is None:
            return
        (self.directory / "evaluation").mkdir(exist_ok=True)
        draw_conflicts({"mean cosine of gradients over the run": found}, self.directory / CONFLICTS)
        for sentence in found.sentences():
            self.say(sentence)

    def close(self) -> None:
        if self.directory is None:
            return
        self._board.close()
        self._metrics.close()
        self._log.close()


def truncated_rows(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl up to `step`; later ones, which a resumed run writes again, are cut off."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # The last line of a run that was killed while writing it.
        if row["step"] <= step:
            rows.append(row)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def history_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The evaluations as columns: `{"step": [...], "epoch": [...], "train": {"loss": [...], "digit/loss":
    [...]}, "val": {...}}`; null where a figure was not measured."""
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
