"""GPTQ against an independent scalar computation, in closed form, and in a network."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantlab_ptq.gptq import Grid, input_rows, output_error, quantize_rows, second_moment
from quantlab_ptq.tuners import GptqConfig, GptqTuner
from torch import Tensor, nn
from torch.nn import functional as F
from toys import make_toy, split_toy, tune_job
from tuning_jobs import assigned

from quantlab import NonFiniteError, PerChannel, QuantSpec, RecipeError
from quantlab.quant.functional import search_scale
from quantlab.quant.layers import to_quantized
from quantlab.quant.quantizers import AffineConfig, AffineQuantizer


def correlated(seed: int, samples: int, fan: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(samples, fan, generator=rng) @ torch.randn(fan, fan, generator=rng)


def grid_of(weight: Tensor, bits: Tensor, *, free: float = 0.0) -> Grid:
    """The MSE grid of rows [rows, fan] in one group."""
    from quantlab.contracts.quant import Observer

    scale, zero_point = (value.double()[None, :, None] for value in search_scale(weight, bits, Observer.MSE))
    return Grid(scale, zero_point + free, 2.0 ** bits.double()[None, :, None] - 1)


def scalar_gptq(row: list[float], moment: Tensor, round_one, damping: float) -> list[float]:
    """One row: round a weight, repair the others by the inverse of H, take the weight out of the inverse."""
    fan = len(row)
    damped = moment.double() + damping * moment.double().diagonal().mean() * torch.eye(fan, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    row, found = list(row), []
    for i in range(fan):
        value = round_one(row[i])
        found.append(value)
        error = (row[i] - value) / inverse[i, i].item()
        for j in range(i + 1, fan):
            row[j] -= error * inverse[i, j].item()
        inverse = inverse - inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
    return found


def test_every_row_is_the_scalar_computation() -> None:
    rng = torch.Generator().manual_seed(0)
    weight, bits = torch.randn(5, 12, generator=rng), torch.tensor([1, 2, 3, 4, 2])
    x = correlated(1, 40, 12)
    moment = 2 / 40 * (x.mT @ x).double()
    grid = grid_of(weight, bits)
    found = quantize_rows(weight[None], moment[None], grid, block=5)[0]
    for index, row in enumerate(weight.double().tolist()):
        scale, zero_point = grid.scale[0, index, 0].item(), grid.zero_point[0, index, 0].item()
        top = 2 ** bits[index].item() - 1

        def round_one(w: float, scale: float = scale, zero_point: float = zero_point, top: int = top) -> float:
            return (min(max(round(w / scale) + zero_point, 0), top) - zero_point) * scale

        assert found[index].tolist() == pytest.approx(scalar_gptq(row, moment, round_one, 0.01), abs=1e-9)


@pytest.mark.parametrize("act_order", [False, True])
def test_blocks_change_nothing(act_order: bool) -> None:
    weight, x = torch.randn(6, 20, generator=torch.Generator().manual_seed(2)), correlated(3, 60, 20)
    grid, moment = grid_of(weight, torch.full((6,), 3)), 2 / 60 * (x.mT @ x).double()[None]
    found = [quantize_rows(weight[None], moment, grid, block=size, act_order=act_order) for size in (1, 7, 20, 128)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.booleans())
def test_uncorrelated_inputs_are_rounded_to_the_nearest(seed: int, bits: int, act_order: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 9, generator=rng)
    grid = grid_of(weight, torch.full((3,), bits))
    moment = torch.diag(torch.rand(9, generator=rng).double() + 0.1)[None]
    found = quantize_rows(weight[None], moment, grid, act_order=act_order)
    nearest = grid.round(weight[None].double())[0]
    assert torch.equal(found, nearest)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("act_order", [False, True])
def test_correlated_inputs_give_a_smaller_error(seed: int, act_order: bool) -> None:
    weight, x = torch.randn(8, 24, generator=torch.Generator().manual_seed(seed)), correlated(seed + 9, 100, 24)
    grid, moment = grid_of(weight, torch.full((8,), 3)), 2 / 100 * (x.mT @ x).double()[None]
    nearest = grid.round(weight[None].double())[0]
    found = quantize_rows(weight[None], moment, grid, act_order=act_order)
    before, after = (output_error(weight[None] - each, moment) for each in (nearest, found))
    assert after < 0.8 * before
    direct = (x.double() @ (weight.double() - found[0]).mT).square().mean().item()
    assert after == pytest.approx(direct, rel=1e-5), "the error under H is that of the outputs"


def test_dead_inputs_are_left_out() -> None:
    weight, x = torch.randn(4, 6, generator=torch.Generator().manual_seed(4)), correlated(5, 30, 6)
    x[:, 2] = 0
    grid, moment = grid_of(weight, torch.full((4,), 4)), 2 / 30 * (x.mT @ x).double()[None]
    found = quantize_rows(weight[None], moment, grid)
    zero = grid.round(torch.zeros(1, 4, 1, dtype=torch.float64))[0]
    assert torch.equal(found[..., 2, None], zero)
    alive = [0, 1, 3, 4, 5]
    # The dead column's 1 counts in the mean of the diagonal, so compare without damping.
    whole = quantize_rows(weight[None], moment, grid, damping=0.0)[..., alive]
    part = quantize_rows(weight[None][..., alive], moment[:, alive][:, :, alive], grid, damping=0.0)
    torch.testing.assert_close(whole, part, rtol=0, atol=1e-9)


def test_a_singular_moment_without_damping_is_an_error() -> None:
    weight = torch.randn(2, 3)
    moment = torch.ones(1, 3, 3, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="positive definite"):
        quantize_rows(weight[None], moment, grid_of(weight, torch.full((2,), 4)), damping=0.0)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().requires_grad_(False)


CASES = {
    "linear": (lambda: nn.Linear(6, 8), (5, 3, 6)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1, stride=2), (4, 6, 7, 7)),
    "grouped": (lambda: nn.Conv2d(6, 8, (3, 1), padding="same", groups=2), (4, 6, 5, 5)),
    "circular": (lambda: nn.Conv2d(6, 8, 3, padding=1, dilation=2, padding_mode="circular"), (4, 6, 7, 7)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_a_product_with_its_unfolded_inputs(name: str) -> None:
    make, shape = CASES[name]
    layer = to_quantized(seeded(make))
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(6))
    groups = getattr(layer, "groups", 1)
    products = input_rows(layer, x) @ layer.weight.flatten(1).unflatten(0, (groups, -1)).mT
    y = layer.apply_weight(x, layer.weight, None)
    y = y.movedim(1, -1) if y.dim() == 4 and name != "linear" else y
    torch.testing.assert_close(products.transpose(0, 1).flatten(1), y.flatten(0, -2), rtol=1e-4, atol=1e-5)


def test_a_convolution_is_a_linear_layer_on_unfolded_inputs() -> None:
    conv = to_quantized(nn.Conv2d(3, 4, 3, padding=1, stride=2).requires_grad_(False))
    x = torch.randn(70, 3, 6, 6, generator=torch.Generator().manual_seed(7))
    unfolded = F.unfold(x, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 27)
    linear = to_quantized(nn.Linear(27, 4).requires_grad_(False))
    torch.testing.assert_close(second_moment(conv, x), second_moment(linear, unfolded), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("round_zero_point", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_layer_computes_with_the_chosen_values(name: str, round_zero_point: bool) -> None:
    """Mixed widths, smoothing and free zero points: what is written is what the quantizer makes of it."""
    make, shape = CASES[name]
    layer = to_quantized(seeded(make))
    layer.smoothing = torch.linspace(0.3, 3.1, 6)
    bits = torch.arange(8).to(torch.int8) % 4 + 1
    spec = QuantSpec(PerChannel(0), round_zero_point=round_zero_point)
    layer.weight_quantizer = AffineQuantizer(spec, bits, AffineConfig())
    layer.weight_quantizer.observe(layer.float_weight())
    layer.weight_quantizer.freeze()
    if not round_zero_point:
        layer.weight_quantizer.zero_point.data += torch.linspace(-0.7, 0.7, 8)
    groups = getattr(layer, "groups", 1)
    weight = layer.float_weight()
    grid = Grid.of(layer.weight_quantizer.qparams(), weight, groups)
    before = grid.round(weight.double().flatten(1).unflatten(0, (groups, -1)))[0]
    torch.testing.assert_close(layer.quantized_weight().flatten(1), before.flatten(0, 1).float())
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(8))
    GptqTuner(GptqConfig())._round("layer", layer, layer.quantized_input(x, None))
    grid_weight = layer.quantized_weight()
    if round_zero_point:
        rows = zip(grid_weight.flatten(1), bits, strict=True)
        assert all(len(torch.unique(row)) <= 2 ** int(width) for row, width in rows)
        torch.testing.assert_close(layer.float_weight(), grid_weight, rtol=1e-6, atol=1e-7)
    layer.set_float_weight(layer.float_weight())
    assert torch.equal(layer.quantized_weight(), grid_weight)


def test_it_lowers_the_error_of_a_network() -> None:
    toy = make_toy(weight_bits=3, activation_bits=8)
    inputs = toy.calibration.step(1, slice(None))

    def error(student) -> float:
        return (student.run(inputs) - toy.calibration.outputs[1]).square().mean().item()

    student = assigned(toy)
    before = error(student)
    result = GptqTuner(GptqConfig()).tune(tune_job(toy, student))
    assert error(student) < before
    assert len(result.history["total"]) == len(student.trained_layers())
    assert sum(result.history["total"]) < sum(result.history["nearest"])
    again = assigned(toy)
    GptqTuner(GptqConfig()).tune(tune_job(toy, again))
    state = again.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in student.network.state_dict().items())


def test_a_quantizer_without_grid_is_refused() -> None:
    toy = make_toy()
    student = assigned(toy)
    student.layer("blocks.0.conv").weight_quantizer = None
    with pytest.raises(RecipeError, match=r"site blocks\.0\.conv: gptq needs"):
        GptqTuner(GptqConfig()).tune(tune_job(toy, student))


@pytest.mark.parametrize("act_order", [False, True])
def test_columns_with_scales_of_their_own_are_the_scalar_computation(act_order: bool) -> None:
    """Two parts of the inputs, the second with a third of the step and another zero point."""
    rng = torch.Generator().manual_seed(0)
    weight, x = torch.randn(3, 10, generator=rng).double(), correlated(1, 40, 10)
    moment = 2 / 40 * (x.mT @ x).double()
    factor = torch.cat([torch.ones(6), torch.full((4,), 1 / 3)]).double()
    shift = torch.cat([torch.zeros(6), torch.ones(4)]).double()
    whole = grid_of(weight.float(), torch.full((3,), 3))
    grid = Grid(whole.scale * factor, whole.zero_point + shift, whole.quant_max.expand(1, 3, 10))
    found = quantize_rows(weight[None], moment[None], grid, block=4, act_order=act_order)[0]
    order = moment.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(10)
    for index, row in enumerate(weight):
        scale = (whole.scale[0, index] * factor)[order].tolist()
        zero_point = (whole.zero_point[0, index] + shift)[order].tolist()
        steps = iter(zip(scale, zero_point, strict=True))

        def round_one(w: float, steps=steps) -> float:
            s, z = next(steps)
            return (min(max(round(w / s) + z, 0), 7) - z) * s

        expected = scalar_gptq(row[order].tolist(), moment[order][:, order], round_one, 0.01)
        assert found[index, order].tolist() == pytest.approx(expected, abs=1e-9)


def test_the_grid_of_a_split_weight_is_that_of_its_parts() -> None:
    toy = split_toy()
    layer = assigned(toy).layer("join")
    weight = layer.float_weight()
    grid = Grid.of(layer.weight_quantizer.qparams(), weight, 1)
    assert grid.scale.shape == (1, 12, 24 * 9)
    torch.testing.assert_close(
        grid.round(weight.double().flatten(1)[None])[0][0].float(), layer.quantized_weight().flatten(1)
    )


def test_split_sites_in_a_network() -> None:
    toy = split_toy(weight_bits=3)
    student = assigned(toy)
    scales = [part.scale.clone() for part in student.layer("join").weight_quantizer.parts]
    result = GptqTuner(GptqConfig()).tune(tune_job(toy, student))
    assert sum(result.history["total"]) < sum(result.history["nearest"])
    layer = student.layer("join")
    assert all(torch.equal(p.scale, s) for p, s in zip(layer.weight_quantizer.parts, scales, strict=True))
    torch.testing.assert_close(layer.float_weight(), layer.quantized_weight(), rtol=1e-5, atol=1e-6)
