"""What several datasets know of the tasks, put together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mtl_dist.config.errors import suggest
from mtl_dist.data.derived import Derivation, DeriveSettings, OfImages, OfLabels, check_derived, derivations
from mtl_dist.data.manifest import LabelCounts, Manifest, PixelScale, SplitInfo, read_manifest
from mtl_dist.data.map_style import split_reader
from mtl_dist.data.remote import Location
from mtl_dist.data.settings import DataSettings
from mtl_dist.errors import UserError
from mtl_dist.kinds.registry import kind_of
from mtl_dist.plural import plural
from mtl_dist.specs import TaskInfo


@dataclass(frozen=True)
class SourceFacts:
    """One split of one dataset: where it lies, what its manifest says, what is derived from its labels."""

    path: Location
    manifest: Manifest
    split: str
    derived: Mapping[str, Derivation] = field(default_factory=dict)
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    _counted: dict[tuple[str, str], LabelCounts] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tasks(self) -> dict[str, TaskInfo]:
        """The stored tasks and the derived ones, with the facts that a recipe states."""
        tasks = self.manifest.tasks | {name: derivation.info for name, derivation in self.derived.items()}
        return {
            name: _restated(name, info, self.facts[name]) if name in self.facts else info
            for name, info in tasks.items()
        }

    def labels(self, task: str) -> LabelCounts:
        """The split's labels of one of its tasks."""
        if task in self.derived:
            if (task, self.split) not in self._counted:
                self._counted[task, self.split] = self._count(task, self.derived[task])
            return self._counted[task, self.split]
        return self.info.labels[task]

    def _count(self, task: str, derivation: Derivation) -> LabelCounts:
        if isinstance(derivation, OfLabels):
            return derivation.counts(
                self.info.labels[derivation.source],
                lambda: split_reader(self.path, self.manifest, self.split).column(derivation.source),
            )
        return derivation.counted(self.image_classes(task))

    def image_classes(self, task: str) -> np.ndarray:
        """The class of each sample of the split, -1 where it has none, for a task that is made of images."""
        from mtl_dist.data.derived_images import classes_of_images  # settings are read without torch

        derivation = self.derived[task]
        assert isinstance(derivation, OfImages)
        return classes_of_images(derivation, self.path, self.manifest, self.split)

    @property
    def info(self) -> SplitInfo:
        """What the manifest says of the split."""
        return self.manifest.splits[self.split]


def source_facts(
    path: Location,
    split: str,
    derive: Mapping[str, DeriveSettings] | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> SourceFacts:
    """The facts of a split of the dataset at `path`.

    Raises:
        UserError: no dataset there, no such split, or what is to be derived does not fit it.
    """
    manifest = read_manifest(path)
    if split not in manifest.splits:
        raise UserError(
            f"{path}: expected a split {split!r}, found none of this name. "
            f"{suggest(split, manifest.splits, 'It has')}"
        )
    return SourceFacts(path, manifest, split, derivations(derive or {}, manifest, path), facts or {})


def merge_task_infos(tasks: Collection[str], sources: Sequence[SourceFacts]) -> dict[str, TaskInfo]:
    """The facts of each task over all training sources: counts added, mean and deviation pooled.

    Raises:
        UserError: no source has the task, or two disagree on what it is; one line for each mistake.
    """
    task_infos: dict[str, TaskInfo] = {}
    problems: list[str] = []
    known = list(dict.fromkeys(name for source in sources for name in source.tasks))
    for task in tasks:
        having = [source for source in sources if task in source.tasks]
        if having:
            task_infos[task] = _merge(task, having)
            continue
        problems.append(
            f"tasks.{task}: expected a task of the training data, found none of that name. "
            f"{suggest(task, known, 'Tasks in the data')}"
        )
    problems += disagreements(task_infos, sources)
    if problems:
        raise UserError("\n".join(problems))
    return task_infos


def disagreements(task_infos: Mapping[str, TaskInfo], sources: Sequence[SourceFacts]) -> list[str]:
    """One line for each source and task that means something else there than `task_infos` say."""
    problems = []
    for source in sources:
        for task, expected in task_infos.items():
            found = source.tasks.get(task, expected)
            for what in ("kind", "classes", "unit"):
                wanted, has = getattr(expected, what), getattr(found, what)
                if wanted != has:
                    problems.append(
                        f"{source.path}: expected {_words(what, wanted)} for the task {task}, as in the "
                        f"first training source, found {_words(what, has)}. Prepare it again to match, or "
                        "leave it out."
                    )
                    break
            else:
                problems += [
                    f"{source.path}: expected {key} {expected.facts.get(key)!r} for the task {task}, as in "
                    f"the first training source, found {found.facts.get(key)!r}. Prepare it again to match, "
                    "or leave it out."
                    for key in kind_of(expected.kind).shared_facts
                    if expected.facts.get(key) != found.facts.get(key)
                ]
    return problems


def _words(what: str, value: str | tuple[str, ...]) -> str:
    if isinstance(value, tuple):
        return f"{plural(len(value), 'class', 'classes')} ({', '.join(value)})"
    return f"the {what} {value!r}"


def _merge(task: str, sources: Sequence[SourceFacts]) -> TaskInfo:
    task_infos = [source.tasks[task] for source in sources]
    counts = [source.labels(task) for source in sources]
    described = [info for info in task_infos if info.num_labelled > 0]
    merged = kind_of(task_infos[0].kind).merge(described) if described else task_infos[0]
    return replace(
        merged,
        num_labelled=sum(count.present for count in counts),
        class_counts=tuple(map(sum, zip(*(c.class_counts for c in counts if c.class_counts), strict=True))),
    )


def _restated(task: str, info: TaskInfo, stated: Mapping[str, Any]) -> TaskInfo:
    try:
        return kind_of(info.kind).restated(info, stated)
    except UserError as error:
        raise UserError(f"data.facts.{task}: {error}") from None


def _check_facts(facts: Mapping[str, Mapping[str, Any]], training: Sequence[SourceFacts]) -> None:
    """Refuse stated facts of no task, or that mean nothing to its kind.

    Raises:
        UserError: with the task.
    """
    known = {name: info for source in training for name, info in source.tasks.items()}
    for task in facts:
        if task not in known:
            raise UserError(
                f"data.facts.{task}: expected a task of the training data, found none of that name. "
                f"{suggest(task, known, 'Tasks in the data')}"
            )
        try:
            kind_of(known[task].kind).check_facts(known[task])
        except UserError as error:
            raise UserError(f"data.facts.{task}: {error}") from None


def pixel_scale(sources: Sequence[SourceFacts], channels: int) -> PixelScale | None:
    """Mean and deviation of each channel over the training sources; None if one was not measured."""
    found = [(source.manifest.pixels, source.info.num_samples) for source in sources]
    pixels = [facts for facts, _ in found if facts is not None]
    if len(pixels) < len(found):
        return None
    weights = np.array([number for _, number in found], float)[:, None]
    means, stds = (
        np.array([np.resize(row, channels) for row in rows])  # grey counts in each channel
        for rows in ([facts.mean for facts in pixels], [facts.std for facts in pixels])
    )
    mean = (weights * means).sum(axis=0) / weights.sum()
    std = np.sqrt((weights * (stds**2 + (means - mean) ** 2)).sum(axis=0) / weights.sum())
    return PixelScale(tuple(mean.tolist()), tuple(std.tolist()))


def tasks_in(settings: DataSettings) -> dict[str, TaskInfo]:
    """All tasks of the training datasets that `settings` names, derived ones included.

    Raises:
        UserError: a dataset or split is missing, or two disagree on a task.
    """
    training = training_facts(settings.with_absolute_paths(Path.cwd()))
    return merge_task_infos(
        list(dict.fromkeys(name for source in training for name in source.tasks)), training
    )


def training_facts(settings: DataSettings) -> list[SourceFacts]:
    """What the manifests of the training datasets say.

    Raises:
        UserError: a dataset or split is missing, or a derived task does not fit.
    """
    assert all(source.fields is None for source in settings.train), "external tars are indexed beforehand"
    training = [source_facts(s.location, s.split, settings.derive, settings.facts) for s in settings.train]
    check_derived(settings.derive, [source.manifest for source in training])
    _check_facts(settings.facts, training)
    return training
