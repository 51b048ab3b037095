"""Speed of integer layers over float32, activation quantization included, beside OpenVINO and ONNX Runtime.

Weights of 3, 4 and 5 bits mixed in every layer, 8-bit activations. One thread, arms interleaved, medians. A ratio
above 1 is faster than torch's float32 layer. Run: ``OMP_NUM_THREADS=1 python -m benchmarks --only integer-layers``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.integer_peers import NOT_INSTALLED, onnxruntime_layer, openvino_layer
from quantlab.contracts.quant import Observer, PerChannel, PerTensor, QuantSpec
from quantlab.packing.backends.activation import activation_kernel
from quantlab.packing.backends.dispatch import Backend, lower
from quantlab.packing.backends.integers import integers_of
from quantlab.packing.backends.reference import simulate
from quantlab.quant.layers import QuantizedConv2d, QuantizedLinear, to_quantized
from quantlab.quant.quantizers import AffineConfig, AffineQuantizer

# name: rows, in, out of a linear layer; batch, in, out, size of a 3 x 3 convolution. The first is below 256 rows.
LINEAR = {
    "linear 16 x 1280 x 1280": (16, 1280, 1280),
    "linear 256 x 1280 x 1280": (256, 1280, 1280),
    "linear 1024 x 640 x 2560": (1024, 640, 2560),
    "linear 4096 x 320 x 1280": (4096, 320, 1280),
}
CONV = {
    "conv 512 at 16, batch 1": (1, 512, 512, 16),
    "conv 320 at 64, batch 1": (1, 320, 320, 64),
    "conv 128 at 32, batch 8": (8, 128, 128, 32),
}
FEW_ROWS = "linear 16 x 1280 x 1280"


def quantize_layer(layer: nn.Linear | nn.Conv2d, x: Tensor, rng: torch.Generator) -> QuantizedLinear | QuantizedConv2d:
    """The layer with random 3/4/5-bit channels and 8-bit inputs, ranges from the extremes."""
    made = to_quantized(layer).requires_grad_(False).eval()
    bits = torch.tensor([3, *[4] * 8, 5])[torch.randint(0, 10, (layer.weight.shape[0],), generator=rng)]
    weight_spec = QuantSpec(PerChannel(0), Observer.MIN_MAX)
    made.weight_quantizer = AffineQuantizer(weight_spec, bits, AffineConfig())
    made.weight_quantizer.observe(made.weight)
    made.weight_quantizer.freeze()
    made.input_quantizer = AffineQuantizer(QuantSpec(PerTensor(), Observer.MIN_MAX), 8, AffineConfig())
    made.input_quantizer.observe(x)
    made.input_quantizer.freeze()
    made.freeze()
    return made


def interleaved_medians(arms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of processor time of every arm, one call of each in turn.

    Not of the clock on the wall: on a busy machine an arm that ends within its share of the processor would be
    several times faster than one that has to wait for its next.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(2):
        for run in arms.values():
            run()
    for _ in range(rounds):
        for name, run in arms.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def measure(name: str, rounds: int) -> dict[str, float | str]:
    """Ratios of one shape to float32, and the largest error to the float64 simulation."""
    rng = torch.Generator().manual_seed(0)
    if name in LINEAR:
        rows, inputs, outputs = LINEAR[name]
        x, layer = torch.randn(rows, inputs, generator=rng), nn.Linear(inputs, outputs)
    else:
        batch, inputs, outputs, size = CONV[name]
        x = torch.randn(batch, inputs, size, size, generator=rng)
        layer = nn.Conv2d(inputs, outputs, 3, padding=1)
    made = quantize_layer(layer, x, rng)
    site = integers_of(made)
    integer = lower(nn.ModuleDict({"layer": made}), Backend.ONEDNN, activation_kernel()).network["layer"]
    dense, bias = made.quantized_weight(), made.bias
    near = x if name in LINEAR else x.contiguous(memory_format=torch.channels_last)
    half, half_weight = near.bfloat16(), dense.bfloat16()
    half_weight = half_weight if name in LINEAR else half_weight.contiguous(memory_format=torch.channels_last)
    half_bias = None if bias is None else bias.bfloat16()

    def float_layer(values: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
        return F.linear(values, weight, offset) if name in LINEAR else F.conv2d(values, weight, offset, padding=1)

    arms: dict[str, Any] = {
        "float32": lambda: float_layer(x, dense, bias),
        "bfloat16": lambda: float_layer(half, half_weight, half_bias),
        "simulation": lambda: made(x),
        "integer": lambda: integer(near),
        "openvino": openvino_layer(site, x),
        "onnxruntime": onnxruntime_layer(site, x),
    }
    timed = {arm: run for arm, run in arms.items() if not isinstance(run, str)}
    seconds = interleaved_medians(timed, rounds)
    expected = simulate(site, x)
    ratios: dict[str, float | str] = {arm: seconds["float32"] / value for arm, value in seconds.items()}
    error = ((integer(near) - expected).abs().max() / expected.abs().max()).item()
    return ratios | {arm: NOT_INSTALLED for arm, run in arms.items() if isinstance(run, str)} | {"error": error}


def main(rounds: int = 15) -> dict[str, Any]:
    """Print a table of ratios to float32 and return it with the geometric means over at least 256 rows."""
    torch.set_num_threads(1)
    results = {name: measure(name, rounds) for name in (*LINEAR, *CONV)}
    many = [row for name, row in results.items() if name != FEW_ROWS]
    means = {
        column: statistics.geometric_mean(float(row[column]) for row in many)
        for column, value in results[FEW_ROWS].items()
        if column != "error" and not isinstance(value, str)
    }
    found = {"shapes": results, "geometric_mean": means}
    print(layers_markdown(found))
    return found


def layers_markdown(results: dict[str, Any]) -> str:
    """The table of one run: times float32, and the error of the integer layer to the float64 simulation."""
    columns = list(results["shapes"][FEW_ROWS])
    lines = [f"| times float32 | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for name, row in results["shapes"].items():
        cells = (f"{value:.1e}" if column == "error" else _cell(value) for column, value in row.items())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    means = " | ".join(_cell(results["geometric_mean"].get(column, "")) for column in columns)
    lines.append(f"| geometric mean from 256 rows on | {means} |")
    return "\n".join(lines)


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"


if __name__ == "__main__":
    print(json.dumps(main()["geometric_mean"]))
