"""What the report is told about each site."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from toys import affine, make_toy, silent, split_toy
from tuning_jobs import assigned

from quantlab.allocation.assign import AssignMethod, assign
from quantlab.allocation.smoothing import SmoothConfig, SmoothPass
from quantlab.allocation.uniform import UniformPolicy
from quantlab.calibration.collect import calibration_batch, collect_inputs
from quantlab.contracts.sections import Activations, InputsFrom
from quantlab.stages.inspect import activation_scales, site_errors


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "smoothed"])
def looked_at(request):
    toy = make_toy(weight_bits=3, activation_bits=6, keep={"conv_in": 8})
    student, batch = toy.student(), calibration_batch(toy.task, toy.calibration, 4)
    smoothing = [SmoothPass(SmoothConfig())] if request.param else []
    method = AssignMethod(smoothing, [UniformPolicy(UniformPolicy.Config())], affine(), InputsFrom.TEACHER)
    assign(student, method, batch, torch.Generator().manual_seed(0), silent)
    return toy, student, batch, site_errors(toy.task.network, toy.graph, student, batch)


def relative(value, exact) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def test_errors_are_those_of_the_site_alone(looked_at) -> None:
    toy, student, batch, errors = looked_at
    name = "blocks.1.conv"
    teacher, layer = toy.task.network, student.layer(name)
    (x,) = collect_inputs(teacher, [name], lambda: teacher(**batch.inputs))[name]
    exact = F.conv2d(x, teacher.blocks[1].conv.weight, teacher.blocks[1].conv.bias, padding=1)
    assert errors[name]["output"] == pytest.approx(relative(layer(x, batch.timestep), exact), rel=1e-6)
    weight = layer.quantized_weight()
    if layer.smoothing is not None:
        weight = weight / layer.smoothing.view(1, -1, 1, 1)
    assert errors[name]["weight"] == pytest.approx(relative(weight, teacher.blocks[1].conv.weight), rel=1e-6)


def test_more_bits_are_less_error_and_every_site_is_there(looked_at) -> None:
    _, student, _, errors = looked_at
    assert set(errors) == set(student.layers())
    assert errors["conv_in"]["weight"] < 0.02 < errors["blocks.0.conv"]["weight"]


def test_looking_changes_nothing(looked_at) -> None:
    toy, student, batch, errors = looked_at
    before = {name: value.clone() for name, value in student.network.state_dict().items()}
    assert site_errors(toy.task.network, toy.graph, student, batch) == errors
    assert all(torch.equal(value, before[name]) for name, value in student.network.state_dict().items())


def test_only_tables_over_timesteps_are_written(looked_at) -> None:
    _, student, _, _ = looked_at
    found = activation_scales(student)
    assert "conv_in" not in found, "sites outside the budget have one scale"
    table = found["blocks.0.conv"]
    quantizer = student.layer("blocks.0.conv").input_quantizer
    assert table["timesteps"] == quantizer.timesteps.tolist()
    assert table["scales"] == pytest.approx(quantizer.scale.tolist(), rel=1e-5)


def test_a_network_without_tables_has_none() -> None:
    toy = make_toy()
    student, batch = toy.student(), calibration_batch(toy.task, toy.calibration, 2)
    choices = affine(activations=Activations(per_timestep=False))
    method = AssignMethod([], [UniformPolicy(UniformPolicy.Config())], choices, InputsFrom.TEACHER)
    assign(student, method, batch, torch.Generator().manual_seed(0), silent)
    assert activation_scales(student) == {}


def test_the_parts_of_a_split_input_have_tables_of_their_own() -> None:
    toy = split_toy()
    student = assigned(toy)
    found = activation_scales(student)
    parts = student.layer("join").input_quantizer.parts
    assert "join" not in found and len(parts) == 2
    for index, part in enumerate(parts):
        assert found[f"join, part {index}"]["scales"] == pytest.approx(part.scale.tolist(), rel=1e-5)
