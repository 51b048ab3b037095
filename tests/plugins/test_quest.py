"""QuEST's selective fine-tuning: which layers, which loss, and that it resumes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quantlab_quest.selective import SelectiveConfig, SelectiveTuner, find_stages, local_loss, squared_error
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Memory, Toy, affine, make_toy, silent, tune_job

from quantlab.allocation.assign import AssignMethod, assign
from quantlab.allocation.student import Student
from quantlab.allocation.uniform import UniformPolicy
from quantlab.calibration.collect import calibration_batch
from quantlab.contracts.block import TEMPORAL
from quantlab.contracts.sections import InputsFrom
from quantlab.errors import NonFiniteError, QuantlabError


class Attending(nn.Module):
    """A time embedding, one attention, and a layer that is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 8)
        self.inside = nn.Conv2d(1, 8, 1)
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.inside(sample) + self.time(timestep.float()[:, None] / 1000)[:, :, None, None]
        tokens = x.flatten(2).transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            *(layer(tokens)[:, None] for layer in (self.query, self.key, self.value))
        )
        return self.last(x + self.out(attended[:, 0]).transpose(1, 2).unflatten(2, (6, 6)))


def attending() -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_toy(Attending(), weight_bits=2, activation_bits=4)


def prepared(toy: Toy) -> Student:
    student = toy.student()
    method = AssignMethod([], [UniformPolicy(UniformPolicy.Config())], affine(), InputsFrom.TEACHER)
    assign(student, method, calibration_batch(toy.task, toy.calibration, 8), torch.Generator(), silent)
    return student


def tuner(**options: object) -> SelectiveTuner:
    fast = {"share": 0.5, "weight_learning_rate": 1e-2, "activation_learning_rate": 1e-3}
    return SelectiveTuner(SelectiveConfig.model_validate(fast | options))


def test_the_stages_are_found_from_the_graph() -> None:
    toy = attending()
    stages = find_stages(tune_job(toy, prepared(toy)))
    assert [(stage.name, stage.sites) for stage in stages] == [
        (TEMPORAL, ("time",)),
        ("attention", ("query", "key", "value", "out")),
    ]


def test_it_trains_the_chosen_weights_and_every_activation_scale() -> None:
    toy = attending()
    student = prepared(toy)
    before = {name: value.clone() for name, value in student.network.state_dict().items()}
    history = tuner().tune(tune_job(toy, student)).history
    changed = {name for name, value in student.network.state_dict().items() if not torch.equal(value, before[name])}
    weights = {name.removesuffix(".weight") for name in changed if name.endswith(".weight")}
    assert weights == {"time", "query", "key", "value", "out"}
    # The time embedding's one input is quantized without error at each timestep, so that its scale has no gradient.
    scaled = {site.name for site in toy.sites if site.weight_shape} - {"time"}
    assert {f"{name}.input_quantizer.scale" for name in scaled} <= changed
    assert not [name for name in changed if "weight_quantizer" in name or name.endswith("bias")]
    assert list(history) == [TEMPORAL, "attention"]
    assert sum(history["attention"][-5:]) < 0.8 * sum(history[TEMPORAL][:5])


def test_the_loss_is_the_sum_of_its_parts() -> None:
    found, target = torch.zeros(3, 2, 2), torch.full((3, 2, 2), 2.0)
    assert squared_error(found, target) == 4 * 4
    assert local_loss({"a": found, "b": found + 1}, {"a": target, "b": target}) == 4 * 4 + 4 * 1


def test_a_killed_run_resumes_to_the_same_bits() -> None:
    toy = attending()
    student = prepared(toy)
    job = tune_job(toy, student)
    whole = tuner(share=0.05).tune(job)
    assert isinstance(job.checkpoint, Memory)
    resumed = prepared(toy)
    again = replace(tune_job(toy, resumed), checkpoint=Memory(job.checkpoint.saved[:1]))
    assert tuner(share=0.05).tune(again).history == whole.history
    expected = student.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.network.state_dict().items())


def test_a_stage_that_is_not_finite_is_named() -> None:
    toy = attending()
    student = prepared(toy)
    student.layer("last").weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="stage temporal, iteration 0"):
        tuner().tune(tune_job(toy, student))


def test_a_network_with_nothing_to_choose_is_refused() -> None:
    toy = make_toy(keep={"time": 8, "blocks.0.shift": 8, "blocks.1.shift": 8})
    with pytest.raises(QuantlabError, match="no layer of a time embedding or of attention"):
        tuner().tune(tune_job(toy, prepared(toy)))
