"""Integer layers on a GPU beside bfloat16, torchao and the roofline; without a GPU every row says "not measured".

Weights of 3, 4 and 5 bits mixed in every layer, 8-bit activations. Layers take and give float32, activation
quantization included; "triton, product" is the kernel alone, int8 in and bfloat16 out. A ratio above 1 is faster than
compiled bfloat16. Run: ``python -m benchmarks --only gpu``.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_peers import torchao_linear
from benchmarks.integer_layers import quantize_layer
from benchmarks.roofline import Roofline, measured_roofline
from quantlab.packing.backends.activation import ActivationKernel
from quantlab.packing.backends.dispatch import Backend, lower
from quantlab.packing.backends.integers import integers_of
from quantlab.packing.backends.layers import IntegerLayer
from quantlab.packing.backends.reference import simulate
from quantlab.packing.backends.rows import RowsProduct
from quantlab.packing.backends.triton_activation import triton_activation_kernel
from quantlab.packing.backends.triton_product import TritonProduct

NOT_MEASURED = "not measured: no CUDA device"
BASELINE = "bfloat16, compiled"
MEAN_BITS = 4
"""Of the weights of ``quantize_layer``."""
CHECKED_SAMPLES = 16
"""Samples whose output is compared with the float64 simulation; their kernels ran on all of them."""


@dataclass(frozen=True)
class Shape:
    """A layer and its input.

    Attributes:
        batch: rows of a linear layer, images of a convolution.
        inputs: channels.
        outputs: channels.
        size: height and width of a 3 x 3 convolution's input; 0 for a linear layer.
    """

    batch: int
    inputs: int
    outputs: int
    size: int = 0

    def __str__(self) -> str:
        if self.size:
            return f"conv {self.inputs} to {self.outputs} at {self.size}, batch {self.batch}"
        return f"linear {self.batch} x {self.inputs} x {self.outputs}"

    def layer(self) -> nn.Linear | nn.Conv2d:
        """The layer in float32."""
        if self.size:
            return nn.Conv2d(self.inputs, self.outputs, 3, padding=1)
        return nn.Linear(self.inputs, self.outputs)

    def input(self, rng: torch.Generator) -> Tensor:
        """A normal input."""
        return torch.randn(self.batch, self.inputs, *(self.size, self.size)[: 2 * bool(self.size)], generator=rng)


LEVELS = ((224, 64), (448, 32), (672, 16), (896, 8))
"""Channels and size at each level of the LDM-4 UNet of LSUN, whose latents are 64 x 64."""
SHAPES = (
    *(Shape(rows, width, width) for width in (1280, 3072) for rows in (1, 16, 64, 256, 4096)),
    # Levels of the LDM-4 UNet of LSUN, 64 x 64 latents.
    *(
        Shape(batch, width, width, size)
        for batch in (1, 16)
        for width, size in ((224, 64), (448, 32), (672, 16), (896, 8))
    ),
)
Timer = Callable[[Mapping[str, Callable[[], object]], int], dict[str, float]]


def cuda_medians(arms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of every arm on the GPU, one call of each in turn, with a cold cache.

    The memory that is cleared before each call empties the cache; while it is, the call's kernels are queued, so that
    the time is theirs and not that of launching them.
    """
    flush = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for run in arms.values():
        for _ in range(3):
            run()
    for _ in range(rounds):
        for name, run in arms.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1000)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def measure(shape: Shape, rounds: int, device: torch.device, timer: Timer, roofline: Roofline) -> dict[str, Any]:
    """Ratios of one shape to compiled bfloat16, and the largest errors to the float64 simulation."""
    rng = torch.Generator().manual_seed(0)
    x, layer = shape.input(rng), shape.layer()
    half_layer = copy.deepcopy(layer)
    made = quantize_layer(layer, x, rng)
    expected = simulate(integers_of(made), x[:CHECKED_SAMPLES])
    x, network = x.to(device), nn.ModuleDict({"layer": made.to(device)})
    memory = torch.channels_last if shape.size else torch.contiguous_format
    half = x.bfloat16().contiguous(memory_format=memory)
    half_layer = half_layer.to(device, torch.bfloat16).to(memory_format=memory)
    on_gpu = device.type == "cuda"
    compiled = torch.compile(half_layer) if on_gpu else half_layer
    arms: dict[str, Any] = {"bfloat16": lambda: half_layer(half), BASELINE: lambda: compiled(half)}
    errors: dict[str, float] = {}
    activation = triton_activation_kernel("cuda") if on_gpu else ActivationKernel({})
    for backend in (Backend.CUDA_INT8, Backend.TRITON):
        lowered = lower(network, backend, activation)
        integer = lowered.network.get_submodule("layer")
        if not isinstance(integer, IntegerLayer):
            arms[backend] = lowered.dispatch[0].why
            continue
        found = integer(x)[:CHECKED_SAMPLES].cpu()
        errors[backend] = ((found - expected).abs().max() / expected.abs().max()).item()
        arms[backend] = partial(integer, x)
        if backend is Backend.TRITON:
            arms["triton, product"] = _product_alone(integer, shape)
    arms |= {} if shape.size else torchao_linear(half_layer, half)
    timed = {name: run for name, run in arms.items() if not isinstance(run, str)}
    seconds = timer(timed, rounds)
    weights, positions = made.weight.numel(), x.numel() // shape.inputs
    moved = weights * MEAN_BITS / 8 + x.numel() + 2 * positions * shape.outputs
    seconds["roofline"] = roofline.seconds(2 * weights * positions, moved)
    ratios: dict[str, float | str] = {name: seconds[BASELINE] / value for name, value in seconds.items()}
    return {"ratios": ratios | {name: run for name, run in arms.items() if isinstance(run, str)}, "errors": errors}


def _product_alone(layer: IntegerLayer, shape: Shape) -> Callable[[], Tensor]:
    (product,) = layer.products
    assert isinstance(product, RowsProduct) and isinstance(product.matrix, TritonProduct)
    matrix = replace(product.matrix, output=torch.bfloat16)
    rows = (shape.batch * max(shape.size, 1) ** 2, matrix.tiles.columns)
    values = torch.randint(-128, 128, rows, dtype=torch.int8, device=layer.weight.device)
    return lambda: matrix(values, 0.01, 0)


def main(rounds: int = 30) -> dict[str, Any]:
    """Print a row for each shape and return them, with the device; "not measured" without one."""
    if not torch.cuda.is_available():
        print("\n".join(f"{shape!s:36} {NOT_MEASURED}" for shape in SHAPES))
        return {"device": None, "shapes": {str(shape): NOT_MEASURED for shape in SHAPES}}
    device, roofline = torch.device("cuda"), measured_roofline()
    print(f"{torch.cuda.get_device_name()}: {roofline}; times {BASELINE}")
    shapes = {}
    for shape in SHAPES:
        shapes[str(shape)] = found = measure(shape, rounds, device, cuda_medians, roofline)
        print(f"{shape!s:36} " + "; ".join(f"{name} {_cell(value)}" for name, value in found["ratios"].items()))
    return {"device": torch.cuda.get_device_name(), "roofline": asdict(roofline), "shapes": shapes}


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"
