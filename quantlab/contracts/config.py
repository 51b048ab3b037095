"""The base of everything that is written in YAML."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Frozen, and unknown keys are errors: base of every recipe section and every plugin's Config."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)
