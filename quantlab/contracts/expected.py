"""What a recipe is expected to give: numbers of a paper, each with a band around it, and how sure it is."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from quantlab.contracts.config import Strict

Plain = str | int | float | bool | None
FULL_PRECISION = "full precision"
"""What stands in place of a method for the float network."""


class Certainty(StrEnum):
    """How a number came into a recipe."""

    PUBLISHED = "published"
    """Read in the table of the paper itself."""
    READ_FROM_FIGURE = "read-from-figure"
    """Read off a picture of the paper."""
    READ_FROM_TEXT = "read-from-text"
    """Read in a text about the paper; the paper's own table was not seen."""
    DERIVED = "derived"
    """By arithmetic from what a text says."""
    MEASURED_HERE = "measured-here"
    """By quantlab, with a result in its repository."""
    NOT_FOUND = "not-found"
    """Looked for and not found: there is no number."""


class Band(Strict):
    """One number: between ``low`` and ``high``, or ``value`` with ``tolerance`` to either side."""

    method: str = Field(description='a method by name, or "full precision"')
    metric: str = Field(description="as a run's rows name it, such as fid, is, precision")
    low: float | None = None
    high: float | None = None
    value: float | None = None
    tolerance: float | None = Field(default=None, ge=0, description="in the metric's own unit")
    source: str = Field(min_length=1, description="paper and table, or a file of results")
    certainty: Certainty
    protocol: dict[str, Plain] = Field(
        default_factory=dict, description="as of the section, for this number; its keys win"
    )
    unlike: tuple[str, ...] = Field(
        default=(), description="how the number was measured otherwise than here, where no key of a recipe says it"
    )
    note: str = Field(default="", description="what a reader should know; it changes no verdict")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        given = {name for name in ("low", "high", "value", "tolerance") if getattr(self, name) is not None}
        if self.certainty is Certainty.NOT_FOUND:
            if given:
                raise ValueError("a number that was not found has neither value nor ends")
        elif given not in ({"low", "high"}, {"value", "tolerance"}):
            raise ValueError("a band has low and high, or value and tolerance")
        elif self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError("low lies above high")
        return self

    @property
    def ends(self) -> tuple[float, float] | None:
        """Its lowest and its highest value; None for a number that was not found."""
        if self.value is not None and self.tolerance is not None:
            return self.value - self.tolerance, self.value + self.tolerance
        return None if self.low is None or self.high is None else (self.low, self.high)


class Expected(Strict):
    """What ``quantlab reproduce`` compares a run with; it is part of no hash, and changes no number."""

    protocol: dict[str, Plain] = Field(
        default_factory=dict,
        description="what the numbers were measured with, by the dotted keys of a recipe, such as evaluate.samples; "
        "with another value a run is not comparable",
    )
    bands: tuple[Band, ...] = ()
