"""Assignment with what sites see on disk, and with weights where the float network has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantlab_mpqdm.omq import KurtosisConfig, KurtosisPolicy
from toys import Attending, Toy, affine, make_toy, silent

from quantlab.allocation.assign import AssignMethod, assign, smoothed_records
from quantlab.allocation.plan import make_plan
from quantlab.allocation.scores import ScoreMeter
from quantlab.allocation.smoothing import SmoothConfig, SmoothPass
from quantlab.allocation.student import Student, build_student, fill
from quantlab.allocation.uniform import UniformPolicy
from quantlab.calibration.collect import calibration_batch
from quantlab.calibration.spill import Streaming
from quantlab.calibration.stats import TensorSiteData
from quantlab.contracts.allocation import BitMap
from quantlab.contracts.quant import Observer
from quantlab.contracts.scores import Operand, Score, ScoreRequest
from quantlab.contracts.sections import Activations, Attention, InputsFrom

POLICIES = [UniformPolicy(UniformPolicy.Config()), KurtosisPolicy(KurtosisConfig())]
KEEP = {"conv_in": 8, "conv_out": 8, "time": 8}


def method(inputs_from: InputsFrom = InputsFrom.TEACHER) -> AssignMethod:
    return AssignMethod([SmoothPass(SmoothConfig())], POLICIES, affine(), inputs_from)


@pytest.fixture(scope="module")
def toy() -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        toy = make_toy(Attending(), keep=KEEP)
    return replace(toy, plan=make_plan(toy.sites, KEEP, toy.plan.budget, attention=Attention()))


def assigned(
    toy: Toy, streaming: Streaming | None, inputs_from: InputsFrom = InputsFrom.TEACHER
) -> tuple[Student, BitMap]:
    student = build_student(toy.task, toy.graph, toy.plan, share=streaming is not None)
    batch = calibration_batch(toy.task, toy.calibration, 8)
    rng = torch.Generator().manual_seed(0)
    return student, assign(student, method(inputs_from), batch, rng, silent, streaming=streaming)


@pytest.mark.parametrize("inputs_from", list(InputsFrom))
def test_one_part_on_disk_gives_the_bits_and_scales_of_memory(toy: Toy, tmp_path: Path, inputs_from) -> None:
    in_memory, bits = assigned(toy, None, inputs_from)
    on_disk, same = assigned(toy, Streaming(32, tmp_path), inputs_from)
    assert all(torch.equal(value, same.weight_bits[name]) for name, value in bits.weight_bits.items())
    state = on_disk.network.state_dict()
    for name, value in in_memory.network.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_several_parts_give_nearly_the_same(toy: Toy, tmp_path: Path) -> None:
    in_memory, _ = assigned(toy, None)
    in_parts, _ = assigned(toy, Streaming(5, tmp_path))
    state = in_parts.network.state_dict()
    for name, value in in_memory.network.state_dict().items():
        if name.endswith(("smoothing", "input_quantizer.scale")):
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-6, msg=name)


def test_records_on_disk_are_the_records(toy: Toy, tmp_path: Path) -> None:
    batch = calibration_batch(toy.task, toy.calibration, 8)
    held = smoothed_records(toy.student(), method(), batch)
    lazy = smoothed_records(toy.student(), method(), batch, Streaming(32, tmp_path))
    assert list(lazy) == list(held) and len(lazy) == len(held)
    assert lazy["conv_in"] is not lazy["conv_in"], "made when asked for"
    bits = torch.full((8,), 3, dtype=torch.int8)
    data, one = TensorSiteData(held), TensorSiteData(lazy, one_site=True)
    for site in ("blocks.0.conv", "blocks.1.conv", "blocks.0.conv"):
        width = bits[:1].expand(len(held[site].weight))
        error = data.output_error(site, width, Observer.MSE, 4)
        assert one.output_error(site, width, Observer.MSE, 4) == error > 0
        assert torch.equal(one.input_gram(site), data.input_gram(site))
        kept = (one._outputs, one._quantized_inputs, one._grams)
        assert [len(each) for each in kept] == [1, 1, 1], "of one site"


@pytest.mark.parametrize("operand", list(Operand))
@pytest.mark.parametrize("score", [Score.OUTPUT_MSE, Score.NETWORK_SQNR])
def test_scores_from_disk(tmp_path: Path, score: Score, operand: Operand) -> None:
    toy = make_toy(keep=KEEP)
    choices = affine(activations=Activations())
    plain, request = replace(method(), choices=choices), ScoreRequest(score, (3,), operand, rows=16)
    batch, found = calibration_batch(toy.task, toy.calibration, 8), []
    for streaming, rows in ((None, None), (Streaming(32, tmp_path), 16)):
        student = toy.student()
        meter = ScoreMeter(student, smoothed_records(student, plain, batch, streaming), choices, batch, rows)
        found.append(meter.measure(request, torch.Generator().manual_seed(0), silent))
    assert found[0] == {name: value for name, value in found[1].items() if torch.equal(value, found[0][name])}


def test_a_sharing_student_has_no_weights_of_its_own_until_it_is_filled(toy: Toy) -> None:
    weights = {name: value.clone() for name, value in toy.task.network.state_dict().items()}
    student = build_student(toy.task, toy.graph, toy.plan, share=True)
    shared = student.layer("blocks.0.conv").weight
    assert shared.data_ptr() == toy.task.network.get_submodule("blocks.0.conv").weight.data_ptr()
    assert shared is not toy.task.network.get_submodule("blocks.0.conv").weight
    state = {name: value.clone() for name, value in student.network.state_dict().items()}
    fill(student, state)
    layer = student.layer("blocks.0.conv")
    assert layer.weight.data_ptr() == state["blocks.0.conv.weight"].data_ptr() and not layer.weight.requires_grad
    layer.set_float_weight(torch.zeros_like(layer.weight))
    assert all(torch.equal(value, weights[name]) for name, value in toy.task.network.state_dict().items())
