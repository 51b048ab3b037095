"""A matrix of recipes, run one after the other; what is there already is skipped."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, ValidationError

from quantlab.contracts.config import Strict
from quantlab.errors import QuantlabError, RecipeError
from quantlab.plugins import Registry
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
            loaded = load_recipe(find_recipe(bench_file.recipe, bench_path.parent), overrides, registry)
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
    folder = Path(read_bench(path).results)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[Mapping[str, object], Row]] = []
    failures: dict[str, str] = {}
    wanted = [text.partition("=") for text in only]
    todo = [cell for cell in cells(path, registry) if all(_short(cell.values.get(k, "")) == v for k, _, v in wanted)]
    if not todo:
        raise RecipeError("no cell of the bench fits", where="--only", got=", ".join(only))
    torch.set_num_threads(1)
    for index, cell in enumerate(todo, 1):
        file = folder / f"{cell.slug}-{cell_digest(cell.loaded)}.json"
        console.info(f"[{index}/{len(todo)}] {cell.title}: {'there already' if file.exists() else 'running'}")
        if not file.exists():
            try:
                result = run(cell.loaded, RunOptions(runs_dir, "cpu", "float32", False, console))
            except QuantlabError as error:
                failures[cell.title] = str(error)
                console.warn(f"{cell.title} failed: {error}")
                continue
            record = {"values": dict(cell.values), "rows": [row_to_json(row) for row in result.rows]}
            atomic_write_json(file, record)
        content = read_json(file)
        rows += [(cell.values, row_from_json(row)) for row in content["rows"]]  # type: ignore[union-attr]
    result = BenchResult(folder, rows, failures)
    atomic_write_text(folder / "summary.md", f"# {recipe_name(path)}\n\n{result.table()}\n")
    return result


def _short(value: object) -> str:
    """A value in a few characters: "2-4" for a budget of 2-bit weights and 4-bit activations."""
    return "-".join(map(str, value.values())) if isinstance(value, Mapping) else str(value)


def read_bench(path: Path) -> BenchFile:
    """A bench file; raises RecipeError with the key that is wrong."""
    node, _ = read_yaml(path)
    try:
        return BenchFile.model_validate(node.plain)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RecipeError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=str(path),
            got=first["input"],
            next_step="a bench has version, recipe, set, matrices and results",
        ) from error
