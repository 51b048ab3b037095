"""One line of a result table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from quantlab.contracts.expected import FULL_PRECISION as FULL_PRECISION
from quantlab.errors import ArtefactError
from quantlab.store import JSON

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Row:
    """A method's measured result.

    Attributes:
        method: its name, or FULL_PRECISION.
        model: the model's name.
        weight_bits: parameter-weighted mean bits of the weights under the budget.
        activation_bits: mean bits of the inputs of these sites.
        size_bytes: of the whole denoiser with everything a file must hold, by the accounting.
        float_bytes: of the float denoiser.
        coverage: share of the multiply-accumulates that are quantized.
        metrics: value by name.
        seconds: of this method's own stages: assign, tune, finalize.
        protocol: rows with different ids are not comparable.
        seed: of calibration and tuning.
        data_free: no training data were used.
        simulated: computed in float with quantized values.
        allocation: hash of the bit map, "" for full precision.
        intervals: 95 % interval of a metric over resampled images, by metric, where a bootstrap was asked for.
        protocol_fields: what the protocol's id is the hash of; empty in rows of earlier versions.
        other_noise: of full precision alone: its metrics with other noise, without those of paired images.
    """

    method: str
    model: str
    weight_bits: float
    activation_bits: float
    size_bytes: int
    float_bytes: int
    coverage: float
    metrics: Mapping[str, float | None]
    seconds: float
    protocol: str
    seed: int
    data_free: bool
    simulated: bool
    allocation: str
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    protocol_fields: Mapping[str, JSON] = field(default_factory=dict)
    other_noise: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def smaller(self) -> float:
        """By what factor the denoiser is smaller than in float."""
        return self.float_bytes / self.size_bytes


def row_to_json(row: Row) -> dict[str, JSON]:
    """A row as plain JSON with its schema's version."""
    return {"schema_version": SCHEMA_VERSION, **asdict(row)}


def row_from_json(content: Mapping[str, object], where: str = "") -> Row:
    """The inverse of ``row_to_json``; raises ArtefactError for another schema."""
    fields = dict(content)
    if fields.pop("schema_version", None) != SCHEMA_VERSION:
        raise ArtefactError(
            "the result was written by another version of quantlab",
            where=where or None,
            got=content.get("schema_version"),
            allowed=str(SCHEMA_VERSION),
        )
    try:
        row = Row(**fields)  # type: ignore[arg-type]
        return replace(row, intervals={name: (low, high) for name, (low, high) in row.intervals.items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise ArtefactError("this is no result row", where=where or None, got=error) from error
