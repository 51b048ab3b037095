"""Attention as a quantized site, from the plan to the stored model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toys import Attending, affine, make_toy, silent

from quantlab.allocation.assign import AssignMethod, assign
from quantlab.allocation.cost import planned_cost, student_cost
from quantlab.allocation.plan import make_plan
from quantlab.allocation.student import restore
from quantlab.allocation.uniform import UniformPolicy
from quantlab.api import quantize
from quantlab.calibration.collect import calibration_batch
from quantlab.contracts.allocation import FLOAT_BITS
from quantlab.contracts.quant import Observer
from quantlab.contracts.sections import Activations, Attention, InputsFrom, Weights
from quantlab.errors import RecipeError
from quantlab.quant.accounting import FloatModel
from quantlab.stages.describe import coverage_text
from quantlab.stages.prepare import layer_set_digest, plan_digest
from quantlab.store import digest_of


@pytest.fixture
def toy():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_toy(Attending(), weight_bits=8, activation_bits=8)


def attending(toy, bits: int = 8, probability_bits: int = 8, keep=None):
    attention = Attention(bits=bits, probability_bits=probability_bits)
    return replace(toy, plan=make_plan(toy.sites, keep or {}, toy.plan.budget, attention=attention))


def assigned(toy, choices=None, inputs_from=InputsFrom.TEACHER):
    method = AssignMethod([], [UniformPolicy(UniformPolicy.Config())], choices or affine(), inputs_from)
    student = toy.student()
    batch = calibration_batch(toy.task, toy.calibration, 8)
    return student, assign(student, method, batch, torch.Generator().manual_seed(0), silent)


def test_without_the_key_everything_is_as_it_was(toy) -> None:
    student, bit_map = assigned(toy)
    assert student.products() == {} and "attend" not in {entry.site.name for entry in toy.plan.quantized}
    assert {slot for site, slot in bit_map.activation_bits if site == "attend"} == {"query", "key", "value"}
    layers = {e.site.name: "budget" if e.budgeted else e.weight_bits for e in toy.plan.sites}
    assert layer_set_digest(toy.plan) == digest_of(layers)


@pytest.mark.parametrize("inputs_from", list(InputsFrom))
def test_eight_bits_are_close_to_a_float_attention_and_two_are_not(toy, inputs_from: InputsFrom) -> None:
    inputs = toy.task.example_inputs(9)
    outputs = [
        assigned(each, inputs_from=inputs_from)[0].run(inputs) for each in (toy, attending(toy), attending(toy, 2, 2))
    ]
    eight_bits, two_bits = ((output - outputs[0]).abs().mean() / outputs[0].abs().mean() for output in outputs[1:])
    assert 0 < eight_bits < 0.01 and two_bits > 3 * eight_bits


def test_a_student_without_ranges_yet_is_the_float_network(toy) -> None:
    inputs = toy.task.example_inputs(5)
    assert torch.equal(attending(toy).student().run(inputs), toy.task.network(**inputs))
    assert not any("quantized_attention" in name for name, _ in toy.task.network.named_modules())


def test_bits_and_timesteps_of_every_slot(toy) -> None:
    student, bit_map = assigned(attending(toy, 6, 4))
    found = {slot: bits for (site, slot), bits in bit_map.activation_bits.items() if site == "attend"}
    assert found == {"query": 6, "key": 6, "value": 6, "probabilities": 4}
    quantizers = student.products()["attend"].quantizers
    assert all(quantizers[slot].bits == bits and quantizers[slot].scale.shape == (4,) for slot, bits in found.items())
    static, _ = assigned(attending(toy), affine(activations=Activations()))
    assert static.products()["attend"].quantizers["query"].scale.shape == ()


def test_a_restored_student_computes_bitwise_the_same(toy) -> None:
    toy = attending(toy, 5)
    student, bit_map = assigned(toy)
    again = restore(toy.student(), bit_map, affine(), student.network.state_dict())
    inputs = toy.task.example_inputs(4)
    assert torch.equal(again.run(inputs), student.run(inputs))


def test_products_are_counted_at_their_own_bits(toy) -> None:
    choices = affine(Weights(observer=Observer.MIN_MAX), Activations(observer=Observer.MIN_MAX, per_timestep=True))
    float_model = FloatModel.of(toy.task.network)
    whole = student_cost(*assigned(toy, choices), float_model)
    cost = student_cost(*assigned(attending(toy, 6, 4), choices), float_model)
    macs = 2 * 36 * 36 * 6  # heads, queries, keys, channels of a head: of each product
    assert cost.bit_operations == whole.bit_operations - 2 * macs * 32 * 32 + macs * (6 * 6 + 4 * 6)
    assert cost.quantized_macs - whole.quantized_macs == 2 * macs and cost.coverage == 1
    assert cost.activation_bytes - whole.activation_bytes == 4 * 4 * (4 + 1 + 2), "slots, timesteps"
    assert cost.total_bytes - whole.total_bytes == 4 * 4 * (4 + 1 + 2)
    plan = attending(toy, 6, 4).plan
    assert planned_cost(plan, float_model, timesteps=4, smoothed=False) == cost
    assert "float" not in coverage_text(plan, cost) and "1 attention" in coverage_text(toy.plan, whole)


def test_the_layer_set_knows_it(toy) -> None:
    plans = [toy.plan, attending(toy).plan, attending(toy, 6).plan, attending(toy, 8, 4).plan]
    assert len({layer_set_digest(plan) for plan in plans}) == len({plan_digest(plan) for plan in plans}) == 4


def test_keep_has_the_last_word(toy) -> None:
    kept = attending(toy, keep={"attend": FLOAT_BITS}).plan
    assert kept.products == () and "kept float" in next(e.reason for e in kept.sites if e.site.name == "attend")
    (entry,) = attending(toy, keep={"attend": 4}).plan.products
    assert {entry.bits_of(slot) for slot in entry.site.slots} == {4}


def test_a_model_without_fused_attention_is_told() -> None:
    with pytest.raises(RecipeError, match="no fused attention"):
        attending(make_toy())


def test_a_module_in_memory_goes_through_all_stages(toy) -> None:
    batch = {"sample": torch.randn(16, 1, 6, 6), "timestep": torch.arange(16) * 50}
    done = quantize(toy.task.network, [batch], "mse", weight_bits=8, samples=16, settings={"attention": {"bits": 6}})
    assert done.bit_map.activation_bits["attend", "query"] == 6
    assert done.bit_map.activation_bits["attend", "probabilities"] == 8
    assert done.accounting.coverage == 1 and "attend" not in done.coverage
    exact = toy.task.network(**batch)
    assert 0 < (done.module(**batch) - exact).abs().mean() < 0.05 * exact.abs().mean()
