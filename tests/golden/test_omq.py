"""Groups B and C: kurtosis, and the mixed-bit search of one layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden import Case, assert_close, cases
from quantlab_mpqdm.kurtosis import kurtosis
from quantlab_mpqdm.omq import KurtosisConfig, KurtosisPolicy
from torch import nn

from quantlab.calibration.stats import SiteRecord, TensorSiteData
from quantlab.contracts.allocation import AllocationProblem, BitMap
from quantlab.contracts.quant import Observer, PerChannel, PerTensor, QuantSpec
from quantlab.contracts.sections import Budget
from quantlab.contracts.site import Site, SiteKind, Slot
from quantlab.quant.functional import smoothing_scale
from quantlab.quant.layers import QuantizedConv2d, QuantizedLinear, to_quantized
from quantlab.quant.quantizers import AffineConfig, AffineQuantizer

RELEASED = KurtosisConfig(groups=1, search_observer=Observer.MIN_MAX, quantize_inputs=False, small_layers=False)
GROUPS = {"small": -1, "mid": 0, "large": 1}


@pytest.mark.parametrize("case", cases("B"), ids=lambda case: case.id)
def test_kurtosis(case: Case) -> None:
    assert_close(kurtosis(case["x"]), case["kurtosis"], rtol=case.entry["rtol"])


def layer_of(case: Case) -> QuantizedConv2d | QuantizedLinear:
    weight, params = case["weight"], case.params
    if params["op"] == "conv":
        geometry = {key: params[key] for key in ("stride", "padding", "dilation") if key in params}
        layer: nn.Conv2d | nn.Linear = nn.Conv2d(*weight.shape[1::-1], weight.shape[2], bias="bias" in case, **geometry)
    else:
        layer = nn.Linear(*weight.shape[::-1], bias="bias" in case)
    state = {"weight": weight} | ({"bias": case["bias"]} if "bias" in case else {})
    layer.load_state_dict(state)
    return to_quantized(layer.requires_grad_(False))


@pytest.mark.parametrize("case", cases("C"), ids=lambda case: case.id)
def test_mixed_bits_of_a_layer(case: Case) -> None:
    layer, x, bits = layer_of(case), case["x"], case.params["n_bits"]
    record = SiteRecord.of_layer(layer, (x,))
    scales = smoothing_scale(record.weight_absmax(), record.input_absmax(), alpha=0.5)
    assert_close(scales, case["weight_scale"], rtol=1e-6, what="smoothing")
    assert_close(1 / scales, case["activation_scale"], rtol=1e-6, what="its reciprocal")
    record = replace(record, smoothing=scales)
    data = TensorSiteData({"layer": record})
    assert_close(kurtosis(data.weight("layer").flatten(1)), case["kurtosis"], rtol=5e-5, what="kurtosis")

    policy = KurtosisPolicy(RELEASED)
    site = Site("layer", SiteKind.CONV, tuple(layer.weight.shape), 1, (Slot("input", tuple(x.shape)),))
    given = torch.full((site.out_channels,), bits, dtype=torch.int8)
    problem = AllocationProblem(
        [site],
        data,
        Budget(weight_bits=bits, activation_bits=case.params["act_bits"]),
        BitMap({"layer": given}, {("layer", "input"): case.params["act_bits"]}),
        torch.Generator(),
    )
    found = policy.allocate(problem).weight_bits["layer"]
    for name, offset in GROUPS.items():
        assert torch.equal(found == bits + offset, case[f"mask_{name}"]), name
    assert int((found > bits).sum()) == case["best_split"].item()

    ranked = policy.ranked(data.weight("layer"), problem.rng)
    errors = []
    for count in case.entry["search_set"]:
        candidate = given.clone()
        candidate[ranked[:count]] += 1
        candidate[ranked[len(ranked) - count :]] -= 1
        errors.append(data.output_error("layer", candidate, Observer.MIN_MAX, None))
    assert_close(torch.tensor(errors), case["search_err"], rtol=1e-4, what="search errors")

    check_final_quantizers(case, layer, scales, found)


def check_final_quantizers(
    case: Case, layer: QuantizedConv2d | QuantizedLinear, scales: torch.Tensor, found: torch.Tensor
) -> None:
    x = case["x"]
    assert_close(layer(x), case["y_no_quant"], rtol=1e-5, what="float output")
    layer.smoothing = scales
    weights = AffineQuantizer(QuantSpec(PerChannel(0), round_zero_point=False), found, AffineConfig())
    weights.observe(layer.float_weight())
    weights.freeze()
    layer.weight_quantizer = weights
    for name in GROUPS:
        mask = case[f"mask_{name}"]
        if mask.any():
            assert_close(weights.scale[mask], case[f"delta_{name}"].flatten()[mask], rtol=1e-6, what=name)
            assert_close(weights.zero_point[mask], case[f"zero_point_{name}"].flatten()[mask], rtol=1e-6, what=name)
    assert_close(layer.quantized_weight(), case["quant_weight"], rtol=2e-6, what="quantized weight")
    assert_close(layer(x), case["y_weight_only_scaled_input"], rtol=1e-5, what="weights quantized")

    inputs = AffineQuantizer(QuantSpec(PerTensor(), round_zero_point=False), case.params["act_bits"], AffineConfig())
    shape = (1, -1, 1, 1) if case.params["op"] == "conv" else (-1,)
    smoothed = x * (1 / scales).view(shape)
    inputs.observe(smoothed)
    inputs.freeze()
    layer.input_quantizer = inputs
    assert_close(inputs.scale, case["act_delta"], rtol=1e-6, what="activation scale")
    assert_close(inputs.zero_point, case["act_zero_point"], rtol=1e-6, what="activation zero point")
    assert_close(inputs(smoothed), case["act_quant"], rtol=2e-6, what="quantized input")
    assert_close(layer(x), case["y_weight_act"], rtol=1e-5, what="both quantized")
