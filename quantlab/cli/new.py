"""``quantlab new``: packages to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli.common import VerboseOption, told

KINDS = "one of method, model, pass, policy, sampler, quantizer, tuner, loss, correction, metric, reporter"

new_app = typer.Typer(help="Write a new package.", no_args_is_help=True)


@new_app.callback()
def new() -> None:
    """Write a new package."""


@new_app.command("plugin")
def new_plugin(
    name: Annotated[str, typer.Argument(help="what recipes will call it, such as weight-range")],
    kind: Annotated[str, typer.Option("--kind", help=KINDS)],
    output: Annotated[Path, typer.Option("--output", help="the folder that gets quantlab-NAME")] = Path(),
    verbose: VerboseOption = False,
) -> None:
    """Write a small package with one working plugin, its tests and an example recipe."""
    with told(verbose):
        from quantlab.plugins import load_registry
        from quantlab.recipe.catalogue import kind_of
        from quantlab.scaffold import new_plugin as write_plugin

        folder = write_plugin(name, kind_of(kind), output, load_registry())
        print(f'{folder}\nnext: cd {folder} && pip install -e ".[test]" && pytest')
