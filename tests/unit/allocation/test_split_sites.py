"""Layers fed by a skip concatenation, from the graph to the stored model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toys import Skipping, affine, make_toy, silent, skipping_toy, split_toy

from quantlab.allocation.assign import AssignMethod, assign
from quantlab.allocation.cost import planned_cost, student_cost
from quantlab.allocation.plan import make_plan
from quantlab.allocation.smoothing import SmoothConfig, SmoothPass
from quantlab.allocation.student import add_adapters, restore
from quantlab.allocation.uniform import UniformPolicy
from quantlab.calibration.collect import calibration_batch
from quantlab.contracts.quant import Observer
from quantlab.contracts.sections import Activations, Budget, InputsFrom, Tune, Weights
from quantlab.contracts.tuning import AdapterSpec
from quantlab.quant.accounting import FloatModel
from quantlab.quant.split import SplitQuantizer
from quantlab.stages.prepare import layer_set_digest, plan_digest
from quantlab.store import digest_of
from quantlab.tuning.distill import mean_scale, parameter_groups
from quantlab.tuning.finalize import finalize


@pytest.fixture
def toy():
    return skipping_toy()


def assigned(toy, choices=None, smoothing=()):
    method = AssignMethod(smoothing, [UniformPolicy(UniformPolicy.Config())], choices or affine(), InputsFrom.TEACHER)
    student = toy.student()
    batch = calibration_batch(toy.task, toy.calibration, 8)
    return student, assign(student, method, batch, torch.Generator().manual_seed(0), silent)


def error(toy, student) -> float:
    inputs = toy.task.example_inputs(16)
    return (student.run(inputs) - toy.task.network(**inputs)).square().mean().item()


def test_parts_are_found_from_shapes(toy) -> None:
    sites = {site.name: site for site in toy.sites}
    assert sites["join"].split == sites["mix"].split == (12, 12) and "skip" in sites["join"].tags
    assert sites["conv_out"].split == () and sites["blocks.1.conv"].split == ()


def test_digits_unet_splits_its_up_blocks() -> None:
    from quantlab.graph.capture import capture
    from quantlab.graph.sites import find_sites
    from quantlab.zoo.digits import build_unet

    model = build_unet().eval()
    example = {"sample": torch.randn(3, 1, 8, 8), "timestep": torch.arange(3), "class_labels": torch.arange(3)}
    sites = find_sites(model, capture(model, example, {"return_dict": False}))
    found = {site.name: site.split for site in sites if site.split}
    assert list(found) == [
        f"up_blocks.{block}.resnets.{resnet}.{layer}"
        for block in range(3)
        for resnet in range(2)
        for layer in ("conv1", "conv_shortcut")
    ]
    # What comes from below, then what the down blocks kept: 32 from conv_in and block 0, 64 from blocks 1 and 2.
    parts = [found[f"up_blocks.{block}.resnets.{resnet}.conv1"] for block in range(3) for resnet in range(2)]
    assert parts == [(64, 64), (64, 64), (64, 64), (64, 32), (64, 32), (32, 32)]


def test_only_sites_under_the_budget_are_split(toy) -> None:
    plan = make_plan(toy.sites, {"join": 8}, toy.plan.budget, split_skip=True)
    assert [entry.site.name for entry in plan.sites if entry.split] == ["mix"]
    assert not any(entry.split for entry in toy.plan.sites)


def test_a_layer_called_with_and_without_a_concatenation_is_not_split() -> None:
    class Twice(Skipping):
        def forward(self, sample, timestep):
            x = self.conv_in(sample)
            joined = torch.cat([x, x], dim=1)
            return self.conv_out(self.join(joined) + self.join(joined + x.repeat(1, 2, 1, 1)))

    sites = {site.name: site for site in make_toy(Twice()).sites}
    assert sites["join"].split == () and "skip" in sites["join"].tags


def test_splitting_lowers_the_error_and_leaves_other_sites_alone(toy) -> None:
    whole, _ = assigned(toy)
    apart, _ = assigned(split_toy())
    assert error(toy, apart) < error(toy, whole)
    assert isinstance(apart.layer("join").weight_quantizer, SplitQuantizer)
    other = apart.layer("blocks.0.conv").input_quantizer
    assert torch.equal(other.scale, whole.layer("blocks.0.conv").input_quantizer.scale)


def test_smoothing_adapters_rounding_and_reload_go_through_the_parts() -> None:
    toy = split_toy()
    student, bit_map = assigned(toy, smoothing=[SmoothPass(SmoothConfig())])
    add_adapters(student, AdapterSpec(2), 0)
    layer = student.layer("join")
    assert layer.smoothing is not None
    scales = [part.scale for part in layer.weight_quantizer.parts]
    assert mean_scale(layer) == pytest.approx(torch.cat(scales).mean().item())
    groups = parameter_groups({"join": layer}, Tune(adapter_learning_rate=1e-3), 0.0)
    assert sum(len(group["params"]) for group in groups) == 2 + 2 * 2 + 2 * 2, "adapter, weight parts, input parts"
    with torch.no_grad():
        layer.adapter.B.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        layer.input_quantizer.parts[1].zero_point.add_(0.3)
    inputs = toy.task.example_inputs(4)
    before = student.run(inputs)
    changed = finalize(student.layers())
    assert changed["join"] < 1e-5
    torch.testing.assert_close(student.run(inputs), before)
    again = restore(toy.student(), bit_map, affine(), student.network.state_dict())
    assert torch.equal(again.run(inputs), student.run(inputs))


@pytest.mark.parametrize("per_timestep", [False, True])
def test_scales_of_every_part_are_counted(toy, per_timestep: bool) -> None:
    # Ranges that hold 0 have zero points among the codes, one byte each, as a dry run takes them to be.
    activations = Activations(observer=Observer.MIN_MAX, per_timestep=per_timestep)
    choices = affine(Weights(observer=Observer.MIN_MAX), activations)
    float_model = FloatModel.of(toy.task.network)
    apart = student_cost(*assigned(split_toy(), choices), float_model)
    kept = replace(toy, plan=make_plan(toy.sites, {"conv_in": 8}, toy.plan.budget))
    whole = student_cost(*assigned(kept, choices), float_model)
    split = [entry.site for entry in split_toy().plan.sites if entry.split]
    assert apart.scale_bytes - whole.scale_bytes == 4 * sum(site.out_channels for site in split)
    assert apart.zero_point_bytes - whole.zero_point_bytes == sum(site.out_channels for site in split)
    entry = (4 + 1 + 2) * 4 if per_timestep else 4 + 1
    assert apart.activation_bytes - whole.activation_bytes == entry * len(split)
    assert (apart.weight_bytes, apart.bit_operations) == (whole.weight_bytes, whole.bit_operations)
    timesteps = 4 if per_timestep else 1
    assert planned_cost(split_toy().plan, float_model, timesteps=timesteps, smoothed=False) == apart


def test_a_plan_without_splits_has_the_digest_it_always_had(toy) -> None:
    plan = toy.plan
    bits = {e.site.name: [e.weight_bits, e.activation_bits, e.budgeted] for e in plan.sites}
    assert plan_digest(plan) == digest_of(bits)
    assert plan_digest(make_plan(toy.sites, {}, plan.budget, split_skip=True)) != plan_digest(plan)
    layers = {e.site.name: "budget" if e.budgeted else e.weight_bits for e in plan.sites}
    split = make_plan(toy.sites, {}, Budget(weight_bits=2, activation_bits=4), split_skip=True)
    assert layer_set_digest(plan) == layer_set_digest(split) == digest_of(layers)
