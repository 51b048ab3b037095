"""A low-rank branch in float takes over what low-bit weights do worst.

Li et al., *SVDQuant*, ICLR 2025, arXiv 2411.05007: y = Q(x / s) Q(R) + (x / s) L, with W s = L + R.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, cast

from pydantic import Field
from torch import Tensor

from quantlab import (
    QuantizedLayer,
    RecipeError,
    Strict,
    TuneJob,
    Tuner,
    TuneResult,
    visit_layers,
)


class SvdQuantConfig(Strict):
    """Options of the ``svdquant`` tuner."""

    rank: int | None = Field(None, ge=1, description="of the branch; none: tune.rank")
    refits: int = Field(
        100, ge=0, description="fits of the branch to what the quantized rest leaves, while the layer's error falls"
    )


class SvdQuantTuner(Tuner):
    """Splits each weight into a low-rank float branch and a rest that is quantized."""

    name: ClassVar[str] = "svdquant"
    paper: ClassVar[str | None] = "SVDQuant, ICLR 2025, arXiv 2411.05007"
    version: ClassVar[int] = 1
    Config = SvdQuantConfig

    def __init__(self, config: SvdQuantConfig) -> None:
        self.config = config

    def tune(self, job: TuneJob) -> TuneResult:
        """Split every layer in the graph's order, on the inputs that the split layers before it give.

        The history has, layer by layer, the mean squared error of the output: "total", "first" before any refit, and
        "quantized" without a branch.

        Raises:
            RecipeError: a layer allows no branch.
        """
        layers = cast(Mapping[str, QuantizedLayer], job.layers)
        history: dict[str, list[float]] = {"total": [], "first": [], "quantized": []}
        rank = self.config.rank or job.settings.rank
        for name, layer in layers.items():
            if not layer.allows_branch:
                raise RecipeError(
                    "a transposed convolution has no low-rank branch",
                    where=f"tune.tuners, site {name}",
                    next_step=f'keep the layer outside the budget: keep: [{{match: "{name}", bits: 8}}]',
                )

        def visit(name: str, x: Tensor, timestep: Tensor | None) -> None:
            layer = layers[name]
            target = layer.apply_weight(layer.smoothed_input(x), layer.float_weight(), layer.bias)
            history["quantized"].append(_error(layer, x, timestep, target))
            errors = split(layer, x, timestep, rank, self.config.refits)
            history["first"].append(errors[0])
            history["total"].append(min(errors))
            job.progress(len(history["total"]), len(layers))

        visit_layers(layers, lambda: job.student(job.batch.inputs), visit)
        return TuneResult(history)


def split(layer: QuantizedLayer, x: Tensor, timestep: Tensor | None, rank: int, refits: int) -> list[float]:
    """Give a layer a branch and take it out of the weight, in place.

    The branch is first the best of its rank for the whole weight, then again and again for what the quantized rest does
    not give, W s - Q(R); the split with the smallest output error is kept.

    Args:
        layer: with smoothing and quantizers in place.
        x: its input, before smoothing.
        timestep: of x.
        rank: of the branch.
        refits: at most so many; the first that does not lower the error ends them.

    Returns:
        the mean squared error of the layer's output after each fit.
    """
    whole = layer.float_weight().clone()
    target = layer.apply_weight(layer.smoothed_input(x), whole, layer.bias)
    layer.add_branch(rank)
    branch = layer.branch
    assert branch is not None
    errors: list[float] = []
    wanted, best = whole, math.inf
    for _ in range(refits + 1):
        before = branch.A.data, branch.B.data
        branch.fit(wanted)
        quantize_rest(layer, whole)
        errors.append(_error(layer, x, timestep, target))
        if errors[-1] >= best:
            branch.A.data, branch.B.data = before
            quantize_rest(layer, whole)
            break
        best, wanted = errors[-1], whole - layer.quantized_weight()
    return errors


def quantize_rest(layer: QuantizedLayer, whole: Tensor) -> None:
    """Make the layer's weight what its branch leaves of ``whole`` [out, in / groups, *k], and find its scales again."""
    assert layer.branch is not None
    layer.set_float_weight(whole - layer.branch.product())
    if layer.weight_quantizer is not None:
        layer.weight_quantizer.observe(layer.float_weight())
        layer.weight_quantizer.freeze()


def _error(layer: QuantizedLayer, x: Tensor, timestep: Tensor | None, target: Tensor) -> float:
    return float((layer.forward(x, timestep) - target).square().mean())
