"""Fake quantization of a weight, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.measure import Arm, Case
from benchmarks.peers import weight_quantizers
from benchmarks.reference import masked_sum
from benchmarks.saved import saved_mib
from quantlab.contracts.quant import Observer
from quantlab.quant.functional import fake_quantize, per_channel, search_scale

SHAPES = ((1280, 1280), (512, 512, 3, 3))


def cases(quick: bool) -> Iterator[Case]:
    """Mixed widths beside masked passes, and one width beside the peers."""
    for shape in SHAPES[:1] if quick else SHAPES:
        yield _mixed(shape)
    yield _one_width(SHAPES[0])


def _parts(shape: tuple[int, ...], bits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=rng) * 0.02
    found = search_scale(weight.flatten(1), bits, Observer.MIN_MAX)
    scale, zero_point = (per_channel(value, len(shape)).requires_grad_() for value in found)
    return weight.requires_grad_(), scale, zero_point, per_channel(bits, len(shape)), torch.randn(shape, generator=rng)


def _mixed(shape: tuple[int, ...]) -> Case:
    weight, scale, zero_point, bits, upstream = _parts(shape, torch.arange(shape[0]) % 3 + 3)
    levels = 2.0**bits - 1
    forwards: dict[str, Callable[[], Tensor]] = {
        "three masked passes": lambda: masked_sum(weight, scale, zero_point, bits),
        "quantlab": lambda: fake_quantize(weight, scale, zero_point, levels),
        "quantlab, compiled": lambda: fake_quantize(weight, scale, zero_point, levels, compiled=True),
    }
    expected = forwards["three masked passes"]()
    size = weight.numel() * 4 / 2**20
    facts = {
        name: f"saves {saved_mib(forward) / size:.2f} weights; "
        + ("forward bitwise equal" if torch.equal(forward(), expected) else "forward differs")
        for name, forward in forwards.items()
    }
    arms: dict[str, Arm] = {
        name: lambda forward=forward: torch.autograd.grad(forward(), (weight, scale, zero_point), upstream)
        for name, forward in forwards.items()
    }
    goal = {"quantlab": "at least 4", "quantlab, compiled": "at least 30"}
    work = f"forward and backward, {list(shape)}, 3/4/5 bits"
    return Case("Fake quantization of a weight", work, "three masked passes", arms, facts, goal)


def _one_width(shape: tuple[int, ...]) -> Case:
    weight, scale, zero_point, bits, upstream = _parts(shape, torch.full(shape[:1], 4))
    levels = 2.0**bits - 1
    fixed = scale.detach(), zero_point.detach()
    arms: dict[str, Arm] = {
        "quantlab, compiled": lambda: torch.autograd.grad(
            fake_quantize(weight, scale, zero_point, levels, compiled=True), (weight, scale, zero_point), upstream
        ),
        "quantlab, compiled, fixed scales": lambda: torch.autograd.grad(
            fake_quantize(weight, *fixed, levels, compiled=True), (weight,), upstream
        ),
        "quantlab": lambda: torch.autograd.grad(
            fake_quantize(weight, scale, zero_point, levels), (weight, scale, zero_point), upstream
        ),
        **weight_quantizers(weight, upstream),
    }
    goal = {"torchao, compiled": "at least 1 (quantlab not behind)"}
    work = f"forward and backward, {list(shape)}, 4 bits"
    return Case("Fake quantization beside peers", work, "quantlab, compiled", arms, {}, goal, slower_than_baseline=True)
