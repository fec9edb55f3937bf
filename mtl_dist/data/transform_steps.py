"""What may stand in `data.transforms`, by import paths: steps of the user's, torchvision's transforms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from mtl_dist.config.user_defined import UserDefined, UserDefinedSettings
from mtl_dist.errors import UserError

if TYPE_CHECKING:
    from mtl_dist.data.transforms import ImageTransform


class UserTransformSettings(UserDefinedSettings):
    """A step of the user's."""

    part_base = "mtl_dist.data.transforms.ImageTransform"

    @property
    def only_trains(self) -> bool:
        """Whether evaluation and prediction leave it out."""
        training_only: bool = self.part_class.training_only
        return training_only


class LibraryTransformSettings(UserDefinedSettings):
    """A transform of `torchvision.transforms.v2` by its path, with its arguments."""

    part_base = "torchvision.transforms.v2.Transform"

    kind: str
    training_only: bool = True
    """Whether evaluation and prediction leave it out."""

    @property
    def only_trains(self) -> bool:
        return self.training_only

    def make(self, **provided: Any) -> ImageTransform:
        from mtl_dist.data.library_transforms import (
            LibraryTransform,  # torchvision, which settings do not need
        )

        where = f"data.transforms: {self.kind}"
        try:
            return LibraryTransform(super().make(**provided), where)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: expected arguments that fit it, found: {error}") from error


UserTransform: TypeAlias = Annotated[
    UserTransformSettings | LibraryTransformSettings,
    UserDefined((UserTransformSettings, LibraryTransformSettings), only=True),
]
