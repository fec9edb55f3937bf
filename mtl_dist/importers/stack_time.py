"""The time of a frame as a target: since the experiment's start, or since an event that a class has.

infected      since the onset of infection, which `--onset infected=4` puts 4 hours after the start
uninfected    since the start, or absent: `--onset uninfected=absent`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mtl_dist.errors import UserError
from mtl_dist.importers.summary import listed
from mtl_dist.importers.tables import Row, read_labels
from mtl_dist.kinds.kind import Label
from mtl_dist.kinds.regression import Regression
from mtl_dist.kinds.words import Declared

ABSENT = "absent"
"""In place of an onset: samples of the class have no time."""


@dataclass(frozen=True)
class TimeTask:
    """A regression task `task`: page number x `interval`, minus the onset of the sample's class.

    `onsets` hold, by class, a time after the start, a column of the table (such as infection_onset_hour), or
    `absent`. Other classes count from the start. Without `onsets` all do.
    """

    task: str
    interval: float
    onsets: Mapping[str, str] = field(default_factory=dict)

    def values(
        self,
        frames: Sequence[int],
        cells: Sequence[Row],
        classes: Mapping[str, tuple[str, ...]],
        labels: Mapping[str, Sequence[Label | None]],
        columns: Sequence[str],
    ) -> tuple[list[Label | None], int]:
        """The time of each frame, and how many lie before their onset.

        A sample whose class is not known has no time where there are onsets.

        Raises:
            UserError: an interval that is not above 0, a class that no task or more than one has, an onset
                that is neither a number nor a column.
        """
        if not self.interval > 0:
            raise UserError(f"--interval: expected a number above 0, found {self.interval:g}.")
        task = self._task_of_onsets(classes)
        onset_of = {name: _onsets(name, text, cells, columns) for name, text in self.onsets.items()}
        times: list[Label | None] = []
        early = 0
        for i, frame in enumerate(frames):
            onset: float | None = 0.0
            if task is not None:
                label = labels[task][i]
                name = classes[task][label] if isinstance(label, int) else None
                onset = None if name is None else onset_of[name][i] if name in onset_of else 0.0
            time = None if onset is None else round(frame * self.interval - onset, 9)
            early += time is not None and time < 0
            times.append(time)
        return times, early

    def _task_of_onsets(self, classes: Mapping[str, tuple[str, ...]]) -> str | None:
        """The classification task whose classes the onsets name."""
        if not self.onsets:
            return None
        fitting = [task for task, names in classes.items() if set(self.onsets) <= set(names)]
        if len(fitting) == 1:
            return fitting[0]
        known = [name for names in classes.values() for name in names]
        raise UserError(
            f"--onset: expected classes of one classification task ({listed(known) or 'there is none'}), "
            f"found {', '.join(self.onsets)}."
        )


def _onsets(name: str, text: str, cells: Sequence[Row], columns: Sequence[str]) -> list[float | None]:
    """The onset for each sample if it is of this class."""
    if text == ABSENT:
        return [None] * len(cells)
    if text in columns:
        return read_labels(Regression.name, cells, text, Declared())[1]
    try:
        onset = float(text)
    except ValueError:
        raise UserError(
            f"--onset {name}: expected a number, {ABSENT}, or a column of the table "
            f"({listed(list(columns)) or 'there is none'}), found {text!r}."
        ) from None
    return [onset] * len(cells)
