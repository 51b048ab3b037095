"""Run the cells of a bench that have no result yet."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from quantlab.bench.cells import choose, expand, job_of
from quantlab.bench.display import display
from quantlab.bench.file import BenchFile, read_bench
from quantlab.bench.launch import InProcess, Launcher
from quantlab.bench.result import BenchResult, collect, forget_failure, save_page, write_failure
from quantlab.plugins import Registry
from quantlab.recipe.find import find_recipe, recipe_name
from quantlab.recipe.reporters import reporter_choices
from quantlab.report.console import Console
from quantlab.stages.reporting import make_reporters


def bench(
    name: str | Path,
    registry: Registry,
    runs_dir: Path,
    console: Console,
    only: Sequence[str] = (),
    launcher: Launcher | None = None,
    report_to: Sequence[str] = (),
) -> BenchResult:
    """Run every cell that has no result file yet; a failing cell is told and the others go on.

    A result file is named after its cell and the hash of everything the cell's numbers depend on, so that a killed
    bench goes on where it was and committed results are never computed again. Why a cell failed stands in a file
    beside the results, and the cell is run again the next time.

    Args:
        name: a bench file, or an installed one by name.
        registry: the plugins.
        runs_dir: of run folders and stored stages.
        console: whom to tell.
        only: "seed=1": the cells with this value alone.
        launcher: who runs the cells; this process, one after the other, without it.
        report_to: reporters of each cell's run, "mlflow" or "mlflow: {experiment: digits}".
    """
    path = find_recipe(name)
    return run_matrix(read_bench(path), recipe_name(path), path, registry, runs_dir, console, only, launcher, report_to)


def run_matrix(
    bench_file: BenchFile,
    title: str,
    path: Path,
    registry: Registry,
    runs_dir: Path,
    console: Console,
    only: Sequence[str] = (),
    launcher: Launcher | None = None,
    report_to: Sequence[str] = (),
) -> BenchResult:
    """As ``bench``, of a bench that is read already; relative recipes lie beside ``path``, its file."""
    make_reporters(reporter_choices(report_to, registry), registry)  # what is missing is told before anything runs
    known = expand(bench_file, path, registry)
    chosen = choose(known, only, path)
    folder = Path(bench_file.results)
    collect(title, folder, known, bench_file.baseline)  # damaged results are told before anything is computed
    folder.mkdir(parents=True, exist_ok=True)
    todo = {}
    for cell in chosen:
        job = job_of(cell, bench_file, folder, runs_dir, report_to)
        if not Path(job.result).exists():
            todo[job.result] = (job, cell)
            forget_failure(folder, cell)
    jobs = [job for job, _ in todo.values()]
    runner = launcher or InProcess(registry)
    with display(console, len(chosen), len(chosen) - len(todo)) as shown, closing(runner.run(jobs, shown)) as outcomes:
        for outcome in outcomes:
            if outcome.failure is not None:
                write_failure(folder, todo[outcome.job.result][1], outcome.failure)
            shown.finished(outcome)
    everything = collect(title, folder, known, bench_file.baseline)
    everything.write()
    save_page(everything, known, runs_dir, bench_file)
    console.info(f"table and page: {folder / 'summary.md'}, {folder / 'report.html'}")
    return collect(title, folder, chosen, bench_file.baseline)
