"""``quantlab zoo``: the models that ship."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli.common import VerboseOption, told

zoo_app = typer.Typer(help="The models that ship.", no_args_is_help=True)


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
