"""Lines of a summary as records: every digit, every metric, what makes the line comparable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from quantlab.evaluation.interval import Interval
from quantlab.report.summary import FailedCell, Summary, SummaryLine
from quantlab.store import JSON


def summary_records(summary: Summary) -> list[dict[str, JSON]]:
    """All lines of a bench, full precision with other noise and the failed cells after them."""
    return [*map(line_record, (*summary.lines, *summary.noise)), *map(failed_record, summary.failed)]


def line_record(line: SummaryLine) -> dict[str, JSON]:
    """A line as plain JSON; ``allocations`` are the hashes of its bit maps, a row each."""
    row = line.rows[0]
    return {
        "model": row.model,
        "method": row.method,
        "weight_bits": row.weight_bits,
        "activation_bits": row.activation_bits,
        "values": cast("Mapping[str, JSON]", line.values),
        "seeds": [each.seed for each in line.rows],
        "size_bytes": row.size_bytes,
        "float_bytes": row.float_bytes,
        "coverage": row.coverage,
        "metrics": {name: interval_record(found) for name, found in line.metrics.items()},
        "differences": {
            name: {**interval_record(found), "beyond_noise": found.excludes_zero}
            for name, found in line.differences.items()
        },
        "seeds_needed": line.seeds_needed,
        "seconds": line.seconds,
        "data_free": row.data_free,
        "simulated": row.simulated,
        "protocol": row.protocol,
        "allocations": [each.allocation for each in line.rows],
    }


def failed_record(cell: FailedCell) -> dict[str, JSON]:
    """A failed cell as plain JSON."""
    values = cast("Mapping[str, JSON]", cell.values)
    return {"model": cell.model, "method": cell.method, "values": values, "failed": cell.message}


def interval_record(value: Interval) -> dict[str, JSON]:
    """An interval as plain JSON; ``of`` says what it is over."""
    of = "seeds" if value.count > 1 else "resampled images" if value.known else None
    return {"mean": value.mean, "low": value.low, "high": value.high, "of": of}
