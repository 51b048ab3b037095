"""The command line: each command reads its options, calls one function and prints what it returns."""

from __future__ import annotations

import signal
from typing import Annotated, NoReturn

import typer

from quantlab.cli import benches, models, recipes
from quantlab.cli.common import INTERRUPTED
from quantlab.cli.new import new_app
from quantlab.cli.runs import runs_app
from quantlab.cli.zoo import zoo_app
from quantlab.errors import Stopped

__all__ = ["INTERRUPTED", "app", "main"]

app = typer.Typer(
    help="Mixed-precision quantization of diffusion and vision models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"quantlab {version('quantlab')}")
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Mixed-precision quantization of diffusion and vision models."""


app.command("run")(models.run)
app.command("reproduce")(models.reproduce)
app.command("list")(recipes.list_names)
app.command("show")(recipes.show)
app.command("validate")(recipes.validate)
app.command("schema")(recipes.schema)
app.command("init")(recipes.init)
app.command("migrate")(recipes.migrate)
app.command("doctor")(models.doctor)
app.command("sample")(models.sample)
app.command("pack")(models.pack)
app.command("export")(models.export)
app.command("execute")(models.execute)
app.command("bench")(benches.bench)
app.command("compare")(benches.compare)
app.command("sweep")(benches.sweep)
app.add_typer(new_app, name="new")
app.add_typer(runs_app, name="runs")
app.add_typer(zoo_app, name="zoo")


def _stop(number: int, frame: object) -> NoReturn:
    """End as after Ctrl-C, so that nothing half-written stays, with the signal's own exit code."""
    raise Stopped(128 + number)


def main() -> None:
    """Entry point of the ``quantlab`` command."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _stop)
    app()
