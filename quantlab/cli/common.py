"""What the commands have in common: their options, and how an error ends them."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from quantlab.errors import QuantlabError, Stopped, unforeseen
from quantlab.report.formats import TableFormat

if TYPE_CHECKING:
    from quantlab.recipe.load import LoadedRecipe

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 plus the signal's number, as in a shell."""

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
ReportOption = Annotated[
    list[str],
    typer.Option("--report-to", metavar="REPORTER", help="keep a record there: mlflow, 'mlflow: {experiment: x}'"),
]
ByOption = Annotated[str, typer.Option("--by", metavar="METRIC", help="the metric that methods are judged by")]
BudgetOption = Annotated[list[str], typer.Option("--budget", metavar="KEY=A,B", help="another key of the budget")]
FormatOption = Annotated[TableFormat, typer.Option("--format", help="of the table on standard output")]
RUNS = Path("runs")


@contextmanager
def told(verbose: bool = False) -> Generator[None]:
    """Turn errors into one message and an exit code; with ``verbose``, the traceback as well."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever reads has left, as ``head`` does: typer ends quietly
    except Exception as error:
        if verbose:
            traceback.print_exc()
        known = error if isinstance(error, QuantlabError) else unforeseen(error)
        leave(f"error: {known}", known.exit_code)
    except (KeyboardInterrupt, Stopped) as stop:
        code = stop.args[0] if stop.args else INTERRUPTED
        leave("stopped; the same command goes on after the last finished stage or checkpoint", code)


def leave(message: str, code: int) -> NoReturn:
    """End with a message on standard error and an exit code."""
    print(message, file=sys.stderr)
    raise typer.Exit(code)


def load(recipe: str, overrides: list[str], plugins: list[Path], profile: str | None) -> LoadedRecipe:
    """The checked recipe; raises RecipeError as ``load_recipe`` does."""
    from quantlab.plugins import load_registry
    from quantlab.recipe.load import load_recipe

    return load_recipe(recipe, overrides, load_registry(plugins), profile)
