"""Group G: whole toy denoisers, from calibration through two training steps.

The official flow goes through the project's own parts: capture, assignment on quantized upstream inputs, adapters, the
two losses, DDIM and guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from golden import Case, assert_close, cases
from networks import Full7, GuidedTask, Plain3
from quantlab_mpqdm.omq import KurtosisConfig, KurtosisPolicy
from quantlab_mpqdm.relation import RelationConfig, RelationLoss
from torch import Tensor

from quantlab.allocation.assign import AssignMethod, assign
from quantlab.allocation.plan import make_plan
from quantlab.allocation.smoothing import SmoothConfig, SmoothPass
from quantlab.allocation.student import (
    QuantizerChoice,
    QuantizerChoices,
    Student,
    add_adapters,
    build_student,
    tapped_run,
)
from quantlab.allocation.uniform import UniformPolicy
from quantlab.contracts.allocation import BitMap
from quantlab.contracts.model import CalibrationBatch
from quantlab.contracts.quant import Observer
from quantlab.contracts.sections import Activations, Budget, InputsFrom, Sampling, Weights
from quantlab.contracts.tuning import OUTPUT, AdapterSpec, ConvAdapter, StepContext
from quantlab.graph.capture import capture
from quantlab.graph.captured import CapturedGraph
from quantlab.graph.sites import find_sites
from quantlab.losses.mse import MseConfig, MseLoss
from quantlab.quant.quantizers import AffineQuantizer
from quantlab.sampling import Schedule

OFFSETS = {"small": -1, "mid": 0, "large_res": 1}
SPECIAL = ("time_embed.0", "time_embed.2", "input_blocks.0", "conv_out")


@dataclass(frozen=True)
class Flow:
    """A case on its way through the engine."""

    case: Case
    task: GuidedTask
    graph: CapturedGraph
    student: Student
    bit_map: BitMap

    @property
    def feature(self) -> str:
        return "output_blocks.0" if self.case.params["net"] == "plain3" else "output_blocks.1"


def assigned(case: Case) -> Flow:
    params = case.params
    network = (Plain3 if params["net"] == "plain3" else Full7)(params["c1"], params["c2"])
    network.load_state_dict({name: case[f"fp/{name}"] for name in network.state_dict()})
    task = GuidedTask(network.eval().requires_grad_(False), params["scale"], case["uc"])
    graph = capture(network, task.example_inputs(3), {})
    budget = Budget(weight_bits=params["n_bits"], activation_bits=params["act_bits"])
    keep = dict.fromkeys(SPECIAL, 8) if params["special_8bit"] else {}
    student = build_student(task, graph, make_plan(find_sites(network, graph), keep, budget))
    released = KurtosisConfig(groups=1, search_observer=Observer.MIN_MAX, quantize_inputs=False, small_layers=False)
    method = AssignMethod(
        [SmoothPass(SmoothConfig(alpha=0.5))],
        [UniformPolicy(UniformPolicy.Config()), KurtosisPolicy(released)],
        QuantizerChoices(
            QuantizerChoice(AffineQuantizer, Weights(round_zero_point=False)),
            QuantizerChoice(AffineQuantizer, Activations(round_zero_point=False, per_timestep=True, share_start=True)),
        ),
        InputsFrom.QUANTIZED_UPSTREAM,
    )
    inputs = {"x": case["calib_x"], "timestep": case["calib_t"], "context": case["calib_c"]}
    batch = CalibrationBatch(inputs, inputs["timestep"])
    bit_map = assign(student, method, batch, torch.Generator(), lambda done, total: None)
    return Flow(case, task, graph, student, bit_map)


def check_assignment(flow: Flow) -> None:
    case, bits = flow.case, flow.case.params["n_bits"]
    trained = flow.student.trained_layers()
    for name, layer in flow.student.layers().items():
        prefix = f"naive/{name}"
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        assert weights is not None and inputs is not None
        assert_close(inputs.scale.flatten()[0], case[f"{prefix}.act_quantizer.delta"], rtol=1e-5, what=name)
        assert_close(inputs.zero_point.flatten()[0], case[f"{prefix}.act_quantizer.zero_point"], rtol=1e-5, what=name)
        if name not in trained:
            assert_close(weights.scale, case[f"{prefix}.weight_quantizer.delta"], rtol=1e-5, what=name)
            assert_close(weights.zero_point, case[f"{prefix}.weight_quantizer.zero_point"], rtol=1e-5, what=name)
            continue
        assert layer.smoothing is not None
        assert_close(layer.smoothing, case[f"{prefix}.weight_scale"], rtol=1e-5, what=name)
        assert_close(1 / layer.smoothing, case[f"{prefix}.activation_scale"], rtol=1e-5, what=name)
        for group, offset in OFFSETS.items():
            mask = case[f"{prefix}.weight_mask_{group.removesuffix('_res')}"]
            assert torch.equal(flow.bit_map.weight_bits[name] == bits + offset, mask), (name, group)
            if mask.any():
                quantizer = f"{prefix}.weight_quantizer_{group}"
                assert_close(weights.scale[mask], case[f"{quantizer}.delta"].flatten()[mask], rtol=1e-5, what=group)
                expected = case[f"{quantizer}.zero_point"].flatten()[mask]
                assert_close(weights.zero_point[mask], expected, rtol=1e-5, what=group)


def prepare_training(flow: Flow) -> None:
    """Adapters and activation tables of the case, and gradients on for everything the case has gradients of."""
    case = flow.case
    for name, layer in flow.student.trained_layers().items():
        prefix = f"in/model.{name}"
        assert layer.adapter is not None and isinstance(layer.input_quantizer, AffineQuantizer)
        layer.adapter.A.data, layer.adapter.B.data = case[f"{prefix}.loraA"], case[f"{prefix}.loraB"]
        state = {
            "scale": case[f"{prefix}.delta_list"],
            "zero_point": case[f"{prefix}.zp_list"],
            "timesteps": case["ddim_timesteps"],
            "bits": layer.input_quantizer.bits,
        }
        layer.input_quantizer.load_state_dict(state)
    for layer in flow.student.layers().values():
        for part in (layer.weight_quantizer, layer.input_quantizer, layer.adapter):
            if part is not None:
                part.requires_grad_(True)


def gradients(flow: Flow) -> dict[str, tuple[Tensor, Tensor]]:
    """The official name of every compared gradient -> ours and the mask of its entries."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, gradient: Tensor | None, mask: Tensor | None = None) -> None:
        assert gradient is not None, name
        found[name] = (gradient, torch.ones_like(gradient, dtype=torch.bool) if mask is None else mask)

    for name, layer in flow.student.layers().items():
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        assert weights is not None and inputs is not None
        if layer.adapter is None:
            for official, part in (("weight_quantizer", weights), ("act_quantizer", inputs)):
                add(f"{name}.{official}.delta", part.scale.grad)
                add(f"{name}.{official}.zero_point", part.zero_point.grad)
            continue
        add(f"{name}.loraB.weight", layer.adapter.B.grad)
        add(f"{name}.act_quantizer.delta_list", inputs.scale.grad)
        add(f"{name}.act_quantizer.zp_list", inputs.zero_point.grad)
        for group in OFFSETS:
            mask = flow.case[f"naive/{name}.weight_mask_{group.removesuffix('_res')}"]
            add(f"{name}.weight_quantizer_{group}.delta", weights.scale.grad, mask)
            add(f"{name}.weight_quantizer_{group}.zero_point", weights.zero_point.grad, mask)
    return found


def check_gradients(flow: Flow, step: str) -> None:
    compared = gradients(flow)
    expected = {name: flow.case[f"{step}/{name}"].flatten() for name in compared}
    largest = max(
        value[compared[name][1].flatten()].abs().max().item() if compared[name][1].any() else 0.0
        for name, value in expected.items()
    )
    for name, (gradient, mask) in compared.items():
        if mask.any():
            kept = mask.flatten()
            assert_close(
                gradient.flatten()[kept], expected[name][kept], rtol=1e-3, atol=1e-5 * largest, what=f"{step} {name}"
            )


def clear_gradients(flow: Flow) -> None:
    for parameter in flow.student.network.parameters():
        parameter.grad = None


@pytest.mark.parametrize("case", cases("G"), ids=lambda case: case.id)
def test_from_calibration_to_training(case: Case) -> None:
    flow = assigned(case)
    assert [
        int((flow.bit_map.weight_bits[n] > case.params["n_bits"]).sum()) for n in flow.student.trained_layers()
    ] == [*case.params["omq_best_split"]]
    check_assignment(flow)
    calibration = {"x": case["calib_x"], "timestep": case["calib_t"], "context": case["calib_c"]}
    assert_close(flow.student.run(calibration), case["y_naive"], rtol=2e-5, what="assigned network")

    add_adapters(flow.student, AdapterSpec(32, ConvAdapter.PER_TAP), 0)
    first = {name: value[:4] for name, value in calibration.items()}
    assert_close(flow.student.run(first), case["y_lora_init"], rtol=2e-5, what="with fresh adapters")

    prepare_training(flow)
    check_training(flow)


def check_training(flow: Flow) -> None:
    case, task = flow.case, flow.task
    steps = len(case["ddim_timesteps"])
    schedule = Schedule(case["alphas_cumprod"], Sampling(steps=steps))
    timesteps = schedule.timesteps
    assert torch.equal(timesteps.flip(0), case["ddim_timesteps"])
    student = tapped_run(flow.student.network, flow.student.graph, (flow.feature,))
    teacher = tapped_run(task.network, flow.graph, (flow.feature,))
    relations = {
        gradient: RelationLoss(RelationConfig(feature=flow.feature, gradient=gradient)) for gradient in (False, True)
    }
    mse = MseLoss(MseConfig())

    x = case["x_T"]
    for index in range(2):
        inputs = {"x": x, "timestep": timesteps[index].expand(len(x)), "context": case["c"]}
        network_inputs = task.network_inputs(inputs)
        output, taps = student(network_inputs)
        float_output, float_taps = teacher(network_inputs)
        mine = {OUTPUT: task.combine(output, inputs), **taps}
        theirs = {OUTPUT: task.combine(float_output, inputs), **float_taps}
        number = index + 1
        assert_close(taps[flow.feature], case[f"q_feat_step{number}"], rtol=5e-5, what="student feature")
        assert_close(float_taps[flow.feature], case[f"fp_feat_step{number}"], rtol=5e-5, what="teacher feature")
        context = StepContext(inputs["timestep"], index, steps, torch.Generator())
        squared = mse(mine, theirs, context)
        released = relations[False](mine, theirs, context)
        attached = relations[True](mine, theirs, context)
        if index == 0:
            assert released is None and attached is None
            assert_close(squared, case["loss_step1"], rtol=1e-4, what="first loss")
            squared.backward()
            check_gradients(flow, "grad1")
        else:
            assert released is not None and attached is not None
            assert_close(squared, case["mse_step2"], rtol=1e-4, what="squared error")
            assert_close(released, case["relational_step2"], rtol=1e-4, what="relation loss")
            assert_close(attached, case["relational_step2"], rtol=1e-4, what="relation loss, attached")
            assert_close(squared + released, case["loss_step2"], rtol=1e-4, what="second loss")
            assert not released.requires_grad, "the released relation loss trains nothing"
            (squared + released).backward(retain_graph=True)
            check_gradients(flow, "grad2")
            clear_gradients(flow)
            (squared + attached).backward()
            check_gradients(flow, "grad2_paper")
        clear_gradients(flow)
        x = schedule.step(index, theirs[OUTPUT], x)
        assert_close(x, case[f"x_after_step{number}"], rtol=5e-5, what=f"x after step {number}")
