"""What every group of settings has in common."""

import pydantic


class Settings(pydantic.BaseModel):
    """A frozen group of settings: unknown keys, infinite and undefined numbers are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
