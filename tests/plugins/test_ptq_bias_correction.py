"""Bias correction: outputs have the float means, layer by layer."""

from __future__ import annotations

import pytest
import torch
from quantlab_ptq.tuners import BiasCorrectionConfig, BiasCorrectionTuner, channel_means
from torch import Tensor, nn
from toys import ToyDenoiser, make_toy, split_toy, tune_job
from tuning_jobs import assigned

from quantlab.tuning.visit import visit_layers


def tuned(toy, student):
    return BiasCorrectionTuner(BiasCorrectionConfig()).tune(tune_job(toy, student))


def means(network: nn.Module, names: list[str], forward) -> dict[str, Tensor]:
    """The mean output of each layer's channels."""
    found = {}

    def keep(name: str):
        return lambda module, arguments, output: found.update({name: channel_means(module, output)})

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    forward()
    for handle in handles:
        handle.remove()
    return found


def test_channel_means_by_hand() -> None:
    y = torch.arange(24.0).view(2, 3, 2, 2)
    assert channel_means(nn.Conv2d(1, 3, 1), y).tolist() == [7.5, 11.5, 15.5]
    assert channel_means(nn.Linear(1, 2), y).tolist() == [11.0, 12.0]


@pytest.mark.parametrize(("make", "atol"), [(make_toy, 1e-5), (split_toy, 1e-4)])  # one part is 40 times as large
def test_every_layer_gets_the_float_means(make, atol: float) -> None:
    toy = make(weight_bits=2, activation_bits=3)
    student = assigned(toy)
    weights = {name: layer.weight.clone() for name, layer in student.layers().items()}
    job = tune_job(toy, student)
    names = list(job.layers)
    inputs = {name: value.flatten(0, 1) for name, value in toy.calibration.inputs.items()}
    before = means(student.network, names, lambda: job.student(inputs))
    result = tuned(toy, student)
    expected = means(toy.task.network, names, lambda: job.teacher(inputs))
    found = means(student.network, names, lambda: job.student(inputs))
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=atol)
        assert torch.equal(student.layer(name).weight, weights[name])
    assert any((before[name] - expected[name]).abs().max() > 1e-2 for name in names)
    assert len(result.history["total"]) == len(names) and not result.notes


def test_layers_without_a_bias_are_left_alone_and_named() -> None:
    network = ToyDenoiser()
    network.blocks[0].conv.bias = None
    toy = make_toy(network)
    student = assigned(toy)
    result = tuned(toy, student)
    assert student.layer("blocks.0.conv").bias is None
    assert list(result.notes) == ["1 layers have no bias to correct: blocks.0.conv"]
    assert len(result.history["total"]) == len(student.layers()) - 1


def test_layers_that_share_a_bias_are_corrected_apart() -> None:
    network = ToyDenoiser()
    network.blocks[1].conv.bias = network.blocks[0].conv.bias
    toy = make_toy(network, weight_bits=2)
    student = assigned(toy)
    tuned(toy, student)
    assert not torch.equal(student.layer("blocks.0.conv").bias, student.layer("blocks.1.conv").bias)
    seen = []
    visit_layers(
        student.layers(), lambda: student.run(toy.task.example_inputs(2)), lambda name, x, t: seen.append(name)
    )
    assert len(seen) == len(student.layers())
