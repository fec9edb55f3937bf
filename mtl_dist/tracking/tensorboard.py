"""TensorBoard: every metric a scalar under its name, the run's pictures as images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from mtl_dist.config.settings import Settings
from mtl_dist.tracking.sink import Row, RunFacts, Sink


class TensorBoardSettings(Settings):
    """Event files in the run folder, for `tensorboard --logdir runs`."""

    kind: Literal["tensorboard"] = "tensorboard"


class TensorBoardSink(Sink):
    """Event files in tensorboard/ of the run folder; what a resumed run writes again is purged."""

    def __init__(self, settings: TensorBoardSettings, run: RunFacts) -> None:
        del settings
        # It takes a second to import.
        from torch.utils.tensorboard import SummaryWriter

        purge = run.resumed_step + 1 if run.resumed_step else None
        self._writer = SummaryWriter(str(run.directory / "tensorboard"), purge_step=purge)

    def row(self, row: Row) -> None:
        self.results(row.metrics, row.step)

    def picture(self, name: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        pixels_HWC = np.asarray(Image.open(path).convert("RGB"))
        self._writer.add_image(name, pixels_HWC, step, dataformats="HWC")

    def results(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
