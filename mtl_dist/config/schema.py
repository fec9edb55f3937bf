"""What a settings class accepts, place by place: the walk that loading and error lines share.

A node is one place for a value: a field, an entry of a mapping, an item of a list. The data of a recipe and
pydantic's errors are both followed downwards through nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mtl_dist.config.user_defined import PartError, UserDefined


@dataclass(frozen=True)
class SchemaNode:
    """One place for a value: its type, its constraints, the key that selects its variant, its field."""

    type: Any
    constraints: tuple[Any, ...] = ()
    discriminator: str | None = None
    field: FieldInfo | None = None

    @property
    def takes_null(self) -> bool:
        return self.type in (None, NoneType, Any) or NoneType in get_args(self.type)

    @property
    def members(self) -> list[SchemaNode]:
        """What a value may be besides null: one node, or several in a union."""
        if get_origin(self.type) not in (Union, UnionType):
            return [self]
        return [node_of(member, self.constraints) for member in get_args(self.type) if member is not NoneType]

    @property
    def model(self) -> type[BaseModel] | None:
        """The settings class that fills the node, if it is one."""
        return self.type if isinstance(self.type, type) and issubclass(self.type, BaseModel) else None

    @property
    def choices(self) -> list[Any]:
        """The values of a Literal, and the short names of parts that are made as user-defined ones are."""
        if get_origin(self.type) is not Literal:
            return []
        own = self.user_defined
        return [*get_args(self.type), *(own.names if own is not None else ())]

    @property
    def user_defined(self) -> UserDefined | None:
        """Which user-defined parts the node takes, if any."""
        return next((each for each in self.constraints if isinstance(each, UserDefined)), None)

    def user_variant(self, path: str) -> SchemaNode | None:
        """The node of the settings of the user-defined part at `path`; None where that is none."""
        try:
            return None if self.user_defined is None else SchemaNode(self.user_defined.settings_class(path))
        except PartError:
            return None

    @property
    def default(self) -> Any:
        """What the field holds when the recipe says nothing; None too where there is no default."""
        if self.field is None or self.field.is_required():
            return None
        return self.field.get_default(call_default_factory=True, validated_data={})

    def without_null(self) -> SchemaNode:
        """The node of `X` for a node of `X | None`."""
        members = self.members
        if self.discriminator is not None or len(members) != 1 or members[0] is self:
            return self
        return replace(members[0], field=self.field)

    def variants(self) -> dict[str, SchemaNode]:
        """The members of a discriminated union by their kind."""
        if self.discriminator is None:
            return {}
        return {
            str(kind): member
            for member in self.members
            if member.model is not None
            for kind in get_args(member.model.model_fields[self.discriminator].annotation)
        }

    def child(self, key: str | int) -> SchemaNode | None:
        """The node of a field by its name, of any entry of a mapping, or of an item by its index."""
        if self.model is not None:
            field = self.model.model_fields.get(str(key))
            return None if field is None else node_of_field(field)
        arguments = get_args(self.type)
        if is_mapping(self.type) and len(arguments) == 2:
            return node_of(arguments[1])
        if not is_list(self.type) or not arguments or not isinstance(key, int):
            return None
        if get_origin(self.type) is tuple and Ellipsis not in arguments:
            return node_of(arguments[key]) if key < len(arguments) else None
        return node_of(arguments[0])


def node_of_field(field: FieldInfo) -> SchemaNode:
    """The node of a field of a settings class."""
    node = node_of(field.annotation, tuple(field.metadata))
    named = field.discriminator if isinstance(field.discriminator, str) else node.discriminator
    return replace(node, discriminator=named, field=field)


def node_of(annotation: Any, constraints: tuple[Any, ...] = ()) -> SchemaNode:
    """The node of an annotation, its `Annotated` taken apart."""
    if get_origin(annotation) is not Annotated:
        return SchemaNode(annotation, constraints)
    inner, *extras = get_args(annotation)
    discriminator = None
    for extra in extras:
        if isinstance(extra, FieldInfo):
            constraints = (*constraints, *extra.metadata)
            discriminator = extra.discriminator if isinstance(extra.discriminator, str) else discriminator
        else:
            constraints = (*constraints, extra)
    node = node_of(inner, constraints)
    return replace(node, discriminator=discriminator or node.discriminator)


def is_mapping(annotation: Any) -> bool:
    """Whether a mapping fills a node of this type (a settings class is not meant)."""
    origin = get_origin(annotation) or annotation
    return isinstance(origin, type) and issubclass(origin, Mapping)


def is_list(annotation: Any) -> bool:
    """Whether a list in YAML fills a node of this type."""
    origin = get_origin(annotation) or annotation
    return (
        isinstance(origin, type)
        and issubclass(origin, Sequence | set | frozenset)
        and not issubclass(origin, str)
    )
