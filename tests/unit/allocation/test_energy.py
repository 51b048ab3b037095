"""Energy-aware allocation: at equal mean bits the estimate never rises, and nothing else finds less."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantlab.allocation.energy import EnergyConfig, EnergyPolicy, Moments, Scope, channel_errors
from quantlab.calibration.stats import SiteRecord, TensorSiteData
from quantlab.contracts.allocation import AllocationProblem, BitMap, Resource
from quantlab.contracts.quant import Observer
from quantlab.contracts.scores import Score, ScoreRequest
from quantlab.contracts.sections import Budget
from quantlab.contracts.site import Site, SiteKind, Slot
from quantlab.quant.functional import fake_quantize, search_scale


def weight_of(seed: int, channels: int, inputs: int) -> Tensor:
    """Channels of very different size and tails."""
    rng = torch.Generator().manual_seed(seed)
    size = torch.randn(channels, 1, generator=rng).exp()
    return size * torch.randn(channels, inputs, generator=rng) ** 3


def problem_of(weights: dict[str, Tensor], bits: dict[str, int], budget: int, **more) -> AllocationProblem:
    """Linear layers with inputs of unequal energy."""
    rng = torch.Generator().manual_seed(0)
    records, sites = {}, []
    for name, weight in weights.items():
        layer = nn.Linear(*weight.shape[::-1], bias=False).requires_grad_(False)
        layer.weight.data = weight
        x = torch.randn(40, weight.shape[1], generator=rng) * torch.linspace(0.2, 3.0, weight.shape[1])
        records[name] = SiteRecord.of_layer(layer, (x,))
        slot = Slot("input", (1, weight.shape[1]))
        sites.append(Site(name, SiteKind.LINEAR, tuple(weight.shape), weight.numel(), (slot,)))
    given_bits = BitMap(
        {name: torch.full((len(weight),), bits[name], dtype=torch.int8) for name, weight in weights.items()},
        {(name, "input"): 4 for name in weights},
    )
    scores = more.pop("scores", None)
    budgets = Budget(weight_bits=budget, activation_bits=4)
    data = TensorSiteData(records, scores)
    return AllocationProblem(sites, data, budgets, given_bits, torch.Generator().manual_seed(0), **more)


def allocated(problem: AllocationProblem, **options) -> dict[str, Tensor]:
    return dict(EnergyPolicy(EnergyConfig(**options)).allocate(problem).weight_bits)


def estimate(problem: AllocationProblem, bits: dict[str, Tensor], moments: Moments = Moments.DIAGONAL) -> float:
    total = 0.0
    for site in problem.sites:
        errors = channel_errors(problem.data, site, range(1, 9), Observer.MSE, moments)
        total += errors.gather(1, bits[site.name].long()[:, None] - 1).sum().item()
    return total


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 8), st.integers(1, 7), st.sampled_from(Moments))
def test_equal_mean_and_never_worse_than_uniform(
    seed: int, channels: int, bits: int, spread: int, moments: Moments
) -> None:
    problem = problem_of({"a": weight_of(seed, channels, 12)}, {"a": bits}, bits)
    found = allocated(problem, spread=spread, moments=moments)
    assert found["a"].double().mean() == bits
    assert (found["a"] - bits).abs().max() <= spread and found["a"].min() >= 1 and found["a"].max() <= 8
    before = estimate(problem, dict(problem.given.weight_bits), moments)
    assert estimate(problem, found, moments) <= before * (1 + 1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 4))
def test_nothing_with_the_same_mean_is_better(seed: int, channels: int, bits: int) -> None:
    problem = problem_of({"a": weight_of(seed, channels, 8)}, {"a": bits}, bits)
    errors = channel_errors(problem.data, problem.sites[0], range(1, 9), Observer.MSE, Moments.DIAGONAL)
    mixes = itertools.product((bits - 1, bits, bits + 1), repeat=channels)
    best = min(
        sum(errors[o, width - 1].item() for o, width in enumerate(mix)) for mix in mixes if sum(mix) == bits * channels
    )
    assert estimate(problem, allocated(problem)) == pytest.approx(best)


def test_equal_channels_stay_uniform() -> None:
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    problem = problem_of({"a": row.repeat(10, 1)}, {"a": 3}, 3)
    for scope in Scope:
        assert allocated(problem, scope=scope)["a"].tolist() == [3] * 10


def test_channels_without_weights_are_left_alone() -> None:
    problem = problem_of({"a": torch.zeros(6, 8)}, {"a": 2}, 2)
    for scope in Scope:
        assert allocated(problem, scope=scope)["a"].tolist() == [2] * 6


def test_large_channels_take_bits_from_small_ones() -> None:
    """Two sizes of the same rows: mixing pays from an energy ratio of about (e1 - e2) / (e2 - e3) on."""
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.cat([rows * 5, rows])
    found = allocated(problem_of({"a": weight}, {"a": 2}, 2))["a"]
    assert found.tolist() == [3] * 4 + [1] * 4


def test_layers_keep_the_bits_that_another_policy_gave_them() -> None:
    weights = {"a": weight_of(0, 8, 8), "b": weight_of(1, 8, 8), "c": weight_of(2, 8, 8)}
    found = allocated(problem_of(weights, {"a": 2, "b": 4, "c": 8}, 4))
    assert [found[name].double().mean().item() for name in "abc"] == [2, 4, 8]
    assert found["c"].tolist() == [8] * 8 or found["c"].max() <= 8


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.sampled_from([None, Score.FISHER, Score.NETWORK_SQNR]))
def test_among_layers_channels_pay_by_their_weights(seed: int, bits: int, sensitivity: Score | None) -> None:
    weights = {"a": weight_of(seed, 6, 4), "b": weight_of(seed + 1, 5, 20), "c": weight_of(seed + 2, 9, 12)}
    scores = {}
    if sensitivity:
        sign = -1 if sensitivity.in_decibels else 1
        request = ScoreRequest(sensitivity, (bits,))
        scores = {request: {n: torch.tensor([sign * (i + 1.0)]).double() for i, n in enumerate(weights)}}
    problem = problem_of(weights, dict.fromkeys(weights, bits), bits, scores=scores)
    found = allocated(problem, scope=Scope.NETWORK, sensitivity=sensitivity)
    spent = sum((found[name].long().sum() * weight.shape[1]).item() for name, weight in weights.items())
    whole = sum(weight.numel() * bits for weight in weights.values())
    assert whole - 4 < spent <= whole, "what is left buys no channel of the narrowest layer"
    if sensitivity is None:
        assert estimate(problem, found) <= estimate(problem, dict(problem.given.weight_bits)) * (1 + 1e-12)


def test_the_sensitivity_decides_between_layers() -> None:
    """Two equal layers, one of which matters a thousand times more."""
    weight = weight_of(0, 8, 16)
    request = ScoreRequest(Score.OUTPUT_KL, (3,))
    scores = {request: {"a": torch.tensor([1e-3]).double(), "b": torch.tensor([1.0]).double()}}
    problem = problem_of({"a": weight, "b": weight}, {"a": 3, "b": 3}, 3, scores=scores)
    found = allocated(problem, scope=Scope.NETWORK, sensitivity=Score.OUTPUT_KL)
    assert found["b"].double().mean() > 3.5 and found["a"].double().mean() < 2.5


def test_bit_operations_are_kept_among_layers() -> None:
    weights = {"a": weight_of(0, 8, 16), "b": weight_of(1, 8, 16) * 100}
    problem = problem_of(weights, {"a": 3, "b": 3}, 3, limits={Resource.BIT_OPERATIONS: 2 * 128 * 3 * 4.0})
    found = allocated(problem, scope=Scope.NETWORK)
    assert sum(bits.sum().item() * 16 * 4 for bits in found.values()) <= 2 * 128 * 3 * 4


def test_only_the_scope_of_the_network_needs_all_sites() -> None:
    assert not EnergyPolicy(EnergyConfig()).between_sites()
    assert EnergyPolicy(EnergyConfig(scope=Scope.NETWORK)).between_sites()


def relative_errors(tail: str, widths: range) -> dict[int, float]:
    """Mean squared error of 400 rows of 576 weights over their energy, with the scales that quantizers use."""
    rng = torch.Generator().manual_seed(0)
    shape = (400, 576)
    uniform = torch.rand(shape, generator=rng) * 2 - 1
    gauss = torch.randn(shape, generator=rng)
    rows = {
        "uniform": uniform,
        "gauss": gauss,
        "laplace": uniform.sign() * -torch.log1p(-uniform.abs()),
        "t3": gauss / (torch.randn(3, *shape, generator=rng).square().mean(0)).sqrt(),
    }[tail]
    errors = {}
    for width in widths:
        scale, zero = search_scale(rows, torch.full((len(rows),), width), Observer.MSE)
        noise = fake_quantize(rows, scale[:, None], zero[:, None], 2**width - 1) - rows
        errors[width] = (noise.square().sum(1) / rows.square().sum(1)).mean().item()
    return errors


def exchange_ratio(heavy: str, light: str, bits: int) -> float:
    """What a bit more on a heavy channel saves over what a bit less on a light one of equal energy loses."""
    widths = range(bits - 1, bits + 2)
    more, less = relative_errors(heavy, widths), relative_errors(light, widths)
    return (more[bits] - more[bits + 1]) / (less[bits - 1] - less[bits])


@pytest.mark.parametrize("light", ["uniform", "gauss"])
@pytest.mark.parametrize("heavy", ["laplace", "t3"])
def test_tails_alone_do_not_pay_at_two_bits(heavy: str, light: str) -> None:
    assert exchange_ratio(heavy, light, 2) < 0.5


def test_tails_alone_pay_at_four_bits() -> None:
    assert exchange_ratio("t3", "gauss", 4) > 1 and exchange_ratio("t3", "uniform", 4) > 2


def test_energy_pays_from_the_inverse_of_the_ratio_on() -> None:
    """At equal shapes the ratio of energies decides: between 3 and 5 for Gaussian channels."""
    assert all(1 / 5 < exchange_ratio("gauss", "gauss", bits) < 1 / 3 for bits in (2, 3, 4))
