"""One training step of a layer with a low-rank adapter, mixed weights and 8-bit activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import Arm, Case, Missing
from benchmarks.peers import torchao_linear
from benchmarks.reference import masked_sum
from benchmarks.saved import saved_mib
from quantlab.contracts.quant import PerChannel, PerTensor, QuantSpec
from quantlab.contracts.tuning import AdapterSpec
from quantlab.quant.layers import QuantizedConv2d, QuantizedLinear, to_quantized
from quantlab.quant.quantizers import AffineConfig, AffineQuantizer

RANK = 32


def cases(quick: bool) -> Iterator[Case]:
    """A linear layer of 1280 at 256 rows, and a convolution of 512 channels at 16x16, batch 4."""
    rng = torch.Generator().manual_seed(2)
    yield _case(nn.Linear(1280, 1280), torch.randn(256, 1280, generator=rng), "linear 1280, 256 rows", "at most 1.2")
    if not quick:
        conv, x = nn.Conv2d(512, 512, 3, padding=1), torch.randn(4, 512, 16, 16, generator=rng)
        yield _case(conv, x, "convolution 512, 16x16, batch 4", "at most 1.3")


def quantized(layer: nn.Linear | nn.Conv2d, x: Tensor, *, compiled: bool) -> QuantizedLinear | QuantizedConv2d:
    """A copy of the layer with 3/4/5-bit channels, 8-bit inputs and an adapter, everything trained but the weight."""
    weight = layer.weight.detach().clone()
    if isinstance(layer, nn.Linear):
        copy: nn.Linear | nn.Conv2d = nn.Linear(*weight.shape[::-1])
    else:
        copy = nn.Conv2d(*weight.shape[1::-1], weight.shape[2], padding=layer.padding)
    copy.load_state_dict(layer.state_dict())
    student = to_quantized(copy.requires_grad_(False))
    config = AffineConfig(compiled=compiled)
    bits = (torch.arange(len(weight)) % 3 + 3).to(torch.int8)
    student.weight_quantizer = AffineQuantizer.from_spec(QuantSpec(PerChannel()), bits, config)
    student.input_quantizer = AffineQuantizer.from_spec(QuantSpec(PerTensor()), 8, config)
    for quantizer, value in ((student.weight_quantizer, weight), (student.input_quantizer, x)):
        quantizer.observe(value)
        quantizer.freeze()
    student.add_adapter(AdapterSpec(RANK), torch.Generator().manual_seed(3))
    for part in (student.adapter, student.weight_quantizer, student.input_quantizer):
        assert part is not None
        part.requires_grad_(True)
    return student


def masked(student: QuantizedLinear | QuantizedConv2d, x: Tensor) -> Tensor:
    """The same layer the plain way: the adapter through an identity matrix, one masked pass for each width."""
    adapter, weights, inputs = student.adapter, student.weight_quantizer, student.input_quantizer
    assert adapter is not None and isinstance(weights, AffineQuantizer) and isinstance(inputs, AffineQuantizer)
    if isinstance(student, nn.Linear):
        change = F.linear(F.linear(torch.eye(student.weight.shape[1]), adapter.A), adapter.B).T
    else:
        change = adapter.delta()
    shape = (-1, *(1,) * (student.weight.dim() - 1))
    scale, zero_point, bits = (value.view(shape) for value in (weights.scale, weights.zero_point, weights.bits))
    weight = masked_sum(student.weight + change, scale, zero_point, bits)
    x = masked_sum(x, inputs.scale, inputs.zero_point, inputs.bits.view(*(1,) * x.dim()))
    return student.apply_weight(x, weight, student.bias)


def _case(layer: nn.Linear | nn.Conv2d, x: Tensor, work: str, goal: str) -> Case:
    leaf = x.clone().requires_grad_()
    eager, compiled = quantized(layer, x, compiled=False), quantized(layer, x, compiled=True)
    plainly = quantized(layer, x, compiled=False)
    networks: dict[str, Callable[[], Tensor]] = {
        "plain float layer": lambda: layer(leaf),
        "three masked passes": lambda: masked(plainly, leaf),
        "quantlab": lambda: eager(leaf),
        "quantlab, compiled": lambda: compiled(leaf),
    }
    name = "torchao, compiled, one width, no adapter"
    missing: dict[str, Arm] = {}
    if isinstance(layer, nn.Linear):
        try:
            peer = torchao_linear(layer)
            peer(leaf).sum().backward()
            networks[name] = lambda: peer(leaf)
        except ImportError as error:
            missing[name] = Missing(f"not installed ({error.name})")
        except Exception as error:  # a peer that fails on this machine is a row, not the end of the run
            missing[name] = Missing(f"failed: {type(error).__name__}")
    upstream = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(4))
    arms: dict[str, Arm] = {
        name: lambda forward=forward: forward().backward(upstream) for name, forward in networks.items()
    }
    facts = {name: f"saves {saved_mib(forward):.1f} MiB" for name, forward in networks.items()}
    goals = {"quantlab, compiled": goal}
    return Case(
        "Training step of a layer", work, "plain float layer", arms | missing, facts, goals, slower_than_baseline=True
    )
