"""What a run says and records while it trains, handed to every sink. Nothing is drawn here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from rich.console import Console

from mtl_dist.printable import printable
from mtl_dist.status import Status, write_status
from mtl_dist.tracking.sink import Row, Sink, SkippedStep


class Tracker:
    """Rank 0's records; on the other ranks (`directory` None) every call does nothing.

    A record is not worth a run: a sink that raises is reported once and switched off, a status.json that
    cannot be written is reported once.
    """

    def __init__(
        self,
        directory: Path | None,
        sinks: Mapping[str, Sink] | None = None,
        console: Console | None = None,
        lines: Sequence[str] = (),
        ended: bool = False,
    ) -> None:
        self.directory = directory
        self.lines = lines
        """Those of metrics.jsonl so far, also where the disk no longer takes them."""
        self._ended = ended
        """Whether an earlier start came to this very end, and gave out its results and pictures."""
        self.console = console or plain_console()
        self._sinks = dict(sinks or {})
        self._status_failed = False

    def say(self, text: str) -> None:
        """A line for people: on the terminal and in log.txt."""
        if self.directory is None:
            return
        text = "\n".join(map(printable, text.split("\n")))
        with suppress(OSError):  # the terminal was closed
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._each(lambda sink: sink.text(text))

    def attach(self, name: str, sink: Sink) -> None:
        """One more sink, from now on."""
        self._sinks[name] = sink

    def detach(self, name: str) -> None:
        """Without this sink, from now on."""
        self._sinks.pop(name, None)

    def record(self, kind: str, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """One row for every sink."""
        row = Row(kind, step, epoch, time.time(), metrics)
        self._each(lambda sink: sink.row(row))

    def skipped(self, skipped: SkippedStep) -> None:
        """A step that was not finite, for every sink."""
        self._each(lambda sink: sink.skipped(skipped))

    def pictures(self, paths: Sequence[Path], step: int) -> None:
        """The PNGs of the run, when it has ended, each by its file's name."""
        for path in paths if not self._ended else ():
            self._each(partial(_show, path, step))

    def results(self, metrics: Mapping[str, float], step: int) -> None:
        """The metrics of the best weights, when the run has ended."""
        if not self._ended:
            self._each(lambda sink: sink.results(metrics, step))

    def status(self, status: Status) -> None:
        """Say in status.json where the run stands."""
        if self.directory is None:
            return
        try:
            write_status(self.directory, status)
        except OSError as error:
            if not self._status_failed:
                self.say(f"warning  status.json cannot be written, training goes on: {error}")
            self._status_failed = True

    def close(self) -> None:
        self._each(lambda sink: sink.close())
        self._sinks.clear()

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                call(sink)
            except Exception as error:  # whatever a library, a disk or a network raises
                del self._sinks[name]
                self.say(switched_off(name, error))


class _RunConsole(Console):
    """What is printed to may go (`| head`, a `tee` that is killed): rich would end the program, the run goes
    on, and log.txt has its lines."""

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):
            super().on_broken_pipe()


def plain_console() -> Console:
    """The terminal; in a notebook one for plain lines, where rich would make an HTML block of each."""
    console = _RunConsole()
    return _RunConsole(force_jupyter=False, force_terminal=False) if console.is_jupyter else console


def _show(path: Path, step: int, sink: Sink) -> None:
    sink.picture(path.stem, path, step)


def switched_off(name: str, error: Exception) -> str:
    """The line about a sink that failed."""
    reason = " ".join(str(error).split())
    return (
        f"warning  tracking by {name} failed and is switched off, training goes on: "
        f"{type(error).__name__}{': ' if reason else ''}{reason}"
    )
