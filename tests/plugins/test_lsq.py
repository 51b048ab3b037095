"""LSQ: where scales start, how their gradients are scaled, and that it trains on data and resumes to the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from quantlab_lsq.scales import learned_scales, start_at_mean_magnitude
from quantlab_lsq.tuner import LsqConfig, LsqTuner, Start
from torch import nn
from toys import Memory, Toy, ToyTask, make_toy, split_toy, tune_job
from tuning_jobs import assigned

from quantlab import ModelError, PerChannel, PerTensor, QuantSpec, RecipeError, TrainingBatch
from quantlab.contracts.sections import Tune
from quantlab.quant.layers import to_quantized
from quantlab.quant.quantizers import AffineConfig, AffineQuantizer

SETTINGS = Tune(iterations=30, batch=8)


@dataclass
class DataTask(ToyTask):
    """A toy whose data are what its float network says of noise."""

    def training_batch(self, size: int, rng: torch.Generator) -> TrainingBatch:
        inputs = {
            "sample": torch.randn(size, 1, 6, 6, generator=rng),
            "timestep": torch.randint(1000, (size,), generator=rng),
        }
        with torch.no_grad():
            return TrainingBatch(inputs, self.network(**inputs))


def with_data(**options) -> Toy:
    toy = make_toy(**options)
    return replace(toy, task=DataTask(toy.task.network))


def test_signed_scales_start_at_twice_the_mean_magnitude() -> None:
    layer = to_quantized(nn.Linear(4, 3).requires_grad_(False))
    layer.weight.data = torch.tensor([[1.0, -1, 1, -1], [2, -4, 6, 0], [0, 0, 0, 0]])
    layer.smoothing = torch.full((4,), 2.0)
    layer.weight_quantizer = AffineQuantizer(QuantSpec(PerChannel(0)), torch.tensor([2, 4, 3]), AffineConfig())
    start_at_mean_magnitude("layer", layer)
    scale, zero_point = layer.weight_quantizer.scale, layer.weight_quantizer.zero_point
    assert scale.tolist() == pytest.approx([2 * 2 / 1**0.5, 2 * 6 / 7**0.5, 1.0])
    assert zero_point.tolist() == [2, 8, 4]


def test_gradients_of_scales_are_divided_by_the_root_of_their_count_times_the_positive_levels() -> None:
    layer = to_quantized(nn.Linear(5, 2).requires_grad_(False))
    layer.weight_quantizer = AffineQuantizer(QuantSpec(PerChannel(0)), torch.tensor([2, 4]), AffineConfig())
    layer.input_quantizer = AffineQuantizer(QuantSpec(PerTensor()), 4, AffineConfig())
    layer.weight_quantizer.zero_point.data = torch.tensor([2.0, 0.0])
    layer.weight_quantizer.scale.data = torch.tensor([0.3, 0.05])
    layer.requires_grad_(True)
    weight, inputs = learned_scales({"a": layer}, {"a": torch.zeros(1, 7, 5)})
    assert (weight.name, inputs.name) == ("a/weight scale", "a/input scale")
    assert weight.factor.tolist() == pytest.approx([(5 * 1) ** -0.5, (5 * 15) ** -0.5])
    assert inputs.factor.item() == pytest.approx((35 * 15) ** -0.5)

    def gradient() -> torch.Tensor:
        layer.zero_grad()
        layer.quantized_weight().square().sum().backward()
        return weight.parameter.grad.clone()

    plain = gradient()
    handle = weight.scale_gradients()
    torch.testing.assert_close(gradient(), plain * weight.factor)
    handle.remove()
    assert torch.equal(gradient(), plain)


def test_it_learns_and_leaves_kept_sites_alone() -> None:
    toy = with_data(weight_bits=3, activation_bits=6, keep={"conv_in": 8})
    student = assigned(toy)
    kept = {name: value.clone() for name, value in student.layer("conv_in").state_dict().items()}
    conv = student.layer("blocks.0.conv")
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    result = LsqTuner(LsqConfig(learning_rate=0.1)).tune(tune_job(toy, student, settings=SETTINGS))
    losses = torch.tensor(result.history["total"])
    assert losses[-5:].mean() < 0.7 * losses[:3].mean()
    assert all(torch.equal(kept[name], value) for name, value in student.layer("conv_in").state_dict().items())
    changed = {name for name, value in conv.state_dict().items() if not torch.equal(value, before[name])}
    assert {"weight", "bias", "weight_quantizer.scale", "input_quantizer.scale"} <= changed
    assert torch.equal(conv.input_quantizer.zero_point, before["input_quantizer.zero_point"])
    assert not any(parameter.requires_grad for parameter in student.network.parameters())


def test_a_killed_run_resumes_to_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantlab_lsq.tuner.SAVE_EVERY", 8)
    toy = with_data(weight_bits=2)
    student = assigned(toy)
    job = tune_job(toy, student, settings=SETTINGS.model_copy(update={"iterations": 12}))
    whole = LsqTuner(LsqConfig()).tune(job)
    assert isinstance(job.checkpoint, Memory) and [done for done, _ in job.checkpoint.saved] == [8, 12]
    resumed = assigned(toy)
    again = replace(tune_job(toy, resumed, settings=job.settings), checkpoint=Memory(job.checkpoint.saved[:1]))
    history = LsqTuner(LsqConfig()).tune(again).history
    expected = student.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.network.state_dict().items())
    assert history["total"] == whole.history["total"]


def test_observed_scales_may_be_the_start() -> None:
    toy = with_data(weight_bits=3)
    student = assigned(toy)
    zero_point = student.layer("blocks.0.conv").weight_quantizer.zero_point.clone()
    settings = SETTINGS.model_copy(update={"iterations": 2})
    LsqTuner(LsqConfig(start=Start.OBSERVED)).tune(tune_job(toy, student, settings=settings))
    assert torch.equal(student.layer("blocks.0.conv").weight_quantizer.zero_point, zero_point)


def test_a_model_without_data_is_refused() -> None:
    toy = make_toy()
    student = assigned(toy)
    before = {name: value.clone() for name, value in student.network.state_dict().items()}
    with pytest.raises(ModelError, match="no training data"):
        LsqTuner(LsqConfig()).tune(tune_job(toy, student, settings=SETTINGS))
    assert all(torch.equal(value, before[name]) for name, value in student.network.state_dict().items())


def test_a_quantizer_without_scales_is_refused() -> None:
    toy = with_data()
    student = assigned(toy)
    student.layer("conv_out").weight_quantizer.qparams = lambda: None
    with pytest.raises(RecipeError, match="weight of site conv_out: lsq needs"):
        LsqTuner(LsqConfig()).tune(tune_job(toy, student, settings=SETTINGS))


def test_no_iterations_change_nothing() -> None:
    toy = make_toy()
    student = assigned(toy)
    assert LsqTuner(LsqConfig()).tune(tune_job(toy, student, settings=Tune())).history == {"total": ()}


def test_the_parts_of_a_split_site_have_scales_of_their_own() -> None:
    toy = split_toy(weight_bits=3)
    student = assigned(toy)
    layer, name = student.layer("mix"), "mix"
    start_at_mean_magnitude(name, layer)
    learned = learned_scales({name: layer}, {name: torch.zeros(1, 6, 6, 24)})
    assert [scale.name for scale in learned] == [
        "mix/weight scale 0", "mix/weight scale 1", "mix/input scale 0", "mix/input scale 1"
    ]  # fmt: skip
    for columns, scale in zip(layer.float_weight().split(12, 1), learned[:2], strict=True):
        torch.testing.assert_close(scale.parameter.data, 2 * columns.abs().mean(1) / 3**0.5)
        torch.testing.assert_close(scale.factor, torch.full((12,), (12 * 3) ** -0.5))
    above = layer.input_quantizer.parts[0].qparams()
    expected = 1 / torch.sqrt(36 * 12 * (above.quant_max - above.zero_point).clamp(min=1))
    torch.testing.assert_close(learned[2].factor, expected)
    task = DataTask(toy.task.network)
    before = [part.scale.clone() for part in layer.input_quantizer.parts]
    LsqTuner(LsqConfig()).tune(tune_job(replace(toy, task=task), student, settings=SETTINGS))
    for part, old in zip(layer.input_quantizer.parts, before, strict=True):
        assert not torch.equal(part.scale, old)
