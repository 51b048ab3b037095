"""Commands that quantize a model, look at one, or use what came out.

They are run, reproduce, doctor, sample, pack, export and execute.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantlab.cli.common import (
    RUNS,
    DeviceOption,
    DtypeOption,
    JsonOption,
    PluginOption,
    ProfileOption,
    QuietOption,
    RecipeArgument,
    ReportOption,
    RunsOption,
    SetOption,
    VerboseOption,
    load,
    told,
)
from quantlab.processes import joined

if TYPE_CHECKING:
    from quantlab.run import RunResult


def run(
    recipe: RecipeArgument,
    overrides: SetOption = [],  # noqa: B006  typer reads the default and never changes it
    profile: ProfileOption = None,
    plugins: PluginOption = [],  # noqa: B006
    runs_dir: RunsOption = RUNS,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show sites, bits and size; compute nothing")] = False,
    report_to: ReportOption = [],  # noqa: B006
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model as a recipe says, and measure the result."""
    with told(verbose), joined() as processes:
        loaded = load(recipe, overrides, plugins, profile)
        from quantlab.recipe.reporters import reporter_choices
        from quantlab.report.console import make_console
        from quantlab.run import RunOptions
        from quantlab.run import run as run_recipe

        console = make_console(verbose=verbose, quiet=quiet or as_json, silent=not processes.first)
        reporters = reporter_choices(report_to, loaded.registry)
        result = run_recipe(loaded, RunOptions(runs_dir, device, dtype, dry_run, console, reporters, processes))
        if processes.first:
            print(_as_json(result) if as_json else result.table())


def reproduce(
    recipe: RecipeArgument,
    overrides: SetOption = [],  # noqa: B006
    profile: ProfileOption = None,
    plugins: PluginOption = [],  # noqa: B006
    runs_dir: RunsOption = RUNS,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show plan and expected numbers; compute nothing")] = False,
    report_to: ReportOption = [],  # noqa: B006
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe and compare it with the numbers it is expected to give; exit with 4 or 5 unless all are inside."""
    with told(verbose), joined() as processes:
        loaded = load(recipe, overrides, plugins, profile)
        from quantlab.recipe.reporters import reporter_choices
        from quantlab.report.console import make_console
        from quantlab.reproduce import reproduce as reproduce_recipe
        from quantlab.run import RunOptions
        from quantlab.store import json_text

        console = make_console(verbose=verbose, quiet=quiet or as_json, silent=not processes.first)
        reporters = reporter_choices(report_to, loaded.registry)
        options = RunOptions(runs_dir, device, dtype, dry_run, console, reporters, processes)
        found = reproduce_recipe(loaded, options)
        if processes.first:
            print(json_text(found.to_json()) if as_json else found.table())
    # One process says it: whoever started several takes any other code than 0 for a failure, and ends them.
    raise typer.Exit(found.exit_code if processes.first else 0)


def _as_json(result: RunResult) -> str:
    from dataclasses import asdict

    from quantlab.store import json_text

    return json_text({"folder": str(result.folder), "rows": [asdict(row) for row in result.rows]})


def doctor(
    model: Annotated[str, typer.Argument(metavar="SOURCE:NAME|RECIPE", help="diffusers:FOLDER, builtin:digits, ...")],
    minimum: Annotated[
        float, typer.Option("--min-coverage", min=0, max=1, help="exit with 3 when less can be quantized")
    ] = 0.0,
    overrides: SetOption = [],  # noqa: B006
    plugins: PluginOption = [],  # noqa: B006
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what a capture of a model yields: sites, coverage, what stays float and why, limits, memory."""
    with told(verbose):
        from quantlab.doctor import diagnose, require_coverage
        from quantlab.plugins import load_registry

        diagnosis = diagnose(model, load_registry(plugins), overrides, device)
        print(diagnosis.to_json() if as_json else diagnosis.to_text(terminal_columns()))
        require_coverage(diagnosis, minimum)


def terminal_columns() -> int:
    """Columns of the terminal; where there is none, enough for a table."""
    import shutil

    return shutil.get_terminal_size((120, 24)).columns


def sample(
    path: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="a run folder, or a packed file")],
    number: Annotated[int, typer.Option("--number", min=1, help="how many images")] = 16,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**62, help="of the initial noise")] = 0,
    output: Annotated[Path, typer.Option("--output", help="the PNG file to write")] = Path("samples.png"),
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="denoising steps; the run's own without it")
    ] = None,
    device: DeviceOption = "cpu",
    verbose: VerboseOption = False,
) -> None:
    """Draw images from the quantized model of a run, or of a packed file."""
    with told(verbose):
        from quantlab.api import sample as sample_run

        print(sample_run(path, number, seed, output, device, steps))


def pack(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")],
    method: Annotated[str | None, typer.Option("--method", help="of the run; the recipe's own without it")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="the file; METHOD.safetensors in RUN without it")
    ] = None,
    verbose: VerboseOption = False,
) -> None:
    """Write a quantized model of a run as one small file, which loads without the run and the float weights."""
    with told(verbose):
        from quantlab.api import pack as pack_run

        print(pack_run(run_folder, method, output))


def export(
    path: Annotated[Path, typer.Argument(metavar="RUN|FILE", help="a run folder, or a packed file")],
    to: Annotated[str, typer.Option("--to", help="onnx, or compressed-tensors")],
    output: Annotated[
        Path | None, typer.Option("--output", help="the file, or folder, to write; beside the model without it")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="a method of the run; the recipe's without it")] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="compressed-tensors: leave out how inputs are quantized")
    ] = False,
    verbose: VerboseOption = False,
) -> None:
    """Write a quantized model in the format of another project, if that can hold it exactly."""
    with told(verbose):
        from quantlab.export import export as export_model
        from quantlab.export import target_of

        print(export_model(path, target_of(to), output, method, weights_only=weights_only))


def execute(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")],
    method: Annotated[str | None, typer.Option("--method", help="a method of the run; the recipe's without it")] = None,
    samples: Annotated[int, typer.Option("--samples", min=2, help="how many images")] = 1000,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**62, help="of the initial noise")] = 0,
    verbose: VerboseOption = False,
) -> None:
    """Run the quantized model of a run in integers, and compare it with its simulation."""
    with told(verbose):
        from quantlab.execution import compare_execution

        print(compare_execution(run_folder, method, samples=samples, seed=seed))
