"""What may stand in `data.transforms`, by import paths: steps of the user's, torchvision's transforms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from mtl_dist.config.user_defined import UserDefined, UserDefinedSettings
from mtl_dist.errors import UserError

if TYPE_CHECKING:
    from mtl_dist.data.transforms import BatchTransform, ImageTransform


Blend: TypeAlias = Literal["mixup", "cutmix"]


class UserTransformSettings(UserDefinedSettings):
    """A step of the user's."""

    part_base = "mtl_dist.data.transforms.ImageTransform"
    of_batches: ClassVar[bool] = False
    """Whether it acts on the images of a batch together."""
    blends: ClassVar[Blend | None] = None
    """Which blend of `data.blend` it is."""

    @property
    def only_trains(self) -> bool:
        """Whether evaluation and prediction leave it out."""
        training_only: bool = self.part_class.training_only
        return training_only


class UserBatchTransformSettings(UserDefinedSettings):
    """A step of the user's on the images of a batch together."""

    part_base = "mtl_dist.data.transforms.BatchTransform"
    of_batches: ClassVar[bool] = True
    blends: ClassVar[Blend | None] = None
    only_trains: ClassVar[bool] = True

    def make(self, **provided: Any) -> BatchTransform:
        made: BatchTransform = super().make(**provided)
        return made


class LibraryTransformSettings(UserDefinedSettings):
    """A transform of `torchvision.transforms.v2` by its path, with its arguments.

    Its MixUp and CutMix are `data.blend`'s, which blends the labels of all tasks.
    """

    part_base = "torchvision.transforms.v2.Transform"
    of_batches: ClassVar[bool] = False

    kind: str
    training_only: bool = True
    """Whether evaluation and prediction leave it out."""

    @property
    def only_trains(self) -> bool:
        return self.training_only

    @property
    def blends(self) -> Blend | None:
        """Which blend of `data.blend` it is."""
        is_library = self.part_class.__module__.startswith("torchvision.")
        return {"MixUp": "mixup", "CutMix": "cutmix"}.get(self.part_class.__name__) if is_library else None  # type: ignore[return-value]

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
    UserTransformSettings | UserBatchTransformSettings | LibraryTransformSettings,
    UserDefined((UserTransformSettings, UserBatchTransformSettings, LibraryTransformSettings), only=True),
]
