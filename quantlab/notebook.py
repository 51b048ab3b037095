"""The commands as objects, for notebooks and scripts: ``Recipe.from_yaml(...).run()``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import escape

from quantlab.bench import bench, launcher_for
from quantlab.plugins import Registry, load_registry
from quantlab.recipe.explain import explain
from quantlab.recipe.load import LoadedRecipe, load_recipe
from quantlab.recipe.reporters import reporter_choices
from quantlab.report.console import make_console
from quantlab.run import RunOptions, RunResult, run

if TYPE_CHECKING:
    from quantlab.bench import BenchResult

RUNS = Path("runs")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe that can be run; a notebook shows its values with where each came from."""

    loaded: LoadedRecipe

    @classmethod
    def from_yaml(
        cls,
        path_or_name: str | Path,
        overrides: Sequence[str] = (),
        profile: str | None = None,
        registry: Registry | None = None,
    ) -> Recipe:
        """Read and check a recipe, as ``quantlab validate`` does.

        Args:
            path_or_name: a YAML file, or an installed recipe by name.
            overrides: "a.b=c", as after ``--set``.
            profile: a set of values of the recipe, such as "smoke".
            registry: the plugins; those that are installed without it.

        Raises:
            RecipeError: anything wrong with it, with file and line.
        """
        return cls(load_recipe(path_or_name, overrides, registry, profile))

    def run(
        self,
        runs_dir: str | Path = RUNS,
        device: str = "cpu",
        dtype: str = "float32",
        *,
        report_to: Sequence[str] = (),
        quiet: bool = False,
    ) -> RunResult:
        """Quantize and measure, as ``quantlab run`` does; stages that are in ``runs_dir`` are not computed again.

        Args:
            runs_dir: of run folders and stored stages.
            device: "cpu", "cuda", ...
            dtype: "float32", "bfloat16" or "float16".
            report_to: who keeps a record of the run, "mlflow" or "mlflow: {experiment: digits}".
            quiet: say nothing.

        Raises:
            QuantlabError: what went wrong, and what to do next.
        """
        reporters = reporter_choices(report_to, self.loaded.registry)
        return run(self.loaded, RunOptions(Path(runs_dir), device, dtype, False, make_console(quiet=quiet), reporters))

    def plan(self) -> str:
        """Sites, bits, size and bit operations as text, as ``--dry-run`` prints them; nothing is computed."""
        return run(self.loaded, RunOptions(RUNS, "cpu", "float32", True, make_console(quiet=True))).text

    def explain(self) -> str:
        """Every value with where it came from, a line each."""
        return explain(self.loaded)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.explain())}</pre>"


@dataclass(frozen=True)
class Bench:
    """A bench file that can be run."""

    path_or_name: str | Path
    registry: Registry
    only: Sequence[str] = ()

    @classmethod
    def from_yaml(cls, path_or_name: str | Path, registry: Registry | None = None) -> Bench:
        """A bench by its file, or an installed one by name; the file is read when the bench runs."""
        return cls(path_or_name, registry or load_registry())

    def where(self, *only: str) -> Bench:
        """The cells with these values alone: ``where("seed=1", "method=mse")``."""
        return replace(self, only=(*self.only, *only))

    def run(
        self, runs_dir: str | Path = RUNS, jobs: int = 1, *, report_to: Sequence[str] = (), quiet: bool = False
    ) -> BenchResult:
        """Run every cell that has no result yet, as ``quantlab bench`` does.

        Args:
            runs_dir: of run folders and stored stages.
            jobs: processes, each with one cell and one thread.
            report_to: who keeps a record of each cell's run, as of a recipe.
            quiet: say nothing.

        Raises:
            RecipeError: the bench or one of its cells is wrong; a cell that fails is told in the result instead.
        """
        launcher, console = launcher_for(jobs, self.registry), make_console(quiet=quiet)
        return bench(self.path_or_name, self.registry, Path(runs_dir), console, self.only, launcher, report_to)
