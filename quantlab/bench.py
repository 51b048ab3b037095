"""A matrix of recipes, run one after the other; what is there already is skipped."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field

from quantlab.contracts.config import Strict
from quantlab.errors import ArtefactError, QuantlabError, RecipeError, unforeseen
from quantlab.plugins import Registry
from quantlab.recipe.check import check
from quantlab.recipe.find import find_recipe, recipe_name
from quantlab.recipe.layers import read_yaml
from quantlab.recipe.load import LoadedRecipe, load_recipe
from quantlab.report.console import Console
from quantlab.report.rows import Row, row_from_json, row_to_json
from quantlab.report.summary import Summary, summarize
from quantlab.run import RunOptions, cell_digest, run
from quantlab.store import atomic_write_json, atomic_write_text, read_json


class BenchFile(Strict):
    """A bench: a base recipe, and what is varied over it.

    Every matrix maps dotted recipe keys to the values they take; its cells are all their combinations.
    """

    version: int = Field(ge=1, le=1)
    recipe: str = Field(description="the recipe of every cell before its overrides")
    set: dict[str, object] = Field(default_factory=dict, description="overrides of every cell")
    matrices: tuple[dict[str, list[object]], ...]
    results: str = Field("results", description="folder of the result files, relative to the working folder")


@dataclass(frozen=True)
class Cell:
    """One recipe of a bench, with the values that make it."""

    values: Mapping[str, object]
    loaded: LoadedRecipe

    @property
    def title(self) -> str:
        """Its values in one line."""
        return ", ".join(f"{key}={_short(value)}" for key, value in self.values.items())

    @property
    def slug(self) -> str:
        """Its values as the beginning of a file name."""
        return re.sub(r"[^\w.-]+", "-", "-".join(_short(value) for value in self.values.values()))


@dataclass(frozen=True)
class BenchResult:
    """What came out of a bench.

    Attributes:
        folder: of the result files.
        rows: a row for every cell that ran, with its values.
        failures: title and message of every cell that did not.
    """

    folder: Path
    rows: Sequence[tuple[Mapping[str, object], Row]]
    failures: Mapping[str, str]

    def summary(self) -> Summary:
        """Means and intervals over seeds."""
        return summarize(self.rows)

    def table(self) -> str:
        """The summary, and what failed."""
        failed = "".join(f"\nfailed: {title}\n  {message}" for title, message in self.failures.items())
        return self.summary().markdown() + failed


def cells(bench_path: Path, registry: Registry) -> list[Cell]:
    """All cells of a bench, in the order of its matrices, each checked before any runs.

    Raises:
        RecipeError: the bench file or the recipe of a cell is wrong.
    """
    bench_file = read_bench(bench_path)
    found: dict[str, Cell] = {}
    for matrix in bench_file.matrices:
        for combination in itertools.product(*matrix.values()):
            values = dict(zip(matrix, combination, strict=True))
            overrides = [f"{key}={json.dumps(value)}" for key, value in {**bench_file.set, **values}.items()]
            try:
                loaded = load_recipe(find_recipe(bench_file.recipe, bench_path.parent), overrides, registry)
            except RecipeError as error:
                where = f"{bench_path}: {error.where}" if error.where else str(bench_path)
                raise RecipeError(
                    error.what, where=where, got=error.got, allowed=error.allowed, next_step=error.next_step
                ) from error
            found.setdefault(cell_digest(loaded), Cell(values, loaded))
    return list(found.values())


def bench(
    name: str | Path, registry: Registry, runs_dir: Path, console: Console, only: Sequence[str] = ()
) -> BenchResult:
    """Run every cell that has no result file yet; a failing cell is told and the others go on.

    Every cell computes on one thread, so that cells that run beside one another do not change each other's numbers.
    ``only`` ("seed=1") leaves out the cells with other values of these keys.

    A result file is named after its cell and the hash of everything the cell's numbers depend on, so that a killed
    bench goes on where it was and committed results are never computed again.
    """
    path = find_recipe(name)
    rows: list[tuple[Mapping[str, object], Row]] = []
    failures: dict[str, str] = {}
    wanted = [text.partition("=") for text in only]
    known = cells(path, registry)
    todo = [cell for cell in known if all(_short(cell.values.get(key, "")) == value for key, _, value in wanted)]
    if not todo:
        keys = dict.fromkeys(key for cell in known for key in cell.values)
        raise RecipeError(
            "no cell of the bench fits",
            where="--only" if only else str(path),
            got=", ".join(only) or None,
            allowed=f"KEY=VALUE with a key among {', '.join(keys)}"
            if keys
            else "matrices with at least one value a key",
        )
    folder = Path(read_bench(path).results)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for index, cell in enumerate(todo, 1):
        file = folder / f"{cell.slug}-{cell_digest(cell.loaded)}.json"
        console.info(f"[{index}/{len(todo)}] {cell.title}: {'there already' if file.exists() else 'running'}")
        if not file.exists():
            try:
                result = run(cell.loaded, RunOptions(runs_dir, "cpu", "float32", False, console))
            except Exception as error:
                failures[cell.title] = str(error if isinstance(error, QuantlabError) else unforeseen(error))
                console.warn(f"{cell.title} failed: {failures[cell.title]}")
                continue
            record = {"values": dict(cell.values), "rows": [row_to_json(row) for row in result.rows]}
            atomic_write_json(file, record)
        rows += [(cell.values, row) for row in _read_rows(file)]
    result = BenchResult(folder, rows, failures)
    atomic_write_text(folder / "summary.md", f"# {recipe_name(path)}\n\n{result.table()}\n")
    return result


def _read_rows(file: Path) -> list[Row]:
    found = read_json(file).get("rows")
    if not isinstance(found, list):
        raise ArtefactError(
            "this is no result of a bench", where=str(file), next_step="delete it, to run its cell again"
        )
    return [row_from_json(row, str(file)) for row in found]


def _short(value: object) -> str:
    """A value in a few characters: "2-4" for a budget of 2-bit weights and 4-bit activations."""
    return "-".join(map(str, value.values())) if isinstance(value, Mapping) else str(value)


def read_bench(path: Path) -> BenchFile:
    """A bench file; raises RecipeError with the line and the key that is wrong."""
    node, _ = read_yaml(path)
    if not node.reach(("matrices",))[1]:
        raise RecipeError(
            "this is no bench: it has no matrices", where=str(path), next_step=f"quantlab run {recipe_name(path)}"
        )
    return check(BenchFile, node)
