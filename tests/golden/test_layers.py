"""Group E: adapter layers and per-timestep activations, with gradients.

The official quantizer counts its calls from the last step down and wraps around; here the step is the timestep input.
"""

from __future__ import annotations

import pytest
import torch
from golden import Case, assert_close, cases
from torch import Tensor, nn

from quantlab.contracts.quant import PerChannel, PerTensor, QuantSpec
from quantlab.contracts.tuning import AdapterSpec, ConvAdapter
from quantlab.quant.layers import QuantizedConv2d, QuantizedLinear, to_quantized
from quantlab.quant.quantizers import AffineConfig, AffineQuantizer

OFFSETS = {"small": -1, "mid": 0, "large": 1}


def table(scale: Tensor, zero_point: Tensor, bits: int) -> AffineQuantizer:
    """A per-timestep quantizer whose timesteps are 0, 1, ..."""
    quantizer = AffineQuantizer(QuantSpec(PerTensor(), per_timestep=True, round_zero_point=False), bits, AffineConfig())
    timesteps = torch.arange(len(scale))
    state = {"scale": scale, "zero_point": zero_point, "timesteps": timesteps, "bits": torch.tensor(bits).char()}
    quantizer.load_state_dict(state)
    return quantizer


def static(scale: Tensor, zero_point: Tensor, bits: int) -> AffineQuantizer:
    quantizer = AffineQuantizer(QuantSpec(PerTensor(), round_zero_point=False), bits, AffineConfig())
    quantizer.load_state_dict({"scale": scale, "zero_point": zero_point, "bits": torch.tensor(bits).char()})
    return quantizer


@pytest.mark.parametrize("case", cases("E", "E_temporal"), ids=lambda case: case.id)
def test_per_timestep_quantizer(case: Case) -> None:
    bits, x = case.params["n_bits"], case["x"]
    first = static(case["delta"], case["zero_point"], bits)
    assert_close(first(x[0]), case["y_first_call"], rtol=2e-6, what="first call")
    quantizer = table(case["delta_list"], case["zp_list"], bits)
    steps = case["step_order"]
    for step, batch, expected in zip(steps, x[1:], case["ys"], strict=True):
        assert_close(quantizer(batch, step.expand(len(batch))), expected, rtol=2e-6, what=f"step {step}")
    # Samples of different steps in one batch look up their own scale.
    mixed = torch.stack([batch[0] for batch in x[1:]])
    assert_close(quantizer(mixed, steps), torch.stack([y[0] for y in case["ys"]]), rtol=2e-6, what="mixed batch")


def layer_of(case: Case) -> QuantizedConv2d | QuantizedLinear:
    weight, params = case["weight"], case.params
    if params["op"] == "conv":
        geometry = {key: params[key] for key in ("stride", "padding", "dilation") if key in params}
        plain: nn.Conv2d | nn.Linear = nn.Conv2d(*weight.shape[1::-1], weight.shape[2], bias="bias" in case, **geometry)
    else:
        plain = nn.Linear(*weight.shape[::-1], bias="bias" in case)
    plain.load_state_dict({"weight": weight} | ({"bias": case["bias"]} if "bias" in case else {}))
    layer = to_quantized(plain.requires_grad_(False))
    layer.smoothing = case["weight_scale"].flatten()
    layer.add_adapter(AdapterSpec(32, ConvAdapter.PER_TAP), torch.Generator())
    assert layer.adapter is not None
    layer.adapter.A.data, layer.adapter.B.data = case["loraA"], case["loraB"]

    scale, zero_point = torch.ones(len(weight)), torch.zeros(len(weight))
    bits = torch.full((len(weight),), params["n_bits"], dtype=torch.int8)
    for name, offset in OFFSETS.items():
        mask = case[f"mask_{name}"]
        bits[mask] += offset
        scale[mask] = case[f"delta_{name}"].flatten()[mask]
        zero_point[mask] = case[f"zero_point_{name}"].flatten()[mask]
    weights = AffineQuantizer(QuantSpec(PerChannel(0), round_zero_point=False), bits, AffineConfig())
    weights.load_state_dict({"scale": scale, "zero_point": zero_point, "bits": bits})
    layer.weight_quantizer = weights
    return layer


@pytest.mark.parametrize("case", cases("E", "E_lora"), ids=lambda case: case.id)
def test_adapter_layer(case: Case) -> None:
    layer, bits = layer_of(case), case.params["act_bits"]
    assert layer.adapter is not None and layer.weight_quantizer is not None
    assert_close(layer.adapter.delta(), case["lora_delta_weight"], rtol=1e-5, what="adapter")
    assert_close(layer.quantized_weight(), case["quant_weight"], rtol=2e-6, what="quantized weight")
    layer.input_quantizer = static(case["act_delta"], case["act_zero_point"], bits)
    assert_close(layer(case["x_init"]), case["y_init"], rtol=1e-5, what="first call")

    layer.input_quantizer = table(case["delta_list"], case["zp_list"], bits)
    trained = [*layer.adapter.parameters(), *layer.weight_quantizer.parameters(), *layer.input_quantizer.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    for call, (step, x) in enumerate(zip(case["step_order"], case["xs"], strict=True)):
        y = layer(x, step.expand(len(x)))
        assert_close(y, case["ys"][call], rtol=1e-5, what=f"call {call}")
        if call == case.params["grad_at_call"]:
            y.backward(case["upstream"])
            break
    check_gradients(case, layer)
    with torch.no_grad():
        for call, (step, x) in enumerate(zip(case["step_order"], case["xs"], strict=True)):
            assert_close(layer(x, step.expand(len(x))), case["ys"][call], rtol=1e-5, what=f"call {call}")


def check_gradients(case: Case, layer: QuantizedConv2d | QuantizedLinear) -> None:
    assert layer.adapter is not None and layer.weight_quantizer is not None and layer.input_quantizer is not None

    def close(actual: Tensor | None, expected: Tensor, what: str) -> None:
        assert actual is not None
        assert_close(actual, expected, rtol=1e-4, atol=1e-6, what=what)

    close(layer.adapter.A.grad, case["grad_loraA"], "A")
    close(layer.adapter.B.grad, case["grad_loraB"], "B")
    inputs, weights = layer.input_quantizer, layer.weight_quantizer
    close(inputs.scale.grad, case["grad_delta_list"], "activation scales")
    close(inputs.zero_point.grad, case["grad_zp_list"], "activation zero points")
    for name in OFFSETS:
        mask = case[f"mask_{name}"]
        if mask.any():
            close(weights.scale.grad[mask], case[f"grad_delta_{name}"].flatten()[mask], f"{name} scales")
            close(weights.zero_point.grad[mask], case[f"grad_zero_point_{name}"].flatten()[mask], f"{name} zero points")
