"""``quantlab runs``: what lies in the folder of runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli.common import RUNS, RunsOption, VerboseOption, told

runs_app = typer.Typer(help="List run folders, and clean what was stored.", invoke_without_command=True)


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
