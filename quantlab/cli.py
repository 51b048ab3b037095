"""The command line: each command reads its options, calls one function and prints what it returns."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from quantlab.errors import QuantlabError, RecipeError, Stopped, unforeseen
from quantlab.report.compare import Better
from quantlab.report.formats import TableFormat

if TYPE_CHECKING:
    from quantlab.plugins import Registry
    from quantlab.recipe.load import LoadedRecipe
    from quantlab.run import RunResult

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 plus the signal's number, as in a shell."""

app = typer.Typer(
    help="Mixed-precision quantization of diffusion and vision models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
new_app = typer.Typer(help="Write a new package.", no_args_is_help=True)
runs_app = typer.Typer(help="List run folders, and clean what was stored.", invoke_without_command=True)
zoo_app = typer.Typer(help="The models that ship.", no_args_is_help=True)
app.add_typer(new_app, name="new")
app.add_typer(runs_app, name="runs")
app.add_typer(zoo_app, name="zoo")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="a YAML file, or an installed recipe by name")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="A.B=C", help="override a value of the recipe")]
ProfileOption = Annotated[str | None, typer.Option("--profile", help="a set of values of the recipe, such as smoke")]
PluginOption = Annotated[list[Path], typer.Option("--plugin", help="folder of a plugin that is not installed")]
RunsOption = Annotated[Path, typer.Option("--runs-dir", help="where run folders are written")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="more lines, and the traceback of an error")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="the result only")]
JsonOption = Annotated[bool, typer.Option("--json", help="the result as JSON on standard output")]
OnlyOption = Annotated[list[str], typer.Option("--only", metavar="KEY=VALUE", help="the cells with this value")]
JobsOption = Annotated[int, typer.Option("--jobs", min=1, help="processes, each with one cell and one thread")]
ByOption = Annotated[str, typer.Option("--by", metavar="METRIC", help="the metric that methods are judged by")]
BudgetOption = Annotated[list[str], typer.Option("--budget", metavar="KEY=A,B", help="another key of the budget")]
FormatOption = Annotated[TableFormat, typer.Option("--format", help="of the table on standard output")]
RUNS = Path("runs")


@contextmanager
def told(verbose: bool = False) -> Iterator[None]:
    """Turn errors into one message and an exit code; with ``verbose``, the traceback as well."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever reads has left, as ``head`` does: typer ends quietly
    except Exception as error:
        if verbose:
            traceback.print_exc()
        known = error if isinstance(error, QuantlabError) else unforeseen(error)
        _leave(f"error: {known}", known.exit_code)
    except (KeyboardInterrupt, Stopped) as stop:
        code = stop.args[0] if stop.args else INTERRUPTED
        _leave("stopped; the same command goes on after the last finished stage or checkpoint", code)


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(code)


def _load(recipe: str, overrides: list[str], plugins: list[Path], profile: str | None) -> LoadedRecipe:
    from quantlab.plugins import load_registry
    from quantlab.recipe.load import load_recipe

    return load_recipe(recipe, overrides, load_registry(plugins), profile)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"quantlab {version('quantlab')}")
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Mixed-precision quantization of diffusion and vision models."""


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: SetOption = [],  # noqa: B006  typer reads the default and never changes it
    profile: ProfileOption = None,
    plugins: PluginOption = [],  # noqa: B006
    runs_dir: RunsOption = RUNS,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show sites, bits and size; compute nothing")] = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model as a recipe says, and measure the result."""
    with told(verbose):
        loaded = _load(recipe, overrides, plugins, profile)
        from quantlab.report.console import make_console
        from quantlab.run import RunOptions
        from quantlab.run import run as run_recipe

        console = make_console(verbose=verbose, quiet=quiet or as_json)
        result = run_recipe(loaded, RunOptions(runs_dir, device, dtype, dry_run, console))
        print(_as_json(result) if as_json else result.table())


def _as_json(result: RunResult) -> str:
    from dataclasses import asdict

    from quantlab.store import json_text

    return json_text({"folder": str(result.folder), "rows": [asdict(row) for row in result.rows]})


@app.command("list")
def list_names(
    kind: Annotated[str | None, typer.Argument(help="methods, policies, ..., recipes; everything without it")] = None,
    plugins: PluginOption = [],  # noqa: B006
    verbose: VerboseOption = False,
) -> None:
    """List what a recipe can choose from."""
    with told(verbose):
        from quantlab.plugins import load_registry
        from quantlab.recipe.catalogue import catalogue

        print(catalogue(load_registry(plugins), kind))


@app.command()
def show(
    what: Annotated[str, typer.Argument(metavar="RECIPE|KIND|sites", help="a recipe, a kind, or the word sites")],
    name: Annotated[str | None, typer.Argument(help="of that kind; after the word sites, a recipe")] = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="every value with where it came from")] = False,
    overrides: SetOption = [],  # noqa: B006
    profile: ProfileOption = None,
    plugins: PluginOption = [],  # noqa: B006
    verbose: VerboseOption = False,
) -> None:
    """Show a recipe, the sites of its model, or one name of a kind: show policy uniform."""
    with told(verbose):
        if name is None:
            _needs_no_name(what)
            loaded = _load(what, overrides, plugins, profile)
            print(_resolved(loaded) if resolved else loaded.text)
        elif what == "sites":
            print(_sites(_load(name, overrides, plugins, profile)))
        else:
            print(_described(what, name, plugins))


def _needs_no_name(what: str) -> None:
    from quantlab.plugins import Kind

    kind = next((kind for kind in Kind if what in (kind.value, kind.plural)), None)
    if kind or what == "sites":
        known = f"the names: quantlab list {kind.plural if kind else 'recipes'}"
        raise RecipeError(f'"{what}" needs a name after it', next_step=f"quantlab show {what} NAME; {known}")


def _resolved(loaded: LoadedRecipe) -> str:
    from quantlab.recipe.explain import explain

    return explain(loaded)


def _sites(loaded: LoadedRecipe) -> str:
    from quantlab.run import site_table

    return site_table(loaded)


def _described(kind: str, name: str, plugins: list[Path]) -> str:
    from quantlab.plugins import load_registry
    from quantlab.recipe.catalogue import describe, kind_of

    return describe(load_registry(plugins).find(kind_of(kind), name))


@app.command()
def validate(
    recipes: Annotated[list[str], typer.Argument(metavar="FILE...", help="recipes and benches, as files or by name")],
    overrides: SetOption = [],  # noqa: B006
    profile: ProfileOption = None,
    plugins: PluginOption = [],  # noqa: B006
    verbose: VerboseOption = False,
) -> None:
    """Check keys, types, values, names and options of recipes and benches; site patterns need --dry-run."""
    with told(verbose):
        from quantlab.plugins import load_registry

        registry = load_registry(plugins)
        for recipe in recipes:
            print(_validated(recipe, overrides, registry, profile))


def _validated(name: str, overrides: list[str], registry: Registry, profile: str | None) -> str:
    from quantlab.recipe.find import find_recipe
    from quantlab.recipe.load import is_bench, load_recipe

    path = find_recipe(name)
    if not is_bench(path):
        loaded = load_recipe(name, overrides, registry, profile)
        return f"{loaded.path}: valid; method {loaded.recipe.method}, {len(loaded.recipe.baselines)} baselines"
    if overrides or profile:
        raise RecipeError("a bench sets its values itself", where=str(path), got="--set or --profile")
    from quantlab.bench import cells

    return f"{path}: valid; a bench of {len(cells(path, registry))} cells"


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option("--output", help="a file; standard output without it")] = None,
    plugins: PluginOption = [],  # noqa: B006
    verbose: VerboseOption = False,
) -> None:
    """Write the JSON schema of recipes, with the options of the plugins that are installed, for editors."""
    with told(verbose):
        from quantlab.plugins import load_registry
        from quantlab.recipe.json_schema import recipe_schema
        from quantlab.recipe.starter import write_schema
        from quantlab.store import json_text

        registry = load_registry(plugins)
        print(write_schema(output, registry) if output else json_text(recipe_schema(registry)))


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="the recipe to write")] = Path("recipe.yaml"),
    plugins: PluginOption = [],  # noqa: B006
    verbose: VerboseOption = False,
) -> None:
    """Write a recipe to begin with, and the schema that an editor checks it with."""
    with told(verbose):
        from quantlab.plugins import load_registry
        from quantlab.recipe.starter import write_starter

        written = write_starter(path, load_registry(plugins))
        print(f"{written}\nnext: quantlab run {written} --profile smoke")


@app.command()
def migrate(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="a recipe of an older version")],
    write: Annotated[bool, typer.Option("--write", help="replace the file; print without it")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Bring a recipe of an older version forward; comments but the first are lost."""
    with told(verbose):
        from quantlab.recipe.migrate import migrated
        from quantlab.store import atomic_write_text

        text = migrated(path)
        if text is not None and write:
            atomic_write_text(path, text)
        print(f"{path}: is of the current version, nothing to do" if text is None else path if write else text)


@new_app.callback()
def new() -> None:
    """Write a new package."""


@new_app.command("plugin")
def new_plugin(
    name: Annotated[str, typer.Argument(help="what recipes will call it, such as weight-range")],
    kind: Annotated[str, typer.Option("--kind", help="policy, quantizer, loss, ...: quantlab list --help")],
    output: Annotated[Path, typer.Option("--output", help="the folder that gets quantlab-NAME")] = Path(),
    verbose: VerboseOption = False,
) -> None:
    """Write a small package with one working plugin, its tests and an example recipe."""
    with told(verbose):
        from quantlab.plugins import load_registry
        from quantlab.recipe.catalogue import kind_of
        from quantlab.scaffold import new_plugin as write_plugin

        folder = write_plugin(name, kind_of(kind), output, load_registry())
        print(f"{folder}\nnext: cd {folder} && pip install -e . && pytest")


@app.command()
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


@runs_app.callback()
def runs(context: typer.Context, runs_dir: RunsOption = RUNS, verbose: VerboseOption = False) -> None:
    """List run folders: recipe, time, state, size."""
    context.obj = runs_dir
    if context.invoked_subcommand is None:
        with told(verbose):
            from quantlab.store import list_runs

            records = list_runs(runs_dir)
            for record in records:
                state = "complete" if record.complete else "unfinished"
                print(f"{record.path}  {record.created}  {state}  {record.size_bytes / 2**20:.1f} MiB")
            if not records:
                print(f"no runs in {runs_dir}", file=sys.stderr)


@runs_app.command()
def clean(
    context: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="all stored stages, and the runs themselves")] = False,
    runs_dir: Annotated[Path | None, typer.Option("--runs-dir", help="where run folders are written")] = None,
    verbose: VerboseOption = False,
) -> None:
    """Delete stored stages that no run links to, and damaged ones."""
    with told(verbose):
        from quantlab.store import clean_runs

        deleted = clean_runs(runs_dir or context.obj, everything=everything)
        for path in deleted:
            print(f"deleted {path}")
        if not deleted:
            print(f"nothing to delete in {runs_dir or context.obj}", file=sys.stderr)


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def bench(
    recipe: RecipeArgument,
    plugins: PluginOption = [],  # noqa: B006
    runs_dir: RunsOption = RUNS,
    only: OnlyOption = [],  # noqa: B006
    jobs: JobsOption = 1,
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
        result = run_bench(recipe, registry, runs_dir, console, only, launcher_for(jobs, registry))
        print(result.table(wanted))
    if result.failures:
        raise typer.Exit(1)


@app.command()
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
        _leave("not comparable, so ranked apart; the protocols differ in\n  " + "\n  ".join(comparison.differing), 1)


@app.command()
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
        asked = Sweep(recipe, varied, seeds_from(seeds), overrides, profile, by, results)
        registry, console = load_registry(plugins), make_console(verbose=verbose, quiet=quiet)
        result = run_sweep(asked, registry, runs_dir, console, launcher_for(jobs, registry))
        print(result.table(wanted))
        console.info(f"picture: {result.write()}")
    if result.bench.failures:
        raise typer.Exit(1)


@zoo_app.command("train")
def zoo_train(
    name: Annotated[
        str,
        typer.Argument(
            help="a denoiser, the classifier that judges it (digits-classifier, shapes-classifier), or digits-vit"
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="folder for the weights")] = Path("zoo"),
    verbose: VerboseOption = False,
) -> None:
    """Train a model that ships once more on one core, digits in minutes, shapes in two hours; a stopped one goes on."""
    with told(verbose):
        from quantlab.zoo.train import train

        print(train(name, output, _log))


@zoo_app.command("check")
def zoo_check(
    name: Annotated[str, typer.Argument(help="a denoiser that ships: digits, digits-heavy or shapes")],
    samples: Annotated[int, typer.Option("--samples", min=200, help="how many images to draw")] = 3000,
    steps: Annotated[int, typer.Option("--steps", min=1, help="denoising steps")] = 20,
    verbose: VerboseOption = False,
) -> None:
    """Measure a model that ships against the data, beside what real images give."""
    with told(verbose):
        from quantlab.api import check_zoo

        print(check_zoo(name, samples, steps))


def _log(iteration: int, iterations: int, loss: float) -> None:
    if iteration % max(1, iterations // 20) == 0:
        print(f"{iteration}/{iterations}  loss {loss:.4f}", file=sys.stderr)


def _stop(number: int, frame: object) -> NoReturn:
    """End as after Ctrl-C, so that nothing half-written stays, with the signal's own exit code."""
    raise Stopped(128 + number)


def main() -> None:
    """Entry point of the ``quantlab`` command."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _stop)
    app()
