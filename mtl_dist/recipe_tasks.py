"""Tasks that a recipe leaves to its data: their kinds, and all those that it does not name.

    tasks: {breed: {weight: 0.5}}              one task; its kind is the data's
    tasks: {breed: {weight: 0.5}, "*": {}}     all tasks of the data, and one change
    tasks: {"*": {weight: 2}, age: null}       all but one, each with this weight
    tasks: {mask: {optional: true}, ...}       learnt where the data has it

Without `tasks`, or with null, all are learnt; an override such as `tasks.breed.weight=0.5` then changes one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from mtl_dist.config.errors import Location, Mistake, suggest
from mtl_dist.specs import TaskInfo

OTHERS = "*"
"""The entry of `tasks` that stands for every task of the data that has none of its own."""

TaskInfos = Callable[[], Mapping[str, TaskInfo]]


def with_tasks_of_the_data(
    data: Mapping[str, Any], added: Collection[Location], task_infos: TaskInfos
) -> tuple[dict[str, Any], list[Mistake]]:
    """A recipe's data with every task that it means, each with its kind; and what is wrong with their names.

    `added` are the entries that only overrides made. `task_infos`, what the datasets know of their tasks, is
    asked for only where the recipe leaves something to them.
    """
    stated = data.get("tasks")
    if stated is not None and not isinstance(stated, Mapping):
        return dict(data), []
    tasks: dict[str, Any] = dict(stated or {})
    with_others = stated is None or OTHERS in tasks
    if tasks and all(("tasks", name) in added for name in tasks):
        with_others = True
    if not with_others and all(map(_is_complete, tasks.values())):
        return dict(data), []
    known = task_infos()
    others = tasks.pop(OTHERS, None) or {}
    mistakes: list[Mistake] = []
    for name, entry in tasks.items():
        is_left_to_data = (with_others and entry is None) or not _is_complete(entry)
        if name not in known and is_left_to_data and not _is_optional(entry):
            wanted = "a task of the data to take out" if entry is None else "a task of the training data"
            advice = suggest(name, known, "Tasks in the data")
            mistakes.append((("tasks", name), f"tasks.{name}: expected {wanted}, found none such. {advice}"))
    absent = [name for name, entry in tasks.items() if name not in known and _is_optional(entry)]
    # In the order of the data, so that one change of a task changes nothing else.
    names = dict.fromkeys([*(known if with_others else ()), *tasks])
    wrong = {location[-1] for location, _ in mistakes}
    filled = {
        name: _filled(tasks.get(name, others), known.get(name))
        for name in names
        if name not in absent and name not in wrong and not (with_others and tasks.get(name, {}) is None)
    }
    result = {**data, "tasks": filled}
    if absent:
        result["absent_tasks"] = absent
        _take_out(result, "optim", "task_lr", absent)
        _take_out(result, "model", "heads", absent)
    return result, mistakes


def _is_complete(entry: Any) -> bool:
    """Whether an entry of `tasks` says all that the data could."""
    return not isinstance(entry, Mapping) or ("kind" in entry and not _is_optional(entry))


def _is_optional(entry: Any) -> bool:
    return isinstance(entry, Mapping) and entry.get("optional") is True


def _filled(entry: Any, info: TaskInfo | None) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    kind = {} if info is None else {"kind": info.kind}
    stated = {key: value for key, value in entry.items() if key != "optional" or value is not True}
    return {**kind, **stated}


def _take_out(data: dict[str, Any], section: str, part: str, names: Collection[str]) -> None:
    """What the recipe says of these tasks elsewhere."""
    inner = data.get(section)
    if isinstance(inner, Mapping) and isinstance(inner.get(part), Mapping):
        kept = {name: value for name, value in inner[part].items() if name not in names}
        data[section] = {**inner, part: kept}
