"""Commands about many runs: bench, compare, sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli.common import (
    RUNS,
    BudgetOption,
    ByOption,
    FormatOption,
    JobsOption,
    OnlyOption,
    PluginOption,
    ProfileOption,
    QuietOption,
    RecipeArgument,
    ReportOption,
    RunsOption,
    SetOption,
    VerboseOption,
    leave,
    told,
)
from quantlab.report.compare import Better
from quantlab.report.formats import TableFormat


def bench(
    recipe: RecipeArgument,
    plugins: PluginOption = [],  # noqa: B006
    runs_dir: RunsOption = RUNS,
    only: OnlyOption = [],  # noqa: B006
    jobs: JobsOption = 1,
    report_to: ReportOption = [],  # noqa: B006
    wanted: FormatOption = TableFormat.MARKDOWN,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a matrix of recipes, methods and seeds; what is there already is skipped."""
    with told(verbose):
        from quantlab.bench import bench as run_bench
        from quantlab.bench import launcher_for
        from quantlab.plugins import load_registry
        from quantlab.report.console import make_console

        registry, console = load_registry(plugins), make_console(verbose=verbose, quiet=quiet)
        result = run_bench(recipe, registry, runs_dir, console, only, launcher_for(jobs, registry), report_to)
        print(result.table(wanted))
    if result.failures:
        raise typer.Exit(1)


def compare(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders, folders or files of results")],
    by: ByOption = "fid-to-teacher",
    better: Annotated[Better | None, typer.Option("--better", help="which end of a plugin's metric is good")] = None,
    wanted: FormatOption = TableFormat.MARKDOWN,
    verbose: VerboseOption = False,
) -> None:
    """Rank measured methods of one protocol; results of several are not ranked beside one another."""
    with told(verbose):
        from quantlab.report.compare import compare as compare_rows
        from quantlab.report.sources import read_rows

        comparison = compare_rows(read_rows(paths), by, better)
        print(comparison.render(wanted))
    if not comparison.comparable:
        leave("not comparable, so ranked apart; the protocols differ in\n  " + "\n  ".join(comparison.differing), 1)


def sweep(
    recipe: RecipeArgument,
    weight_bits: Annotated[str, typer.Option("--weight-bits", metavar="2,3,4", help="mean bits of weights")] = "",
    activation_bits: Annotated[str, typer.Option("--activation-bits", metavar="4,8", help="of activations")] = "",
    budgets: BudgetOption = [],  # noqa: B006
    seeds: Annotated[str, typer.Option("--seeds", metavar="1,2", help="of every budget")] = "1",
    by: ByOption = "fid-to-teacher",
    overrides: SetOption = [],  # noqa: B006
    profile: ProfileOption = None,
    plugins: PluginOption = [],  # noqa: B006
    runs_dir: RunsOption = RUNS,
    results: Annotated[Path, typer.Option("--results", help="folder of the result files")] = Path("results/sweep"),
    jobs: JobsOption = 1,
    report_to: ReportOption = [],  # noqa: B006
    wanted: FormatOption = TableFormat.MARKDOWN,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run one method over budgets, and find those on the front of size and quality."""
    with told(verbose):
        from quantlab.bench import Sweep, budgets_from, launcher_for, seeds_from
        from quantlab.bench import sweep as run_sweep
        from quantlab.plugins import load_registry
        from quantlab.report.console import make_console

        varied = budgets_from([f"weight_bits={weight_bits}", f"activation_bits={activation_bits}", *budgets])
        asked = Sweep(recipe, varied, seeds_from(seeds), overrides, profile, by, results, report_to)
        registry, console = load_registry(plugins), make_console(verbose=verbose, quiet=quiet)
        result = run_sweep(asked, registry, runs_dir, console, launcher_for(jobs, registry))
        print(result.table(wanted))
        console.info(f"picture: {result.write()}")
    if result.bench.failures:
        raise typer.Exit(1)
