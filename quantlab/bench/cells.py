"""The cells of a bench, and each of them as plain data that another process or machine can run."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from quantlab.bench.file import BenchFile, read_bench
from quantlab.errors import RecipeError, nearest
from quantlab.plugins import Registry
from quantlab.recipe.find import find_recipe
from quantlab.recipe.load import LoadedRecipe, read_recipe, resolve_recipe
from quantlab.run import cell_digest


@dataclass(frozen=True)
class Cell:
    """One recipe of a bench.

    Attributes:
        values: that make it.
        overrides: of the base recipe, "a.b=c".
        loaded: the recipe.
        digest: hash of everything its numbers depend on.
    """

    values: Mapping[str, object]
    overrides: Sequence[str]
    loaded: LoadedRecipe
    digest: str

    @property
    def title(self) -> str:
        """Its values in one line."""
        return ", ".join(f"{key}={_short(value)}" for key, value in self.values.items())

    @property
    def file_name(self) -> str:
        """Of its result, without the suffix: its values, and its digest, by which it is known."""
        slug = re.sub(r"[^\w.-]+", "-", "-".join(_short(value) for value in self.values.values()))
        return f"{slug}-{self.digest}"


@dataclass(frozen=True)
class CellJob:
    """A cell as data: what a worker needs to run it, on this machine or on another one that sees the same files.

    Attributes:
        title: its values in one line.
        values: that make it; they stand in the result file.
        recipe: file of the base recipe.
        profile: of the recipe, or None.
        overrides: "a.b=c".
        plugins: folders of plugins that are not installed.
        folder: the working folder, which a recipe's own paths start from.
        runs_dir: of run folders and stored stages, shared by all cells.
        result: the file to write.
        reporters: who keeps a record of its run, as after ``--report-to``.
    """

    title: str
    values: Mapping[str, object]
    recipe: str
    profile: str | None
    overrides: tuple[str, ...]
    plugins: tuple[str, ...]
    folder: str
    runs_dir: str
    result: str
    reporters: tuple[str, ...] = ()

    def to_json(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> CellJob:
        """The inverse of ``to_json``."""
        found = json.loads(text)
        lists = ("overrides", "plugins", "reporters")
        return CellJob(**{**found, **{name: tuple(found[name]) for name in lists}})


def cells(bench_path: Path, registry: Registry) -> list[Cell]:
    """All cells of a bench file, in the order of its matrices, each checked before any runs.

    Raises:
        RecipeError: the bench file or the recipe of a cell is wrong.
    """
    return expand(read_bench(bench_path), bench_path, registry)


def expand(bench_file: BenchFile, path: Path, registry: Registry) -> list[Cell]:
    """All cells of a bench; ``path`` is of its file, which relative recipes lie beside."""
    found: dict[str, Cell] = {}
    with _told_inside(path):
        base = read_recipe(find_recipe(bench_file.recipe, path.parent), bench_file.profile)
    for matrix in bench_file.matrices:
        for combination in itertools.product(*matrix.values()):
            values = dict(zip(matrix, combination, strict=True))
            overrides = [f"{key}={json.dumps(value)}" for key, value in {**bench_file.set, **values}.items()]
            with _told_inside(path):
                loaded = resolve_recipe(base, overrides, registry)
            digest = cell_digest(loaded)
            found.setdefault(digest, Cell(values, overrides, loaded, digest))
    _check_baseline(bench_file, path, list(found.values()))
    return list(found.values())


def choose(known: Sequence[Cell], only: Sequence[str], path: Path) -> list[Cell]:
    """The cells with all of these values ("seed=1"); raises RecipeError when there are none."""
    wanted = [text.partition("=") for text in only]
    chosen = [cell for cell in known if all(_short(cell.values.get(key, "")) == value for key, _, value in wanted)]
    if not chosen:
        keys = dict.fromkeys(key for cell in known for key in cell.values)
        raise RecipeError(
            "no cell of the bench fits",
            where="--only" if only else str(path),
            got=", ".join(only) or None,
            allowed=f"KEY=VALUE with a key among {', '.join(keys)}"
            if keys
            else "matrices with at least one value a key",
        )
    return chosen


def job_of(cell: Cell, bench_file: BenchFile, folder: Path, runs_dir: Path, reporters: Sequence[str] = ()) -> CellJob:
    """The cell as data; its paths are absolute."""
    return CellJob(
        title=cell.title,
        values=cell.values,
        recipe=str(cell.loaded.path.resolve()),
        profile=bench_file.profile,
        overrides=tuple(cell.overrides),
        plugins=tuple(str(path.resolve()) for path in cell.loaded.registry.paths),
        folder=str(Path.cwd()),
        runs_dir=str(runs_dir.resolve()),
        result=str((folder / f"{cell.file_name}.json").resolve()),
        reporters=tuple(reporters),
    )


@contextmanager
def _told_inside(path: Path) -> Iterator[None]:
    """An error of a recipe names the bench too."""
    try:
        yield
    except RecipeError as error:
        where = f"{path}: {error.where}" if error.where else str(path)
        raise RecipeError(
            error.what, where=where, got=error.got, allowed=error.allowed, next_step=error.next_step
        ) from error


def _check_baseline(bench_file: BenchFile, path: Path, found: Sequence[Cell]) -> None:
    recipes = [cell.loaded.recipe for cell in found]
    methods = dict.fromkeys(name for recipe in recipes for name in (recipe.method, *recipe.baselines))
    if found and bench_file.baseline is not None and bench_file.baseline not in methods:
        raise RecipeError(
            f'no cell of the bench has the baseline "{bench_file.baseline}"',
            where=str(path),
            allowed=", ".join(methods),
            next_step=nearest(bench_file.baseline, methods),
        )


def _short(value: object) -> str:
    """A value in a few characters: "2-4" for a budget of 2-bit weights and 4-bit activations."""
    return "-".join(map(str, value.values())) if isinstance(value, Mapping) else str(value)
