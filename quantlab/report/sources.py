"""Measured rows from what a person names: run folders, result folders of benches, result files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantlab.errors import ArtefactError
from quantlab.report.rows import Row, row_from_json
from quantlab.store import digest_of, read_json

RUN_RESULT = "metrics.json"
SUMMARY, PARETO = "summary", "pareto"
"""Names of the files beside a bench's results that hold no results."""
ValuedRow = tuple[Mapping[str, object], Row]
"""A row with the values that make it in its bench."""


@dataclass(frozen=True)
class _Source:
    """Rows that belong together: the seeds of one setting may be among them."""

    label: str
    file: Path
    rows: Sequence[ValuedRow]


def read_result(file: Path) -> list[ValuedRow]:
    """The rows of one cell of a bench; raises ArtefactError for any other file."""
    content = read_json(file)
    rows, values = content.get("rows"), content.get("values")
    if not isinstance(rows, list) or not isinstance(values, dict):
        raise ArtefactError(
            "this is no result of a bench", where=str(file), next_step="delete it, to run its cell again"
        )
    return [(values, row_from_json(row, str(file))) for row in rows]


def read_run(file: Path) -> str | None:
    """The run that computed a cell, as a path inside the folder of runs; None for a result that does not say."""
    run = read_json(file).get("run")
    return run if isinstance(run, str) and ".." not in Path(run).parts and not Path(run).is_absolute() else None


def read_rows(paths: Sequence[Path]) -> list[ValuedRow]:
    """The rows of all of them; when they are of several benches or recipes, ``values`` has which.

    Raises:
        ArtefactError: a path holds no results, or two results of one cell and seed differ.
    """
    sources = [source for path in paths for source in _sources(path)]
    several = len({source.label for source in sources}) > 1
    rows: list[ValuedRow] = []
    known: dict[str, tuple[Path, Row]] = {}
    for source in sources:
        for values, row in source.rows:
            values = {**values, "results": source.label} if several else values
            rest = {key: value for key, value in values.items() if key != "method"}
            key = digest_of([row.method, row.protocol, row.seed, row.allocation and rest])  # type: ignore[list-item]
            file, first = known.setdefault(key, (source.file, row))
            if (first.metrics, first.allocation) != (row.metrics, row.allocation):
                raise ArtefactError(
                    f"two results of {row.method} with the same seed and setting differ",
                    where=f"{file} and {source.file}",
                    next_step="leave out, or delete, the one of the earlier version",
                )
            rows.append((values, row))
    return rows


def _sources(path: Path) -> Iterable[_Source]:
    if (path / RUN_RESULT).is_file():
        yield _of_run(path)
    elif path.is_dir() or not path.exists():
        files = [file for file in sorted(path.glob("*.json")) if file.stem not in (SUMMARY, PARETO)]
        if not files:
            raise ArtefactError(
                "there are no results here",
                where=str(path),
                allowed="run folders that came to their end, result folders of benches, result files",
                next_step="list the runs: quantlab runs",
            )
        yield from (_Source(path.resolve().name, file, read_result(file)) for file in files)
    elif path.name == RUN_RESULT and path.is_file():
        yield _of_run(path.parent)
    else:
        yield _Source(path.resolve().parent.name, path, read_result(path))


def _of_run(folder: Path) -> _Source:
    """The rows of a run; runs of one recipe that differ in nothing but the seed belong together."""
    file = folder / RUN_RESULT
    rows = read_json(file).get("rows")
    if not isinstance(rows, list):
        raise ArtefactError("this is no result of a run", where=str(file))
    recipe = str(read_json(folder / "run.json").get("recipe"))
    resolved = (folder / "recipe.resolved.yaml").read_text().splitlines()
    digest = digest_of([line for line in resolved if not line.startswith("seed:")])
    return _Source(f"{recipe}@{digest[:8]}", file, [({}, row_from_json(row, str(file))) for row in rows])
