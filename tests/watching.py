"""Callbacks of a user's, for the tests of runs."""

from __future__ import annotations

import random
import sys
from typing import Annotated

from pydantic import Field

from mtl_dist.training.callbacks import Callback, Moment, Standing


class Watching(Callback):
    """Writes down every moment, and draws random numbers, which are nobody else's."""

    def start(self, standing: Standing) -> None:
        self.note("start", standing)

    def evaluation_end(self, standing: Standing) -> None:
        self.note("evaluation_end", standing)

    def epoch_end(self, standing: Standing) -> None:
        self.note("epoch_end", standing)

    def end(self, standing: Standing) -> None:
        self.note("end", standing)

    def note(self, moment: Moment, standing: Standing) -> None:
        import torch

        torch.rand(3)
        random.random()
        splits = sorted({name.rpartition("/")[0].partition("/")[0] for name in standing.metrics})
        with (standing.directory / "moments.txt").open("a") as file:
            file.write(" ".join([moment, str(standing.step), *splits]) + "\n")


class Failing(Callback):
    """Fails at the end of an epoch, in one of several ways."""

    def __init__(self, how: Annotated[str, Field(pattern="raises|exits|returns|writes")]) -> None:
        self.how = how

    def epoch_end(self, standing: Standing) -> None:
        if self.how == "raises":
            raise KeyError("room")
        if self.how == "exits":
            sys.exit(3)
        if self.how == "writes":
            standing.metrics["train/loss"] = 0.0  # type: ignore[index]
        return True  # type: ignore[return-value]


class Unmade(Callback):
    def __init__(self) -> None:
        raise RuntimeError("no such room")
