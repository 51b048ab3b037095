"""The recipe as a whole."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quantlab.contracts.config import Strict
from quantlab.contracts.sections import (
    Activations,
    Budget,
    Calibrate,
    Choice,
    Evaluate,
    InputsFrom,
    Keep,
    Model,
    Sampling,
    Tune,
    Weights,
)

SCHEMA_VERSION = 1


class Recipe(Strict):
    """One job: a model, a method, a budget, and how it is measured."""

    version: Literal[1]
    name: str = ""
    model: Model
    method: str = Field(description="a method fragment by name; the recipe's own keys override it")
    baselines: tuple[str, ...] = Field(default=(), description="methods that run beside it, as further rows")
    budget: Budget
    keep: tuple[Keep, ...] = ()
    sampling: Sampling = Sampling()
    calibrate: Calibrate = Calibrate()
    passes: tuple[Choice, ...] = ()
    allocate: tuple[Choice, ...] = (Choice(name="uniform"),)
    weights: Weights = Weights()
    activations: Activations = Activations()
    inputs_from: InputsFrom = InputsFrom.TEACHER
    tune: Tune = Tune()
    evaluate: Evaluate = Evaluate()
    seed: int = Field(default=0, ge=0)
