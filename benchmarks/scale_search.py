"""The MSE search for weight scales: 80 candidates a channel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.measure import Case
from benchmarks.reference import mse_search_by_channel
from benchmarks.saved import peak_mib
from quantlab.contracts.quant import Observer
from quantlab.quant.functional import search_scale

SHAPES = ((320, 1280), (1280, 1280), (128, 512 * 9), (512, 512 * 9))
QUICK_SHAPES = SHAPES[:1]


def weight_of(rows: int, length: int) -> Tensor:
    """Gaussian rows of standard deviation 0.02, every seventh three times as wide."""
    weight = torch.randn(rows, length, generator=torch.Generator().manual_seed(rows)) * 0.02
    weight[::7] *= 3
    return weight


def cases(quick: bool) -> Iterator[Case]:
    """One case for each shape and width."""
    for rows, length in QUICK_SHAPES if quick else SHAPES:
        for bits in (4,) if quick else (2, 3, 4):
            yield _case(weight_of(rows, length), bits)


def _case(weight: Tensor, bits: int) -> Case:
    widths = torch.full((len(weight),), bits)
    reference = mse_search_by_channel(weight, bits)
    arms = {"loop over channels": lambda: mse_search_by_channel(weight, bits)}
    facts = {}
    for name, compiled in (("quantlab", False), ("quantlab, compiled", True)):
        arms[name] = lambda compiled=compiled: search_scale(weight, widths, Observer.MSE, compiled=compiled)
        scale, zero_point = arms[name]()
        same = (scale == reference[0]) & (zero_point == reference[1])
        memory = peak_mib(arms[name]) / (weight.nbytes / 2**20)
        facts[name] = f"same choice on {100 * same.double().mean():.4g} % of channels; {memory:.2g} weights of memory"
    goal = {"quantlab, compiled": "at least 20"}
    work = f"MSE search, [{weight.shape[0]}, {weight.shape[1]}], {bits} bits"
    return Case("Scale search", work, "loop over channels", arms, facts, goal, slow=("loop over channels",))
