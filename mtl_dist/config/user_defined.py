"""User-defined parts: a class of the user's in place of a built-in one, named by its import path.

    loss: {kind: my_project.losses.Tversky, alpha: 0.3}
    loss: my_project.losses.Tversky                        the same with its defaults

A setting that takes user-defined parts is annotated with `UserDefined`. The class is imported (the working
directory counts) and held against what the setting needs. The arguments of its constructor are its settings,
by their annotations and defaults; those that the package provides are passed to it where it names them. A
class of settings, derived from the setting's own, does as well and is taken as it is.

Classes of torch, torchmetrics and torchvision are written for no recipe: an argument that is a tensor is
stated as a list of numbers, a dtype by its name, and one that a recipe cannot state keeps its default.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from pydantic import (
    BaseModel,
    GetCoreSchemaHandler,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic_core import CoreSchema, InitErrorDetails, core_schema

from mtl_dist.config.nearest import nearest
from mtl_dist.config.settings import Settings
from mtl_dist.config.trust import refusal
from mtl_dist.config.user_modules import remember
from mtl_dist.lazy import torch

USER_DEFINED, BUILT_IN = "user-defined", "built-in"
"""What pydantic's locations say after a setting that takes user-defined parts."""

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_MOST_NAMES = 12
_LIBRARIES = ("torch", "torchmetrics", "torchvision")


class PartError(ValueError):
    """Why an import path is no part that fits; `value_error` to pydantic."""


class UserDefinedSettings(Settings):
    """The settings of a user-defined part: a setting derives a class, and each part's is derived from it."""

    part_base: ClassVar[str]
    """Of what the part must be a subclass, as an import path, so that nothing is imported before its time."""
    provides: ClassVar[tuple[str, ...]] = ()
    """What the setting passes to a constructor that names it."""
    settings_base: ClassVar[type[Settings] | None] = None
    """Of what a class of settings must be a subclass to be taken in the part's place, if the setting does."""
    part_class: ClassVar[Any]
    """The user's class."""
    arguments: ClassVar[tuple[str, ...]]
    """The arguments of its constructor."""

    @property
    def path(self) -> str:
        """The import path."""
        return f"{self.part_class.__module__}.{self.part_class.__qualname__}"

    @classmethod
    def settings_for(cls, part: Any, key: str, path: str) -> type[Settings]:
        """The settings of a part that fits the setting: its constructor's arguments."""
        return _derived(part, cls, key, path)

    def make(self, **provided: Any) -> Any:
        """The part, from these settings and what it names of `provided`."""
        stated = {name: getattr(self, name) for name in self.arguments if name in type(self).model_fields}
        values = {**stated, **{name: value for name, value in provided.items() if name in self.arguments}}
        if not _is_library(self.part_class):
            return self.part_class(**values)
        hints = _hints(self.part_class)
        return self.part_class(**{name: _read(value, hints.get(name)) for name, value in values.items()})


@dataclass(frozen=True)
class UserDefined:
    """Marks a setting, in `Annotated`: besides what is built in, a value may be a user-defined part.

    `kinds` are the settings of each kind of part that fits; the first whose base the part is derived from
    holds. `key` is the key of the import path. With `only` nothing is built in. `names` are short names of
    classes of the package that are made as user-defined parts are. What is built in may stand by one of the
    names in `bare`, as they do, which gives its settings.
    """

    kinds: tuple[type[UserDefinedSettings], ...]
    key: str = "kind"
    only: bool = False
    names: Mapping[str, str] = field(default_factory=dict, hash=False)
    bare: Mapping[str, Callable[[], Settings]] = field(default_factory=dict, hash=False)

    def path_in(self, value: Any) -> str | None:
        """The import path, or the short name, in the data of a setting, if it states a user-defined part."""
        path = value.get(self.key) if isinstance(value, dict) else value
        if isinstance(path, str) and (
            path in self.names or _IMPORT_PATH.fullmatch(path) or (self.only and path)
        ):
            return path
        return None

    def settings_class(self, path: str) -> type[Settings]:
        """The settings of the class at `path`.

        Raises:
            PartError: there is none, or it does not fit the setting.
        """
        found = imported(self.names.get(path, path), self._fits)
        for kind in self.kinds:
            if kind.settings_base is not None and _is_subclass(found, kind.settings_base):
                return named(found, self.key, path)
            if _is_subclass(found, _attribute(kind.part_base)):
                return kind.settings_for(found, self.key, path)
        wanted = " or ".join(kind.part_base for kind in self.kinds)
        what = "another class" if inspect.isclass(found) else f"a {type(found).__name__}"
        raise PartError(f"expected a subclass of {wanted}, found {path}, {what}.")

    def _fits(self, value: object) -> bool:
        return any(_is_subclass(value, _attribute(kind.part_base)) for kind in self.kinds)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        own = core_schema.no_info_plain_validator_function(self._validated)
        return core_schema.tagged_union_schema(
            {USER_DEFINED: own, BUILT_IN: handler(source)},
            self._tag,
            serialization=core_schema.plain_serializer_function_ser_schema(_dumped, info_arg=True),
        )

    def _tag(self, value: Any) -> str:
        bare = bool(self.bare) and isinstance(value, str)
        stated = self.only or bare or self._is_user_defined(value) or self.path_in(value)
        return USER_DEFINED if stated else BUILT_IN

    def _is_user_defined(self, value: Any) -> bool:
        """Whether a value is the settings of a user-defined part."""
        return isinstance(value, Settings) and self.path_in(getattr(value, self.key, None)) is not None

    def _validated(self, value: Any) -> Any:
        if self._is_user_defined(value):
            return value
        path = self.path_in(value)
        if path is None and self.bare:
            if value in self.bare:
                return self.bare[value]()
            known = [*self.bare, *self.names]
            near = nearest(value, known)
            hint = f"Did you mean {near}?" if near else "Correct it."
            raise ValueError(
                f"expected {', '.join(known)} or an import path, found {json.dumps(value)}. {hint}"
            )
        if path is None:
            raise ValueError(
                f"expected {{{self.key}: IMPORT.PATH.OF.A.CLASS}}, found {json.dumps(value, default=str)}."
            )
        try:
            settings = self.settings_class(path)
            data = {**value, self.key: path} if isinstance(value, dict) else {self.key: path}
            # In JSON mode, because there strict still lets a list fill a tuple.
            return settings.model_validate_json(json.dumps(data))
        except PartError as error:
            mistake = InitErrorDetails(
                type="value_error", loc=(path, self.key), input=path, ctx={"error": error}
            )
            raise ValidationError.from_exception_data(path, [mistake]) from None
        except ValidationError as error:
            # With the path in the locations, by which the lines about them find its settings again.
            details = [
                InitErrorDetails(
                    type=detail["type"],
                    loc=(path, *detail["loc"]),
                    input=detail["input"],
                    ctx=detail.get("ctx", {}),
                )
                for detail in error.errors(include_url=False)
            ]
            raise ValidationError.from_exception_data(path, details) from None


def imported(path: str, fits: Any = None, what: str = "class") -> Any:
    """What is at an import path: `my_project.losses.Tversky`.

    `fits` says what might have been meant, and `what` of which sort, for the line about a name that is not
    there.

    Raises:
        PartError: no such module, none that can be imported, or nothing of that name in it.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise PartError(f"expected an import path such as my_project.module.{path}, found {path}.")
    refused = refusal(path)
    if refused:
        raise PartError(refused)
    before = set(sys.modules)
    module = _module(module_name)
    remember({module_name} | (sys.modules.keys() - before))
    if not hasattr(module, name):
        names = [key for key, value in vars(module).items() if fits is None or fits(value)]
        near = nearest(name, names)
        hint = f"Did you mean {near}?" if near else f"There are {', '.join(names[:_MOST_NAMES]) or 'none'}."
        raise PartError(f"expected a {what} {name} in {module_name}, found none. {hint}")
    return getattr(module, name)


def _module(name: str) -> ModuleType:
    here = os.getcwd()
    # As `python -m` has it. On a cluster the working directory is in the path already, perhaps by another
    # name, behind the snapshot.
    if all(os.path.realpath(place) != here for place in sys.path):
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise PartError(f"{name} cannot be imported: {error}. Install what it needs.") from error
        parent, _, last = error.name.rpartition(".")
        places = list(importlib.import_module(parent).__path__) if parent else [here]
        near = nearest(last, [module for place in places for module in _modules_in(Path(place))])
        meant = f"{parent}.{near}" if parent else near
        hint = f"Did you mean {meant}?" if near else "Start where it lies, or install it."
        raise PartError(
            f"expected a module {error.name}, found none in {parent or here}"
            f"{'' if parent else ' or among the installed packages'}. {hint}"
        ) from None
    except Exception as error:  # whatever a module of the user's raises while it is imported
        raise PartError(
            f"{name} cannot be imported: {type(error).__name__}: {error}{line_of(error)}."
        ) from error


def _modules_in(directory: Path) -> Iterator[str]:
    for entry in directory.iterdir():
        if entry.suffix == ".py" or (entry.is_dir() and entry.name.isidentifier()):
            yield entry.stem


def line_of(error: BaseException) -> str:
    """Where the user's own code failed."""
    if isinstance(error, SyntaxError):
        return ""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename
    ]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


@lru_cache
def _attribute(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module_name), name)


def _is_subclass(value: object, base: type) -> bool:
    return inspect.isclass(value) and issubclass(value, base) and value is not base


@lru_cache
def named(settings: type[Settings], key: str, path: str) -> type[Settings]:
    """A class of settings of the user's, named by its path."""
    return _create(settings, path, {key: (Literal[path], path)})


@lru_cache
def _derived(part: type, base: type[UserDefinedSettings], key: str, path: str) -> type[UserDefinedSettings]:
    """Settings from the arguments of a part's constructor."""
    missing = sorted(getattr(part, "__abstractmethods__", ()))
    if missing:
        raise PartError(f"expected {', '.join(missing)} defined in {path}, found none.")
    arguments = _arguments(part)
    try:
        hints = _hints(part)
    except NameError as error:
        raise PartError(f"expected annotations that can be read in {path}, found: {error}.") from None
    fields: dict[str, Any] = {key: (Literal[path], path)}
    for argument in arguments:
        name = argument.name
        if name in base.provides:
            continue
        if _is_library(part):
            if _can_be_stated(argument, hints, key):
                hints[name] = _statable(hints.get(name, Any))
            elif argument.default is not argument.empty:
                continue
        if name not in hints:
            raise PartError(f"expected an annotation of the argument {name} of {path}, found none.")
        if hasattr(Settings, name) or name.startswith("_") or name == key:
            raise PartError(f"expected another name for the argument {name} of {path}, which has a meaning.")
        default = ... if argument.default is argument.empty else argument.default
        fields[name] = (hints[name], default)
    derived = _create(base, path, fields)
    derived.part_class = part
    derived.arguments = tuple(argument.name for argument in arguments)
    return derived


def _constructor(part: type) -> Any:
    """`__init__`, or `__new__` of a class that makes objects of another one (torchmetrics' `Accuracy`)."""
    made_by_new = "__new__" in vars(part) and _is_library(part)
    return part.__new__ if made_by_new else part.__init__  # type: ignore[misc]


def _arguments(part: type) -> Sequence[inspect.Parameter]:
    parameters = list(inspect.signature(_constructor(part)).parameters.values())[1:]
    return [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def _hints(part: type) -> dict[str, Any]:
    return get_type_hints(_constructor(part), include_extras=True)


def _is_library(part: type) -> bool:
    return part.__module__.partition(".")[0] in _LIBRARIES


def _can_be_stated(argument: inspect.Parameter, hints: Mapping[str, Any], key: str) -> bool:
    """Whether a recipe may say it: a library's own deprecated arguments have no annotation."""
    if argument.name not in hints or argument.name == key or hasattr(Settings, argument.name):
        return False
    default = argument.default
    return default is argument.empty or isinstance(default, Enum) or _is_plain(default)


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _statable(hint: Any) -> Any:
    """An annotation as it is; that of anything where pydantic does not know it (tensors, numbers.Number)."""
    try:
        TypeAdapter(hint)
    except PydanticUserError:
        return Any
    return hint


def _read(value: Any, hint: Any) -> Any:
    """What a recipe states of a library's argument, as the library takes it."""
    kinds = {getattr(kind, "__name__", "") for kind in (get_args(hint) or (hint,))}
    if isinstance(value, list | tuple) and "Tensor" in kinds:
        return torch.tensor(value)
    if isinstance(value, str) and "dtype" in kinds:
        return getattr(torch, value)
    return value


def _create(base: Any, path: str, fields: dict[str, Any]) -> Any:
    try:
        return create_model(path.rpartition(".")[2], __base__=base, __module__=base.__module__, **fields)
    except PydanticUserError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise PartError(
            f"expected arguments of {path} that a recipe can state (numbers, text, lists, mappings), "
            f"found: {reason}."
        ) from None


def _dumped(value: Any, info: core_schema.SerializationInfo) -> Any:
    return value.model_dump(mode=info.mode) if isinstance(value, BaseModel) else value
