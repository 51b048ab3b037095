"""The recipe as a whole."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from quantlab.contracts.config import Strict
from quantlab.contracts.expected import Expected
from quantlab.contracts.sections import (
    MAX_SEED,
    Activations,
    Attention,
    Budget,
    Calibrate,
    Choice,
    Embeddings,
    Evaluate,
    InputsFrom,
    Keep,
    Model,
    Pack,
    Products,
    Sampling,
    Tune,
    Weights,
)

SCHEMA_VERSION = 1


class Recipe(Strict):
    """One job: a model, a method, a budget, and how it is measured."""

    version: Literal[1]
    name: str = Field(default="", max_length=200, description="the folder of its runs, inside --runs-dir")
    model: Model
    method: str = Field(description="a method fragment by name; the recipe's own keys override it")
    baselines: tuple[str, ...] = Field(default=(), description="methods that run beside it, as further rows")
    budget: Budget
    keep: tuple[Keep, ...] = ()
    protect: dict[str, Annotated[int, Field(ge=1, le=8)]] | None = Field(
        default=None,
        description="bits by tag (first, last, time_embed, ...) of sites outside the budget, where no keep rule holds; "
        "none: what the model's source says, {} for no site",
    )
    attention: Attention | None = Field(default=None, description="bits of attention's products; none: they stay float")
    products: Products | None = Field(
        default=None,
        description="bits of matrix products of activations outside fused attention; none: they stay float",
    )
    embeddings: Embeddings | None = Field(
        default=None, description="bits of the tables of embeddings; none: they stay float"
    )
    sampling: Sampling = Sampling()
    calibrate: Calibrate = Calibrate()
    passes: tuple[Choice, ...] = ()
    allocate: tuple[Choice, ...] = (Choice(name="uniform"),)
    weights: Weights = Weights()
    activations: Activations = Activations()
    split_skip: bool = Field(default=False, description="parts of a skip concatenation get quantizers of their own")
    inputs_from: InputsFrom = InputsFrom.TEACHER
    tune: Tune = Tune()
    corrections: tuple[Choice, ...] = Field(default=(), description="of the sampler, fitted to the finished model")
    pack: Pack = Pack()
    evaluate: Evaluate = Evaluate()
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    expected: Expected = Expected()

    def settings(self, *, defaults: bool = True) -> dict[str, Any]:
        """Everything that numbers depend on as plain JSON, for hashes and records: without what is expected of them."""
        return self.model_dump(mode="json", exclude={"expected"}, exclude_defaults=not defaults)

    @field_validator("name")
    @classmethod
    def _stays_in_its_folder(cls, name: str) -> str:
        if not name.isprintable() or (name and {"", ".", "..", ".store"} & set(name.split("/"))):
            raise ValueError('a name is words with "/" between them, without "." and ".."')
        return name
