"""`mtl prepare NAME ...`: a command for each importer, made from its annotated settings."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from mtl_dist.commands.errors import Listing
from mtl_dist.commands.options import named, words
from mtl_dist.commands.progress import progress_bar
from mtl_dist.errors import UserError
from mtl_dist.importers.registry import IMPORTERS
from mtl_dist.printable import say

if TYPE_CHECKING:
    from mtl_dist.data.manifest import Manifest
    from mtl_dist.importers.options import PackOptions

SOURCE, LABELS = "source", "labels"
_SHARD_OPTIONS = ("shard_samples", "shard_bytes")
_CONVERTING = ("bits", "channels", "masks_as")
"""The options that change what is stored, of importers that encode images again."""


class ImporterGroup(Listing):
    """The importers as commands: the built-in ones, and any class by its import path."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(IMPORTERS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in IMPORTERS or "." in cmd_name:
            return command_of(cmd_name)
        return None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.get_command = _listed  # type: ignore[method-assign]  # imports nothing
        super().format_help(ctx, formatter)


app = typer.Typer(cls=ImporterGroup, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _prepare() -> None:
    """Pack images and labels into shards: plain WebDataset tars, an index and dataset.json.

    A directory that exists and is not empty is refused. Any sample may lack any label. An importer of
    yours is named by its import path; docs/extend.md shows one.

    \b
      mtl prepare digits data/digits
      mtl prepare folders photos/ data/breeds --task breed
      mtl prepare table labels.csv data/skin --image file --classification diagnosis=dx
      mtl prepare my_project.importers.Scans data/scans folder=/mnt/scans every=2
    """


def _listed(ctx: Any, cmd_name: str) -> Any:
    """A command as the list of commands wants it: nothing is imported."""

    def command() -> None: ...

    command.__doc__ = IMPORTERS[cmd_name].summary
    return _made(command, cmd_name)


def _made(function: Callable[..., None], name: str) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name)(function)
    return typer.main.get_command(app)


def command_of(name: str) -> Any:
    """The command of an importer: its settings as options, then those that all importers share.

    Raises:
        UserError: no importer there.
    """
    from mtl_dist.importers.options import PackOptions
    from mtl_dist.importers.road import importer_class, takes_labels

    importer = importer_class(name)
    built_in = name in IMPORTERS
    labelled = takes_labels(importer)
    own: list[Setting] = []
    if built_in:
        hints = get_type_hints(importer.__init__, include_extras=True)
        for argument in list(inspect.signature(importer.__init__).parameters.values())[1:]:
            label = labelled and argument.name == LABELS
            own += _settings(argument.name, hints[argument.name], argument.default, label)
    hints = get_type_hints(PackOptions, include_extras=True)
    shared = [
        setting
        for each in fields(PackOptions)
        if each.name not in _SHARD_OPTIONS and (importer.verify or each.name != "verify")
        if importer.repacks or each.name not in _CONVERTING
        for setting in _settings(each.name, hints[each.name], each.default)
    ]
    arguments = [setting for setting in own if setting.is_argument]
    arguments.append(Setting("out", _argument(str, "OUT", "The new dataset's directory."), is_argument=True))
    if not built_in:
        given = _argument(list[str] | None, "NAME=VALUE", "Arguments of its constructor.")
        arguments.append(Setting("given", given, None, is_argument=True))
    ordered = [*arguments, *(setting for setting in own if not setting.is_argument), *shared]

    def command(**values: Any) -> None:
        packing = PackOptions(**{each.name: each.read(values[each.name]) for each in shared})
        settings = _arguments(values["given"] or ()) if not built_in else _values(own, values)
        _run(name, Path(values["out"]), settings, packing)

    command.__doc__ = inspect.cleandoc(importer.__doc__ or "An importer of yours.")
    command.__signature__ = inspect.Signature([setting.parameter for setting in ordered])  # type: ignore[attr-defined]
    command.__annotations__ = {setting.name: setting.annotation for setting in ordered}
    return _made(command, name)


def _values(settings: Sequence[Setting], values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given, as the importer takes them; labels of all kinds are one setting."""
    found = {
        each.name: each.read(values[each.name])
        for each in settings
        if not each.kind and values[each.name] not in (None, [])
    }
    kinds = [each for each in settings if each.kind]
    if not kinds:
        return found
    labels: dict[str, str] = found.get(LABELS, {})
    for each in kinds:
        for task, column in named(f"--{each.kind}", values[each.name]).items():
            if task in labels:
                raise UserError(f"tasks: expected each name once, found {task!r} twice.")
            labels[task] = f"{each.kind}:{column}"
    if labels:
        found[LABELS] = _in_order_of_kinds(labels)
    return found


def _run(name: str, out: Path, settings: Mapping[str, Any], options: PackOptions) -> None:
    from mtl_dist.importers import run

    with progress_bar("pack") as show:
        manifest = run(name, out, settings, options, show)
    summary(out, manifest)


def _in_order_of_kinds(labels: Mapping[str, str]) -> dict[str, str]:
    """The tasks by kind, as the registry has them: the order of their options does not matter."""
    from mtl_dist.kinds.registry import KINDS

    order = list(KINDS)

    def rank(task: str) -> int:
        kind = labels[task].partition(":")[0]
        return order.index(kind) if kind in order else len(order)

    return {task: labels[task] for task in sorted(labels, key=rank)}


def _arguments(given: Sequence[str]) -> dict[str, Any]:
    """The arguments `name=value` of a user-defined importer.

    Raises:
        UserError: one has another form.
    """
    from mtl_dist.config.overrides import apply_overrides

    data: dict[str, Any] = {}
    _, mistakes = apply_overrides(data, given)
    if mistakes:
        raise UserError("\n".join(line for _, line in mistakes))
    return data


# ---------------------------------------------------------------- from annotations to parameters
@dataclass(frozen=True)
class Setting:
    """One parameter of a command: its name, what typer knows of it, and how its value is read.

    `kind` is that of a short form such as --regression TASK=COLUMN.
    """

    name: str
    annotation: Any
    default: Any = inspect.Parameter.empty
    read: Callable[[Any], Any] = lambda value: value
    is_argument: bool = False
    kind: str = ""

    @property
    def parameter(self) -> inspect.Parameter:
        """The parameter of a function with this setting."""
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=self.annotation
        )


def _settings(name: str, hint: Any, default: Any, is_labels: bool = False) -> list[Setting]:
    """The parameters for one annotated setting; labels of any kind have one more for each kind there is."""
    from mtl_dist.importers.options import Help, Split
    from mtl_dist.kinds.registry import KINDS

    metadata = getattr(hint, "__metadata__", ())
    help_of = next((each for each in metadata if isinstance(each, Help)), Help(""))
    annotation = hint.__origin__ if metadata else hint
    option = f"--{help_of.option or name.replace('_', '-')}"
    missing = inspect.Parameter.empty if default is inspect.Parameter.empty else None
    if name == SOURCE:
        kind = list[str] if get_origin(annotation) is tuple else str
        return [Setting(name, _argument(kind, help_of.metavar or "SRC", help_of.text), is_argument=True)]
    if is_labels:
        several = list[str] | None
        of_fields = help_of.metavar.endswith("FIELD")
        short = [
            Setting(
                f"of_{kind.name}",
                _option(
                    several,
                    f"--{kind.name}",
                    f"TASK={'EXT' if kind.is_map else 'FIELD'}" if of_fields else kind.metavar,
                    kind.help,
                ),
                None,
                kind=kind.name,
            )
            for kind in KINDS.values()
        ]
        return [*short, Setting(name, _option(several, option, help_of.metavar, help_of.text), None, _labels)]
    if annotation == Split:
        return [Setting(name, _option(str | None, option, help_of.metavar, help_of.text), None)]
    plain = [each for each in get_args(annotation) if each is not types.NoneType]
    if get_origin(annotation) in (Union, types.UnionType) and len(plain) == 1:
        annotation = plain[0]
    origin = get_origin(annotation) or annotation
    if origin is dict:
        what = help_of.metavar.partition("=")[2] or "VALUE"
        made = _option(list[str] | None, option, help_of.metavar or "NAME=VALUE", help_of.text)
        return [Setting(name, made, None, lambda texts: named(option, texts, what))]
    if origin is tuple:
        item = get_args(annotation)[0]
        made = _option(str if missing else str | None, option, help_of.metavar or "VALUE,...", help_of.text)
        empty = default if isinstance(default, tuple) else None
        return [
            Setting(name, made, missing, lambda text: empty if text is None else _items(option, text, item))
        ]
    if annotation is bool:
        made = _option(bool, f"{option}/--no-{option[2:]}", "", help_of.text)
        return [Setting(name, made, default)]
    if annotation in (int, float):
        made = _option(
            annotation | None if default is None else annotation, option, help_of.metavar, help_of.text
        )
        return [Setting(name, made, default)]
    choices = "|".join(get_args(annotation)) if origin is Literal else help_of.metavar
    shown = default if isinstance(default, str) and default else missing
    made = _option(str if shown is not None else str | None, option, choices, help_of.text)
    return [Setting(name, made, shown, lambda text: "" if text is None else text)]


def _argument(kind: Any, metavar: str, text: str) -> Any:
    return Annotated[kind, typer.Argument(metavar=metavar, help=text, show_default=False)]


def _option(kind: Any, option: str, metavar: str, text: str) -> Any:
    return Annotated[kind, typer.Option(option, metavar=metavar or None, help=text)]


def _labels(texts: Sequence[str]) -> dict[str, str]:
    """`KIND:TASK=COLUMN` by task, as `KIND:COLUMN`."""
    labels = {}
    for text in texts:
        kind, colon, rest = text.partition(":")
        task, equals, column = rest.partition("=")
        if not (kind and colon and task and equals and column):
            raise UserError(f'--label: expected KIND:TASK=COLUMN, found "{text}".')
        if task in labels:
            raise UserError(f"tasks: expected each name once, found {task!r} twice.")
        labels[task] = f"{kind}:{column}"
    return labels


def _items(option: str, text: str, item: type) -> list[Any]:
    """The items of a text with commas."""
    try:
        return [item(word) for word in words(option, text)]
    except ValueError:
        raise UserError(f'{option}: expected numbers with commas between them, found "{text}".') from None


def summary(out: Path, manifest: Manifest) -> None:
    """What has been made, in a few lines."""
    from mtl_dist.data.inspect import account_lines

    splits = ", ".join(f"{split.num_samples:,} {name}" for name, split in manifest.splits.items())
    tasks = ", ".join(f"{name} ({info.kind})" for name, info in manifest.tasks.items())
    say(f"{out}: {splits}; {tasks}")
    for line in account_lines(manifest.account):
        say(f"found: {line}")
    for note in manifest.notes:
        say(f"note: {note}")
    say(f"Look at it with: mtl inspect {out}")
