"""Outlier-driven mixed quantization: the paper's rule, its options, and what broke the official code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantlab_mpqdm.kurtosis import kurtosis
from quantlab_mpqdm.omq import KurtosisConfig, KurtosisPolicy, Ranking
from torch import Tensor, nn

from quantlab import AllocationProblem, BitMap, Observer, RecipeError, Site, SiteKind, Slot
from quantlab.calibration.stats import SiteRecord, TensorSiteData
from quantlab.contracts.allocation import SiteData
from quantlab.contracts.sections import Budget


def problem_of(
    layer: nn.Linear | nn.Conv2d, x: Tensor, bits: int = 3, smoothing: Tensor | None = None, extra: float = 0.0
) -> AllocationProblem:
    record = replace(SiteRecord.of_layer(layer.requires_grad_(False), (x,)), smoothing=smoothing)
    shape = tuple(layer.weight.shape)
    site = Site("layer", SiteKind.LINEAR, shape, 1, (Slot("input", tuple(x.shape)),), groups=record.groups)
    given_bits = BitMap({"layer": torch.full(shape[:1], bits, dtype=torch.int8)}, {("layer", "input"): 8})
    budget = Budget(weight_bits=bits, activation_bits=8, extra_bit_fraction=extra)
    return AllocationProblem(
        [site], TensorSiteData({"layer": record}), budget, given_bits, torch.Generator().manual_seed(0)
    )


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight.data = weight
    return layer


def allocated(problem: AllocationProblem, **options: object) -> Tensor:
    policy = KurtosisPolicy(KurtosisConfig(**options))  # type: ignore[arg-type]
    return policy.allocate(problem).weight_bits["layer"]


def heavy_and_flat(channels: int = 20, inputs: int = 64, seed: int = 0) -> Tensor:
    """The first quarter of the channels has outliers, the last quarter two values only."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels, inputs, generator=rng)
    quarter = channels // 4
    weight[:quarter, 0] += 12
    weight[-quarter:] = weight[-quarter:].sign()
    return weight


def test_kurtosis_in_closed_form() -> None:
    signs = torch.tensor([[1.0, -1.0] * 50])
    # A fair coin has kurtosis 1 with the population's deviation; n - 1 in the deviation scales it by ((n - 1) / n)^2.
    assert kurtosis(signs).item() == pytest.approx((99 / 100) ** 2)
    gauss = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert kurtosis(gauss).item() == pytest.approx(3, abs=0.05)


def test_constant_channels_rank_last() -> None:
    weight = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    weight[1] = 7.0
    weight[2] = 0.0
    values = kurtosis(weight)
    assert values[1] == values[2] == 0 and torch.isfinite(values).all()
    policy = KurtosisPolicy(KurtosisConfig())
    assert policy.ranked(weight, torch.Generator())[-2:].tolist() == [1, 2]


def test_outliers_get_more_bits_where_it_pays() -> None:
    weight = heavy_and_flat()
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    bits = allocated(problem_of(linear(weight), x, bits=3), quantize_inputs=False)
    assert (bits > 3).any(), "two-valued channels lose nothing at two bits"
    assert set(torch.nonzero(bits > 3).flatten().tolist()) <= set(range(5))
    assert set(torch.nonzero(bits < 3).flatten().tolist()) <= set(range(15, 20))


def test_the_search_minimises_the_output_error() -> None:
    weight, rng = heavy_and_flat(seed=3), torch.Generator().manual_seed(1)
    problem = problem_of(linear(weight), torch.randn(50, 64, generator=rng))
    policy = KurtosisPolicy(KurtosisConfig())
    order = torch.argsort(kurtosis(weight), descending=True, stable=True)
    errors = {}
    for count in policy.candidates(20):
        bits = torch.full((20,), 3, dtype=torch.int8)
        bits[order[:count]] += 1
        bits[order[20 - count :]] -= 1
        errors[count] = problem.data.output_error("layer", bits, Observer.MSE, 8)
    found = allocated(problem)
    assert int((found > 3).sum()) == min(errors, key=errors.__getitem__)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 33), st.integers(2, 6), st.sampled_from(list(Ranking)))
def test_mean_bits_are_the_budget(seed: int, channels: int, bits: int, ranking: Ranking) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels, 9, generator=rng) ** 3
    problem = problem_of(linear(weight), torch.randn(12, 9, generator=rng), bits)
    for options in ({}, {"force": 1}):
        found = allocated(problem, ranking=ranking, **options)
        assert found.double().mean().item() == bits
        assert (found > bits).sum() == (found < bits).sum() <= channels // 2


def test_permuted_channels_give_permuted_bits() -> None:
    weight, rng = heavy_and_flat(seed=5), torch.Generator().manual_seed(2)
    x, order = torch.randn(40, 64, generator=rng), torch.randperm(20, generator=rng)
    one = allocated(problem_of(linear(weight), x))
    other = allocated(problem_of(linear(weight[order].contiguous()), x))
    # Two-valued channels have equal kurtosis, so only the widths' counts of that part are determined.
    assert torch.equal((one > 3)[order], other > 3)
    assert sorted(one.tolist()) == sorted(other.tolist())


def test_equal_kurtosis_puts_no_channel_in_two_groups() -> None:
    weight = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).repeat(20, 1)
    found = allocated(problem_of(linear(weight), torch.randn(8, 16)), force=3)
    assert sorted(found.tolist()) == [2] * 6 + [3] * 8 + [4] * 6


def test_dead_channels_and_inputs() -> None:
    weight = heavy_and_flat()
    weight[2] = 0.0
    weight[:, 5] = 0.0
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    x[:, 7] = 0.0
    found = allocated(problem_of(linear(weight), x))
    assert found.double().mean().item() == 3


def test_fewer_than_ten_channels() -> None:
    weight = heavy_and_flat(channels=8)
    problem = problem_of(linear(weight), torch.randn(30, 64, generator=torch.Generator().manual_seed(0)))
    assert KurtosisPolicy(KurtosisConfig()).candidates(8) == [0, 1, 2, 3, 4]
    assert allocated(problem).double().mean().item() == 3
    # The released code cannot split such a layer.
    assert allocated(problem, small_layers=False).tolist() == [3] * 8


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolution(groups: int) -> None:
    layer = nn.Conv2d(8, 12, 3, groups=groups, bias=False)
    smoothing = torch.linspace(0.5, 2.0, 8)
    problem = problem_of(layer, torch.randn(2, 8, 6, 6), smoothing=smoothing)
    uniform = torch.full((12,), 8, dtype=torch.int8)
    assert problem.data.output_error("layer", uniform, Observer.MIN_MAX, None) < 1e-3
    assert allocated(problem).double().mean().item() == 3


def test_linear_over_four_dimensions() -> None:
    layer = linear(heavy_and_flat())
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0))
    smoothing = torch.linspace(0.5, 2.0, 64)
    four = allocated(problem_of(layer, x, smoothing=smoothing))
    two = allocated(problem_of(layer, x.flatten(0, 2), smoothing=smoothing))
    assert torch.equal(four, two)


@pytest.mark.parametrize("bits", [1, 8])
def test_bits_without_room_are_an_error(bits: int) -> None:
    with pytest.raises(RecipeError, match="no room for mixing") as error:
        allocated(problem_of(linear(heavy_and_flat()), torch.randn(4, 64), bits=bits))
    assert "2 to 7" in str(error.value)


def test_plus_gives_a_tenth_of_the_channels_one_more_bit() -> None:
    weight = heavy_and_flat()
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    plain = allocated(problem_of(linear(weight), x))
    plus = allocated(problem_of(linear(weight), x, extra=0.1))
    gained = torch.nonzero(plus > plain).flatten()
    assert len(gained) == 2 and (plus - plain).sum() == 2
    order = torch.argsort(kurtosis(weight), descending=True, stable=True)
    split = int((plain > 3).sum())
    assert set(gained.tolist()) == set(order[split : split + 2].tolist())


@pytest.mark.parametrize(("channels", "split", "gained"), [(20, 10, 2), (20, 6, 2), (6, 3, 1), (6, 0, 1), (15, 0, 1)])
def test_plus_pays_out_whatever_the_split(channels: int, split: int, gained: int) -> None:
    weight = torch.randn(channels, 32, generator=torch.Generator().manual_seed(0))
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(1))
    force = split // max(1, channels // 10)
    plain = allocated(problem_of(linear(weight), x), force=force)
    plus = allocated(problem_of(linear(weight), x, extra=0.1), force=force)
    assert int((plain > 3).sum()) == split
    assert (plus - plain).sum() == gained and (plus >= plain).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(-30, 30))
def test_kurtosis_does_not_depend_on_scale(seed: int, exponent: int) -> None:
    rows = torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)) ** 3
    assert torch.equal(kurtosis(rows), kurtosis(rows * 2.0**exponent))


@pytest.mark.parametrize("offsets", [[-1, 0, 2], [0, 0, 0], [-1, 1, 1]])
def test_offsets_must_keep_the_mean(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="mean bits stay"):
        KurtosisConfig(offsets=offsets)  # type: ignore[arg-type]


@pytest.mark.parametrize("observer", [Observer.MSE, Observer.MIN_MAX])
@pytest.mark.parametrize("input_bits", [None, 4, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_choice_by_channel_errors_is_that_of_the_outputs(
    observer: Observer, input_bits: int | None, groups: int
) -> None:
    rng = torch.Generator().manual_seed(groups)
    conv = nn.Conv2d(8, 40, 3, padding=1, groups=groups)
    conv.weight.data = torch.randn(conv.weight.shape, generator=rng) * torch.rand(40, 1, 1, 1, generator=rng)
    for layer, x in [
        (linear(heavy_and_flat(40)), torch.randn(30, 64, generator=rng)),
        (conv, torch.randn(6, 8, 7, 7, generator=rng)),
    ]:
        problem = problem_of(layer, x)
        data, policy = problem.data, KurtosisPolicy(KurtosisConfig())
        order = policy.ranked(data.weight("layer"), problem.rng)
        given = problem.given.weight_bits["layer"]
        candidates = [policy._bits(problem.sites[0], given, order, count) for count in policy.candidates(40)]
        chosen = data.best_bits("layer", candidates, observer, input_bits)
        assert chosen == SiteData.best_bits(data, "layer", candidates, observer, input_bits)
        assert chosen == data.best_bits("layer", [*candidates, candidates[chosen]], observer, input_bits)


def test_a_search_whose_errors_are_all_zero_takes_the_first() -> None:
    problem = problem_of(linear(torch.zeros(20, 8)), torch.randn(9, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(allocated(problem), torch.full((20,), 3, dtype=torch.int8))
