"""What every group of settings has in common."""

from collections.abc import Iterable
from typing import Any

import pydantic


class Settings(pydantic.BaseModel):
    """A frozen group of settings: unknown keys are refused, and `**settings` passes them on."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def keys(self) -> Iterable[str]:
        """The names of the settings, so that `**settings` works."""
        return type(self).model_fields

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)
