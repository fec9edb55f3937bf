"""The settings of a map-style Dataset of the user's, by its import path."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

from mtl_dist.config.settings import Settings
from mtl_dist.config.user_defined import PartError, UserDefined, UserDefinedSettings


class DatasetSettings(UserDefinedSettings):
    """A Dataset by its import path, with its constructor's arguments."""

    part_base = "torch.utils.data.Dataset"

    def with_absolute_paths(self, base: Path) -> DatasetSettings:
        """The same, with the arguments that are paths resolved against `base`."""
        places = {name: getattr(self, name) for name in self.arguments if name in type(self).model_fields}
        absolute = {n: (base / place).absolute() for n, place in places.items() if isinstance(place, Path)}
        return self.model_copy(update=absolute)

    @classmethod
    def settings_for(cls, part: Any, key: str, path: str) -> type[Settings]:
        if not (hasattr(part, "__len__") and hasattr(part, "__getitem__")) or hasattr(part, "__iter__"):
            raise PartError(
                f"expected a map-style Dataset, with __len__ and __getitem__, found {path}, which is read "
                "from its beginning to its end. Give it these two, or read tars with `stream: true`."
            )
        return super().settings_for(part, key, path)


UserDataset: TypeAlias = Annotated[DatasetSettings, UserDefined((DatasetSettings,), only=True)]
