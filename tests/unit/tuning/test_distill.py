"""The distillation tuner: it learns, resumes to the same, and tells what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from quantlab_mpqdm.memory import MemoryRelationConfig, MemoryRelationLoss
from quantlab_mpqdm.relation import RelationConfig, RelationLoss
from torch import Tensor
from toys import Memory, Toy, affine, make_toy, silent, tune_job

from quantlab.allocation.assign import AssignMethod, assign
from quantlab.allocation.student import Student, add_adapters
from quantlab.allocation.uniform import UniformPolicy
from quantlab.calibration.collect import calibration_batch
from quantlab.contracts.allocation import FLOAT_BITS
from quantlab.contracts.schedule import Schedule
from quantlab.contracts.sections import InputsFrom, Tune
from quantlab.contracts.tuning import OUTPUT, AdapterSpec, AdapterStart, ConvAdapter, Loss, StepContext, TuneJob
from quantlab.errors import NonFiniteError, QuantlabError
from quantlab.losses.fisher import FisherConfig, FisherLoss
from quantlab.losses.mse import MseConfig, MseLoss
from quantlab.quant.quantizers import AffineQuantizer
from quantlab.tuning.distill import DistillConfig, DistillTuner, parameter_groups
from quantlab.tuning.finalize import finalize

SETTINGS = Tune(
    iterations=24, batch=4, rank=2, adapter_learning_rate=3e-3, weight_learning_rate=1e-3, activation_learning_rate=1e-3
)


def assigned(toy: Toy) -> Student:
    student = toy.student()
    method = AssignMethod([], [UniformPolicy(UniformPolicy.Config())], affine(), InputsFrom.TEACHER)
    assign(student, method, calibration_batch(toy.task, toy.calibration, 8), torch.Generator(), silent)
    return student


def prepared(toy: Toy) -> Student:
    student = assigned(toy)
    add_adapters(student, AdapterSpec(SETTINGS.rank), 0)
    return student


def job_of(toy: Toy, student: Student, losses: list[Loss], settings: Tune = SETTINGS) -> TuneJob:
    return tune_job(toy, student, losses, settings)


def tuned(toy: Toy, losses: list[Loss], **options: object) -> tuple[Student, Mapping]:
    student = prepared(toy)
    result = DistillTuner(DistillConfig(**options)).tune(job_of(toy, student, losses))  # type: ignore[arg-type]
    return student, result.history


def mse() -> MseLoss:
    return MseLoss(MseConfig())


def error(toy: Toy, student: Student) -> float:
    inputs = toy.calibration.step(1, slice(None))
    with torch.no_grad():
        return (student.run(inputs) - toy.calibration.outputs[1]).square().mean().item()


def test_it_learns() -> None:
    toy = make_toy(weight_bits=2, activation_bits=4)
    student, history = tuned(toy, [mse()])
    assert error(toy, student) < 0.6 * error(toy, prepared(toy))
    assert len(history["total"]) == SETTINGS.iterations


def test_the_same_seed_gives_the_same() -> None:
    toy = make_toy(weight_bits=2)
    one, other = (tuned(toy, [mse()])[0].network.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("epochs_before", [1, 3, 5])
def test_a_killed_run_resumes_to_the_same_result(epochs_before: int) -> None:
    toy = make_toy(weight_bits=2)
    losses = [mse(), RelationLoss(RelationConfig(weight=1.0))]
    student = prepared(toy)
    job = job_of(toy, student, losses)
    whole = DistillTuner(DistillConfig()).tune(job)
    assert isinstance(job.checkpoint, Memory)
    resumed = prepared(toy)
    again = replace(job_of(toy, resumed, losses), checkpoint=Memory(job.checkpoint.saved[:epochs_before]))
    history = DistillTuner(DistillConfig()).tune(again).history
    expected = student.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.network.state_dict().items())
    assert history["total"] == whole.history["total"]


def test_checkpointing_gradients_changes_nothing() -> None:
    toy = make_toy(weight_bits=2)
    one = tuned(toy, [mse()])[0].network.state_dict()
    other = tuned(toy, [mse()], gradient_checkpointing=True)[0].network.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_fisher_weights_of_a_feature_work_with_recomputed_layers() -> None:
    """Its weights take a backward pass of their own through the graph that is then used again."""
    toy = make_toy(weight_bits=2)
    losses: list[Loss] = [FisherLoss(FisherConfig(feature="blocks.0"))]
    one = tuned(toy, losses)[0].network.state_dict()
    other = tuned(toy, losses, gradient_checkpointing=True)[0].network.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_relation_loss_trains_only_with_its_gradient() -> None:
    """The released code detaches the features: then tuning is bitwise what it is without the loss."""
    toy = make_toy(weight_bits=2)

    def weights(losses: list[Loss]) -> dict[str, Tensor]:
        return tuned(toy, losses)[0].network.state_dict()

    alone = weights([mse()])
    released = weights([mse(), RelationLoss(RelationConfig(weight=5.0, gradient=False))])
    attached = weights([mse(), RelationLoss(RelationConfig(weight=5.0, gradient=True))])
    assert all(torch.equal(alone[name], released[name]) for name in alone)
    assert any(not torch.equal(alone[name], attached[name]) for name in alone)


def test_a_resumed_run_has_the_memory_of_the_killed_one() -> None:
    """And a loss that was used before begins a run without a memory."""
    toy = make_toy(weight_bits=2)
    losses: list[Loss] = [mse(), MemoryRelationLoss(MemoryRelationConfig(size=30, refreshed=9, samples=50, weight=0.1))]
    student = prepared(toy)
    job = job_of(toy, student, losses)
    whole = DistillTuner(DistillConfig()).tune(job)
    assert isinstance(job.checkpoint, Memory)
    resumed = prepared(toy)
    again = replace(job_of(toy, resumed, losses), checkpoint=Memory(job.checkpoint.saved[:3]))
    history = DistillTuner(DistillConfig()).tune(again).history
    assert history == whole.history
    expected = student.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.network.state_dict().items())
    assert tuned(toy, losses)[1] == whole.history, "from its start"


def test_a_loss_draws_anew_at_every_step_and_again_the_same_after_a_kill() -> None:
    toy = make_toy(weight_bits=2)
    drawn: list[int] = []

    class Drawing(MseLoss):
        def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], step: StepContext) -> Tensor:
            drawn.append(int(torch.randint(2**40, (), generator=step.rng)))
            return super().__call__(student, teacher, step)

    tuned(toy, [Drawing(MseConfig())])
    once = drawn.copy()
    tuned(toy, [Drawing(MseConfig())])
    assert len(set(once)) == SETTINGS.iterations and drawn[len(once) :] == once


def test_progress_goes_from_0_to_1_and_a_schedule_follows_it() -> None:
    toy = make_toy(weight_bits=2)
    seen: list[float] = []

    class Watching(MseLoss):
        def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], step: StepContext) -> Tensor:
            seen.append(step.progress)
            return super().__call__(student, teacher, step)

    _, history = tuned(toy, [mse(), Watching(MseConfig(schedule=Schedule(initial=0.0, start=0.5)))])
    assert seen == [index / SETTINGS.iterations for index in range(SETTINGS.iterations)]
    scheduled = [0.0 if share <= 0.5 else (share - 0.5) / 0.5 for share in seen]
    assert history["mse-2"] == pytest.approx([f * v for f, v in zip(scheduled, history["mse"], strict=True)])
    assert history["total"] == pytest.approx([a + b for a, b in zip(history["mse"], history["mse-2"], strict=True)])


def test_a_schedule_of_ones_changes_nothing() -> None:
    toy = make_toy(weight_bits=2)
    one = tuned(toy, [mse()])[0].network.state_dict()
    other = tuned(toy, [MseLoss(MseConfig(schedule=Schedule(start=0.2, end=0.4)))])[0].network.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_only_losses_without_gradient_are_an_error() -> None:
    with pytest.raises(QuantlabError, match="no loss has a gradient"):
        tuned(make_toy(), [RelationLoss(RelationConfig(gradient=False))])


def test_a_bad_site_is_named() -> None:
    toy = make_toy()
    student = prepared(toy)
    student.layer("blocks.1.conv").adapter.B.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"adapter\.B of blocks\.1\.conv"):
        DistillTuner(DistillConfig()).tune(job_of(toy, student, [mse()]))


def test_a_bad_module_before_every_trained_site_is_named() -> None:
    toy = make_toy(keep={"conv_in": FLOAT_BITS})
    student = prepared(toy)
    student.network.conv_in.weight.data[0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"weight of conv_in"):
        DistillTuner(DistillConfig()).tune(job_of(toy, student, [mse()]))


class Explosive(MseLoss):
    """Finite, with a gradient that is not."""

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], step: StepContext) -> Tensor:
        return (student[OUTPUT] * 0).abs().sqrt().sum()


def test_a_gradient_that_is_not_finite_stops_before_it_does_harm() -> None:
    toy = make_toy()
    student = prepared(toy)
    before = {name: value.clone() for name, value in student.network.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"the gradient of .*/adapter/"):
        DistillTuner(DistillConfig()).tune(job_of(toy, student, [Explosive(MseConfig())]))
    assert all(torch.equal(value, before[name]) for name, value in student.network.state_dict().items())


def test_scales_stay_positive() -> None:
    toy = make_toy(weight_bits=2)
    wild = SETTINGS.model_copy(update={"weight_learning_rate": 10.0, "activation_learning_rate": 10.0})
    student = prepared(toy)
    DistillTuner(DistillConfig()).tune(job_of(toy, student, [mse()], wild))
    scales = [value for name, value in student.network.state_dict().items() if name.endswith("scale")]
    assert min(value.min().item() for value in scales) > 0


def test_kept_sites_are_not_trained() -> None:
    toy = make_toy(keep={"conv_in": 8})
    before = prepared(toy).layer("conv_in").state_dict()
    after = tuned(toy, [mse()])[0].layer("conv_in").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_learning_rates_follow_the_scales() -> None:
    toy = make_toy()
    layers = prepared(toy).trained_layers()
    settings = Tune(iterations=1, adapter_learning_rate=None, weight_learning_rate=1e-6, activation_learning_rate=5e-4)
    found = {}
    for group in parameter_groups(layers, settings, scale_offset=0.01):
        for parameter in group["params"]:  # type: ignore[attr-defined]
            found[id(parameter)] = group["lr"]
    for layer in layers.values():
        expected = (layer.weight_quantizer.scale.mean().item() + 0.01) / 2500
        assert found[id(layer.adapter.A)] == pytest.approx(expected, rel=1e-6)
        assert found[id(layer.weight_quantizer.scale)] == 1e-6
        assert found[id(layer.input_quantizer.zero_point)] == 5e-4


class Unpackable(AffineQuantizer):
    """A format that codes, scale and zero point do not describe."""

    def qparams(self) -> None:  # type: ignore[override]
        return None


def test_a_format_without_a_scale_asks_for_a_learning_rate() -> None:
    toy = make_toy()
    layers = prepared(toy).trained_layers()
    for layer in layers.values():
        layer.weight_quantizer.__class__ = Unpackable
    with pytest.raises(QuantlabError, match=r"tune\.adapter_learning_rate: .*\n.*set it to a number"):
        parameter_groups(layers, Tune(iterations=1, adapter_learning_rate=None), scale_offset=0.0)


@pytest.mark.parametrize("start", AdapterStart)
def test_every_start_trains_and_is_the_same_after_a_kill(start: AdapterStart) -> None:
    toy = make_toy(weight_bits=2)

    def student_at_start() -> Student:
        student = assigned(toy)
        add_adapters(student, DistillTuner(DistillConfig(start=start)).adapter(SETTINGS), 0)
        return student

    student = student_at_start()
    job = job_of(toy, student, [mse()])
    DistillTuner(DistillConfig(start=start)).tune(job)
    assert isinstance(job.checkpoint, Memory)
    resumed = student_at_start()
    assert error(toy, student) < 0.8 * error(toy, resumed)
    again = replace(job_of(toy, resumed, [mse()]), checkpoint=Memory(job.checkpoint.saved[:2]))
    DistillTuner(DistillConfig(start=start)).tune(again)
    expected = student.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.network.state_dict().items())


def test_finalize_keeps_the_function() -> None:
    toy = make_toy(weight_bits=2)
    student, _ = tuned(toy, [mse()], conv=ConvAdapter.PER_TAP)
    inputs = toy.task.example_inputs(4)
    before = student.run(inputs)
    changed = finalize(student.layers())
    torch.testing.assert_close(student.run(inputs), before, rtol=1e-4, atol=1e-5)
    assert max(changed.values()) < 1e-5
    zero_points = [layer.weight_quantizer.zero_point for layer in student.layers().values()]
    assert all(torch.equal(value, value.round()) for value in zero_points)
    assert all(layer.adapter is None for layer in student.layers().values())
