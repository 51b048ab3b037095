"""Layers of every kind, tables and products of activations, from the graph to the stored model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toys import Kinds, affine, make_toy, silent

from quantlab.allocation.assign import AssignMethod, assign
from quantlab.allocation.cost import planned_cost, student_cost
from quantlab.allocation.plan import make_plan
from quantlab.allocation.student import restore
from quantlab.allocation.uniform import UniformPolicy
from quantlab.api import quantize
from quantlab.calibration.collect import calibration_batch
from quantlab.calibration.stats import SiteRecord
from quantlab.contracts.allocation import FLOAT_BITS
from quantlab.contracts.quant import Observer
from quantlab.contracts.sections import AS_IT_IS, Activations, Attention, Embeddings, InputsFrom, Products, Weights
from quantlab.contracts.site import SiteKind
from quantlab.errors import RecipeError
from quantlab.graph.passes.smooth import smooth
from quantlab.packing.backends.activation import ActivationKernel
from quantlab.packing.backends.dispatch import Backend, Kernel, lower
from quantlab.packing.file import write_packed
from quantlab.packing.read import load_packed
from quantlab.packing.write import Finished, pack
from quantlab.quant.accounting import FloatModel
from quantlab.quant.operation import compute, own_layout, rows_of
from quantlab.stages.describe import coverage_text
from quantlab.stages.prepare import layer_set_digest, plan_digest
from quantlab.stages.quantize import finalize_student
from quantlab.store import digest_of

MIN_MAX = affine(Weights(observer=Observer.MIN_MAX), Activations(observer=Observer.MIN_MAX, per_timestep=True))
NEW = ("line", "volume", "up", "up_line", "up_volume")


@pytest.fixture(scope="module")
def toy():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_toy(Kinds(), weight_bits=8, activation_bits=8)


def asking(toy, bits: int = 8, keep=None, weight_bits: int = 8):
    budget = toy.plan.budget.model_copy(update={"weight_bits": weight_bits})
    keys = {"products": Products(bits=bits), "embeddings": Embeddings(bits=bits)}
    return replace(toy, plan=make_plan(toy.sites, keep or {}, budget, **keys))


def assigned(toy, choices=MIN_MAX, inputs_from=InputsFrom.TEACHER):
    method = AssignMethod([], [UniformPolicy(UniformPolicy.Config())], choices, inputs_from)
    student = toy.student()
    batch = calibration_batch(toy.task, toy.calibration, 8)
    return student, assign(student, method, batch, torch.Generator().manual_seed(0), silent)


def test_kinds_shapes_and_costs(toy) -> None:
    found = {site.name: (str(site.kind), site.weight_shape, site.macs, site.groups) for site in toy.sites}
    assert {name: found[name] for name in (*NEW, "table", "product_0", "product_1", "mix")} == {
        "line": ("conv", (12, 6, 3), 36 * 12 * 6 * 3, 2),
        "volume": ("conv", (12, 12, 1, 3, 3), 36 * 12 * 12 * 9, 1),
        "up": ("conv_transpose", (18, 4, 3, 2), 36 * 12 * 6 * 6, 3),
        "up_line": ("conv_transpose", (12, 18, 1), 144 * 18 * 12, 1),
        "up_volume": ("conv_transpose", (12, 12, 1, 2, 2), 144 * 12 * 12 * 4, 1),
        "table": ("embedding", (1000, 4), 0, 1),
        "product_0": ("matmul", None, 36 * 12 * 36, 1),
        "product_1": ("matmul", None, 12 * 36 * 36, 1),
        "mix": ("linear", (12, 12), 36 * 12 * 12, 1),
    }


@pytest.mark.parametrize("name", [*NEW, "mix", "conv_in"])
def test_rows_and_patches_are_what_the_layer_computes(toy, name: str) -> None:
    layer = toy.task.network.get_submodule(name)
    shape = next(site.slots[0].shape for site in toy.sites if site.name == name)
    x, rows = torch.randn(2, *shape[1:]).double(), rows_of(layer, layer.weight)
    assert torch.equal(own_layout(layer, rows), layer.weight)
    record = SiteRecord.of_layer(layer, (x.float(),))
    patches = record.patches(x)  # [rows, groups, n]
    by_group = rows.double().flatten(1).unflatten(0, (patches.shape[1], -1))
    products = torch.einsum("rgn,gon->rgo", patches, by_group).flatten(1)
    bias = 0 if layer.bias is None else layer.bias.double()
    with torch.no_grad():
        expected = layer.double()(x)
        alike = compute(layer, x, rows.double(), layer.bias)
        layer.float()
    torch.testing.assert_close(alike, expected)
    torch.testing.assert_close(products + bias, expected.movedim(record.channel_dim, -1).reshape(products.shape))


def test_a_student_without_ranges_is_the_float_network(toy) -> None:
    inputs = toy.task.example_inputs(5)
    expected = toy.task.network(**inputs)
    torch.testing.assert_close(asking(toy).student().run(inputs), expected, rtol=1e-5, atol=1e-6)


def test_weights_of_every_kind_get_a_scale_for_each_output_channel(toy) -> None:
    student, _ = assigned(asking(toy, weight_bits=3))
    for name in (*NEW, "table"):
        layer, exact = student.layer(name), toy.task.network.get_submodule(name).weight.double()
        levels = 255 if name == "table" else 7
        found = layer.effective_weight().double()
        groups = layer.groups
        for channel in range(layer.weight_shape[0]):
            if name.startswith("up"):  # [in, out / groups, *k]: a channel reads the inputs of its group
                per = exact.shape[1]
                first = channel // per * (exact.shape[0] // groups)
                index = (slice(first, first + exact.shape[0] // groups), channel % per)
            else:
                index = (channel,)
            row = exact[index]
            low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
            scale = (high - low) / levels
            zero = round(-low / scale)
            by_hand = ((row / scale).round() + zero).clamp(0, levels).sub(zero) * scale
            # A value near the middle of two levels may go either way in float32; no other may differ.
            wrong = (by_hand - found[index]).abs() > 1e-5
            middle = ((row / scale) % 1 - 0.5).abs() < 1e-3
            assert not bool((wrong & ~middle).any()), (name, channel)


@pytest.mark.parametrize("inputs_from", list(InputsFrom))
def test_eight_bits_are_close_and_two_are_not(toy, inputs_from: InputsFrom) -> None:
    inputs = toy.task.example_inputs(9)
    exact = toy.task.network(**inputs)
    errors = [
        (assigned(each, inputs_from=inputs_from)[0].run(inputs) - exact).abs().mean() / exact.abs().mean()
        for each in (asking(toy), asking(toy, 2, weight_bits=2))
    ]
    assert 0 < errors[0] < 0.05 and errors[1] > 3 * errors[0]


def test_operands_of_products_have_their_bits_and_timesteps(toy) -> None:
    student, bit_map = assigned(asking(toy, 6))
    products = student.products()
    assert list(products) == ["product_0", "product_1"]
    for name, product in products.items():
        for slot, quantizer in product.quantizers.items():
            assert bit_map.activation_bits[name, slot] == quantizer.bits == 6 and quantizer.scale.shape == (4,)
    left, right = torch.randn(1, 2, 3), torch.randn(1, 3, 4)
    product, timestep = products["product_0"], torch.tensor([301])
    by_hand = product.quantizers["left"](left, timestep) @ product.quantizers["right"](right, timestep)
    assert torch.equal(product(left, right, timestep=timestep), by_hand)


def test_without_the_keys_everything_is_as_it_was(toy) -> None:
    assert not {"table", "product_0"} & {entry.site.name for entry in toy.plan.sites}
    layers = {e.site.name: "budget" for e in toy.plan.sites}
    assert layer_set_digest(toy.plan) == digest_of(layers)
    plans = [toy.plan, asking(toy).plan, asking(toy, 6).plan]
    assert len({layer_set_digest(plan) for plan in plans}) == len({plan_digest(plan) for plan in plans}) == 3


def test_what_is_not_there_cannot_be_asked_for(toy) -> None:
    plain = make_toy()
    for key in ({"products": Products()}, {"embeddings": Embeddings()}, {"attention": Attention()}):
        with pytest.raises(RecipeError, match="the model has no") as caught:
            make_plan(plain.sites, {}, plain.plan.budget, **key)
        assert caught.value.where == next(iter(key))
    kept = asking(toy, keep={"table": 4, "product_0": 5, "product_1": FLOAT_BITS}).plan
    found = {e.site.name: (e.weight_bits, e.activation_bits) for e in kept.sites if not e.budgeted}
    assert found == {"table": (4, 32), "product_0": (32, 5), "product_1": (32, 32)}


def test_bytes_and_bit_operations(toy) -> None:
    float_model = FloatModel.of(toy.task.network)
    plain, asked = student_cost(*assigned(toy), float_model), student_cost(*assigned(asking(toy, 6)), float_model)
    macs = 36 * 12 * 36  # of each product
    assert asked.bit_operations - plain.bit_operations == 2 * macs * 6 * 6
    assert plain.other_macs == 2 * macs and asked.other_macs == 0 and asked.macs == plain.macs + 2 * macs
    assert plain.coverage == pytest.approx(plain.macs / asked.macs) and asked.coverage == 1
    assert asked.activation_bytes - plain.activation_bytes == 4 * 4 * (4 + 1 + 2), "operands, timesteps"
    assert asked.weight_bytes - plain.weight_bytes == 1000 * 4 * 6 // 8
    assert asked.scale_bytes - plain.scale_bytes == 1000 * 4, "a scale for each row"
    assert plain.float_bytes - asked.float_bytes == 1000 * 4 * 4
    assert planned_cost(asking(toy, 6).plan, float_model, timesteps=4, smoothed=False).total_bytes == asked.total_bytes
    text = coverage_text(toy.plan, plain)
    assert f"2 matmul with {2 * macs / asked.macs:.1%}, the recipe has no `products` (product_0, product_1)" in text
    assert "outside" not in coverage_text(asking(toy).plan, asked)


def test_a_restored_and_a_packed_student_compute_bitwise_the_same(toy, tmp_path) -> None:
    toy = asking(toy, 5, weight_bits=4)
    student, bit_map = assigned(toy)
    again = restore(toy.student(), bit_map, MIN_MAX, student.network.state_dict())
    inputs = toy.task.example_inputs(4)
    assert torch.equal(again.run(inputs), student.run(inputs))
    finalize_student(student, AS_IT_IS)
    expected, file = student.run(inputs), tmp_path / "model.safetensors"
    content = pack(
        Finished(student.network, student.graph, student.layers(), student.products(), student.float_model, "timestep")
    )
    assert content.payload_bytes == student_cost(student, bit_map, student.float_model).total_bytes
    write_packed(file, content)
    for keep in (False, True):
        loaded = load_packed(file, network=toy.task.network, keep_packed=keep)
        assert torch.equal(loaded.run(inputs), expected)
        assert all(loaded.bit_map.activation_bits[key] == bits for key, bits in bit_map.activation_bits.items())
        assert torch.equal(loaded.bit_map.weight_bits["table"], bit_map.weight_bits["table"])


def test_integer_execution_says_what_stays_simulated(toy) -> None:
    student, _ = assigned(asking(toy))
    dispatch = {each.site: each for each in lower(student.network, Backend.REFERENCE, ActivationKernel(None)).dispatch}
    assert all(dispatch[name].kernel is Kernel.SIMULATED for name in (*NEW, "table", "product_0", "product_1"))
    assert "ConvTranspose2d has no integer kernel" in dispatch["up"].why
    assert "a product of activations has no integer kernel" in dispatch["product_0"].why
    assert dispatch["conv_in"].kernel is Kernel.REFERENCE and dispatch["mix"].kernel is Kernel.REFERENCE


def test_smoothing_keeps_the_function(toy) -> None:
    student = asking(toy).student()
    inputs = toy.task.example_inputs(3)
    expected = student.run(inputs)
    scales = {name: torch.rand(student.layer(name).input_channels) + 0.5 for name in NEW}
    smooth(student.network, scales)
    torch.testing.assert_close(student.run(inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["gptq", "adaround", "efficientdm"])
def test_tuners_take_every_kind(toy, method: str) -> None:
    batch = {"sample": torch.randn(8, 1, 6, 6), "timestep": torch.arange(8) * 50}
    keys = {"products": {"bits": 8}, "embeddings": {"bits": 8}, "tune": {"batch": 4}}
    done = quantize(toy.task.network, [batch], method, weight_bits=8, samples=8, iterations=2, settings=keys)
    exact = toy.task.network(**batch)
    assert done.accounting.coverage == 1
    assert 0 < (done.module(**batch) - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_a_branch_of_a_transposed_convolution_is_refused(toy) -> None:
    batch = {"sample": torch.randn(8, 1, 6, 6), "timestep": torch.arange(8) * 50}
    with pytest.raises(RecipeError, match="a transposed convolution has no low-rank branch") as caught:
        quantize(toy.task.network, [batch], "svdquant", weight_bits=8, samples=8, iterations=2)
    assert caught.value.where == "tune.tuners, site up"
    keep = {"up*": 8}
    done = quantize(toy.task.network, [batch], "svdquant", weight_bits=8, samples=8, iterations=2, keep=keep)
    exact = toy.task.network(**batch)
    assert 0 < (done.module(**batch) - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_kinds_of_sites_are_named() -> None:
    assert [str(kind) for kind in SiteKind] == ["conv", "conv_transpose", "linear", "embedding", "matmul", "attention"]
