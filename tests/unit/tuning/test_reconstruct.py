"""Reconstruction: it lowers errors, keeps codes on the grid, resumes to the same, and names what is bad."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from toys import Memory, Toy, affine, make_toy, silent, split_toy, tune_job

from quantlab.allocation.assign import AssignMethod, assign
from quantlab.allocation.student import Student
from quantlab.allocation.uniform import UniformPolicy
from quantlab.calibration.collect import calibration_batch
from quantlab.contracts.block import TEMPORAL, Block, Border, Grouping, Partition
from quantlab.contracts.sections import Activations, InputsFrom, Tune
from quantlab.errors import NonFiniteError, QuantlabError
from quantlab.tuning.block_data import BlockData
from quantlab.tuning.finalize import finalize
from quantlab.tuning.reconstruct import ReconstructConfig, ReconstructTuner, block_error

FAST: dict[str, object] = {"batch": 16, "learning_rate": 0.05}


def prepared(toy: Toy, inputs: Activations | None = None) -> Student:
    """A student with bits and scales."""
    student = toy.student()
    method = AssignMethod([], [UniformPolicy(UniformPolicy.Config())], affine(None, inputs), InputsFrom.TEACHER)
    assign(student, method, calibration_batch(toy.task, toy.calibration, 8), torch.Generator(), silent)
    return student


def reconstructed(
    toy: Toy, inputs: Activations | None = None, iterations: int = 60, **options: object
) -> tuple[Student, dict]:
    student = prepared(toy, inputs)
    job = tune_job(toy, student, settings=Tune(iterations=iterations))
    config = ReconstructConfig.model_validate(FAST | options)
    return student, dict(ReconstructTuner(config).tune(job).history)


def output_error(toy: Toy, student: Student) -> float:
    errors = []
    with torch.no_grad():
        for index in range(toy.calibration.num_steps):
            found = student.run(toy.calibration.step(index, slice(None)))
            errors.append((found - toy.calibration.outputs[index]).square().mean().item())
    return sum(errors) / len(errors)


class Correlated(nn.Module):
    """One linear layer whose inputs x = u M have the Gram matrix M^T M."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(5)
        shared = torch.randn(36, 1, generator=rng) * torch.ones(1, 20)
        self.register_buffer("mixing", shared + 0.3 * torch.randn(36, 20, generator=rng))
        self.layer = nn.Linear(20, 6, bias=False)
        nn.init.normal_(self.layer.weight, generator=rng)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(sample.flatten(1) @ self.mixing)


def test_learned_rounding_beats_the_nearest_under_the_gram_matrix() -> None:
    """E ||x dW^T||^2 = tr(dW G dW^T) for white u: the errors of correlated inputs can be made to cancel."""
    toy = make_toy(Correlated(), weight_bits=3)
    nearest = prepared(toy)
    student, _ = reconstructed(toy, drop=1.0, float_inputs=1.0, iterations=400, regulariser=1.0)
    weight = toy.task.network.layer.weight.double()
    gram = (toy.task.network.mixing.T @ toy.task.network.mixing).double()

    def error(found: Student) -> float:
        change = found.layer("layer").quantized_weight().double() - weight
        return torch.trace(change @ gram @ change.T).item()

    assert error(student) < 0.3 * error(nearest)
    layer = student.layer("layer")
    parameters = layer.weight_quantizer.qparams()
    scale, zero_point = parameters.scale[:, None], parameters.zero_point[:, None]
    codes = layer.quantized_weight() / scale + zero_point
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    low = (torch.floor(weight.float() / scale) + zero_point).clamp(0, 7)
    high = (torch.ceil(weight.float() / scale) + zero_point).clamp(0, 7)
    assert ((codes.round() == low) | (codes.round() == high)).all()
    assert (codes.round() != (nearest.layer("layer").quantized_weight() / scale + zero_point).round()).any()


@pytest.mark.parametrize(
    "options",
    [
        {"grouping": "layer", "drop": 1.0},
        {"drop": 1.0, "activations": "after"},
        {"drop": 0.5, "float_inputs": 0.5, "activations": "joint"},
        {"temporal_first": True, "inner_weight": 1.0},
    ],
    ids=["adaround", "brecq", "qdrop", "temporal"],
)
def test_it_lowers_the_output_error_and_stays_on_the_grid(options: dict) -> None:
    toy = make_toy(weight_bits=2, activation_bits=8)
    before = prepared(toy)
    student, history = reconstructed(toy, **options)
    assert output_error(toy, student) < 0.7 * output_error(toy, before)
    assert all(torch.isfinite(torch.tensor(errors)).all() for errors in history.values())
    for name, layer in student.layers().items():
        codes = before.layer(name).weight_quantizer.qparams()
        grid = layer.quantized_weight() / codes.scale.view(-1, *(1,) * (layer.weight.dim() - 1))
        torch.testing.assert_close(grid, grid.round(), atol=1e-3, rtol=0)
    assert student.network.state_dict().keys() == before.network.state_dict().keys()
    assert max(finalize(student.layers()).values()) == 0


@pytest.mark.parametrize("activations", ["joint", "after"])
def test_split_sites_are_reconstructed_part_by_part(activations: str) -> None:
    toy = split_toy(weight_bits=2, activation_bits=6)
    before = prepared(toy)
    student, _ = reconstructed(toy, activations=activations, drop=0.5)
    assert output_error(toy, student) < 0.7 * output_error(toy, before)
    for site in ("join", "mix"):
        layer, start = student.layer(site), before.layer(site)
        for part, old in zip(layer.input_quantizer.parts, start.input_quantizer.parts, strict=True):
            assert not torch.equal(part.scale, old.scale)
        columns = layer.float_weight().split((12, 12), 1)
        for part, piece in zip(layer.weight_quantizer.parts, columns, strict=True):
            codes = piece / part.scale.view(-1, *(1,) * (piece.dim() - 1))
            torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
        assert not torch.equal(layer.quantized_weight(), start.quantized_weight())


def test_blocks_and_their_order() -> None:
    toy = make_toy()
    _, history = reconstructed(toy, iterations=2)
    assert list(history) == ["time", "conv_in", "blocks.0", "blocks.1", "conv_out"]
    assert {len(errors) for errors in history.values()} == {2}
    _, history = reconstructed(toy, iterations=2, temporal_first=True, activations="after", activation_share=1.5)
    assert list(history) == [TEMPORAL, "conv_in", "blocks.0", "blocks.1", "conv_out"]
    assert {len(errors) for errors in history.values()} == {5}


def test_the_temporal_block_is_not_touched_again() -> None:
    toy = make_toy(weight_bits=2)
    job = tune_job(toy, student := prepared(toy))
    ReconstructTuner(ReconstructConfig.model_validate(FAST | {"temporal_first": True})).tune(job)
    assert isinstance(job.checkpoint, Memory)
    done, first = job.checkpoint.saved[0]
    assert done == 1
    for site in ("time", "blocks.0.shift", "blocks.1.shift"):
        assert torch.equal(first[f"layer/{site}/weight"], student.layer(site).weight)
    for site in ("blocks.0.shift", "blocks.1.shift"):
        assert not torch.equal(toy.task.network.get_submodule(site).weight, student.layer(site).weight)


@pytest.mark.parametrize("blocks_before", [1, 3, 5])
def test_a_killed_run_resumes_to_the_same_bits(blocks_before: int) -> None:
    toy = make_toy(weight_bits=2, activation_bits=4)
    options = FAST | {"drop": 0.5, "float_inputs": 0.5, "activations": "joint"}
    tuner = ReconstructTuner(ReconstructConfig.model_validate(options))
    student = prepared(toy)
    job = tune_job(toy, student, settings=Tune(iterations=8))
    whole = tuner.tune(job)
    assert isinstance(job.checkpoint, Memory)
    resumed = prepared(toy)
    again = replace(
        tune_job(toy, resumed, settings=job.settings), checkpoint=Memory(job.checkpoint.saved[:blocks_before])
    )
    assert tuner.tune(again).history == whole.history
    expected = student.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.network.state_dict().items())


def test_kept_sites_are_not_trained() -> None:
    toy = make_toy(keep={"blocks.0.conv": 8})
    before = prepared(toy).layer("blocks.0.conv").state_dict()
    after = reconstructed(toy, activations="joint")[0].layer("blocks.0.conv").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_scales_learn_only_when_asked_and_stay_positive() -> None:
    toy = make_toy(activation_bits=4)
    before = prepared(toy).network.state_dict()

    def changed(**options: object) -> set[str]:
        after = reconstructed(toy, iterations=5, **options)[0].network.state_dict()
        assert min(after[name].min().item() for name in after if name.endswith("scale")) > 0
        return {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}

    assert changed() == {"weight"}
    assert changed(activations="joint", activation_learning_rate=10.0) == {"weight", "scale", "zero_point"}
    assert changed(activations="after", activation_learning_rate=10.0) == {"weight", "scale", "zero_point"}


def test_static_activations() -> None:
    toy = make_toy(weight_bits=2)
    static = Activations(per_timestep=False)
    student, _ = reconstructed(toy, static, activations="joint")
    assert output_error(toy, student) < output_error(toy, prepared(toy, static))


def test_no_iterations_change_nothing() -> None:
    toy = make_toy()
    before = prepared(toy).network.state_dict()
    student, history = reconstructed(toy, iterations=0)
    assert history == {} and all(torch.equal(before[name], v) for name, v in student.network.state_dict().items())


def test_a_bad_block_is_named_and_quantizers_are_put_back() -> None:
    toy = make_toy()
    student = prepared(toy)
    layer = student.layer("blocks.1.conv")
    layer.input_quantizer.scale.data.fill_(float("nan"))
    quantizers = layer.weight_quantizer, layer.input_quantizer
    with pytest.raises(NonFiniteError, match=r"block blocks\.1, iteration 0") as caught:
        ReconstructTuner(ReconstructConfig.model_validate(FAST | {"drop": 0.5})).tune(tune_job(toy, student))
    assert "blocks.1.conv" in caught.value.what and "learning_rate" in caught.value.next_step
    assert (layer.weight_quantizer, layer.input_quantizer) == quantizers


def test_a_weight_without_a_grid_is_refused_before_anything_changes(monkeypatch) -> None:
    toy = make_toy()
    student = prepared(toy)
    before = student.layer("time").weight.clone()
    monkeypatch.setattr(student.layer("conv_out").weight_quantizer, "qparams", lambda: None)
    with pytest.raises(QuantlabError, match="site conv_out"):
        ReconstructTuner(ReconstructConfig.model_validate(FAST)).tune(tune_job(toy, student))
    assert torch.equal(student.layer("time").weight, before)


def test_the_error_sums_channels_and_averages_the_rest() -> None:
    found, target = torch.zeros(2, 3, 4), torch.full((2, 3, 4), 2.0)
    assert block_error(found, target, 2.0) == 3 * 4
    assert block_error(found, target, 3.0) == 3 * 8
    assert block_error(found[:, 0, 0], target[:, 0, 0], 2.0) == 4


def test_rows_are_drawn_together() -> None:
    """Entries of one row stay together, what belongs to no row is given whole, and float inputs are mixed in."""
    row = torch.arange(4.0)
    inputs = {"x": row[:, None].expand(4, 2), "windows": row.repeat_interleave(3)[:, None], "table": torch.ones(5)}
    floats = {"x": inputs["x"] + 100}
    data = BlockData(inputs, floats, {"y": row}, rows=4)
    rng = torch.Generator().manual_seed(0)
    drawn, targets = data.draw(2, 0.0, rng)
    assert torch.equal(drawn["x"][:, 0], targets["y"])
    assert torch.equal(drawn["windows"][:, 0], targets["y"].repeat_interleave(3))
    assert drawn["table"].shape == (5,)
    drawn, targets = data.draw(9, 1.0, rng)
    assert torch.equal(drawn["x"][:, 0], targets["y"] + 100) and len(targets["y"]) == 4


def test_inputs_are_of_the_quantized_network_as_it_is() -> None:
    """Once a block is reconstructed, the next one sees what it gives now."""
    toy = make_toy(weight_bits=2)
    student = prepared(toy)
    job = tune_job(toy, student)
    seen: dict[str, Border] = {}

    def watched(block: Block) -> Block:
        def record(inputs) -> Border:
            seen[block.name] = block.record_student(inputs)
            return seen[block.name]

        return replace(block, record_student=record)

    cut = job.cut
    watching = replace(job, cut=lambda partition: tuple(map(watched, cut(partition))))
    ReconstructTuner(ReconstructConfig.model_validate(FAST)).tune(watching)
    before = {block.name: block for block in tune_job(toy, prepared(toy)).cut(Partition(Grouping.BLOCK))}
    for block in cut(Partition(Grouping.BLOCK)):
        border = block.record_student(job.batch.inputs)
        assert all(torch.equal(value, seen[block.name].inputs[name]) for name, value in border.inputs.items())
    untouched = before["conv_out"].record_student(job.batch.inputs).inputs
    assert not all(torch.equal(value, seen["conv_out"].inputs[name]) for name, value in untouched.items())
