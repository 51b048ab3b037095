"""Other packages' weight quantizers, one width a channel; each is an extra of the benchmarks alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measure import Arm, Missing

Forward = Callable[[], Tensor]
Build = Callable[[Tensor], tuple[Forward, tuple[Tensor, ...]]]
"""From a weight to the forward of its fake quantization and the tensors that it gives gradients for."""


def weight_quantizers(weight: Tensor, upstream: Tensor) -> dict[str, Arm]:
    """An arm for each peer: fake quantization of ``weight`` [out, in] at 4 bits (quanto: 8), forward and backward."""
    peers: dict[str, Build] = {
        "torchao": _torchao,
        "torchao, compiled": _torchao_compiled,
        "torch learnable": _torch_learnable,
        "modelopt": _modelopt,
        "brevitas": _brevitas,
        "quanto qint8": _quanto,
    }
    return {name: _arm(build, weight, upstream) for name, build in peers.items()}


def _arm(build: Build, weight: Tensor, upstream: Tensor) -> Arm:
    try:
        forward, leaves = build(weight.detach().clone().requires_grad_())
        torch.autograd.grad(forward(), leaves, upstream)
    except ImportError as error:
        return Missing(f"not installed ({error.name})")
    except Exception as error:  # a peer that fails on this machine is a row, not the end of the run
        return Missing(f"failed: {type(error).__name__}")
    return lambda: torch.autograd.grad(forward(), leaves, upstream)


def _torchao(weight: Tensor) -> tuple[Forward, tuple[Tensor, ...]]:
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    quantizer = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, "per_channel"))
    return lambda: quantizer(weight), (weight,)


def _torchao_compiled(weight: Tensor) -> tuple[Forward, tuple[Tensor, ...]]:
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    quantizer = torch.compile(IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, "per_channel")))
    return lambda: quantizer(weight), (weight,)


def _torch_learnable(weight: Tensor) -> tuple[Forward, tuple[Tensor, ...]]:
    scale = (weight.detach().abs().amax(1) / 7).requires_grad_()
    zero_point = torch.full_like(scale, 8.0).requires_grad_()

    def forward() -> Tensor:
        return torch._fake_quantize_learnable_per_channel_affine(weight, scale, zero_point, 0, 0, 15, 1.0)

    return forward, (weight, scale, zero_point)


def _modelopt(weight: Tensor) -> tuple[Forward, tuple[Tensor, ...]]:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=4, axis=0))
    return lambda: quantizer(weight), (weight,)


def _brevitas(weight: Tensor) -> tuple[Forward, tuple[Tensor, ...]]:
    from brevitas.nn import QuantLinear

    layer = QuantLinear(weight.shape[1], weight.shape[0], bias=False, weight_bit_width=4)
    layer.weight = nn.Parameter(weight.detach())
    return lambda: layer.quant_weight().value, (layer.weight,)


def _quanto(weight: Tensor) -> tuple[Forward, tuple[Tensor, ...]]:
    from optimum.quanto import QLinear, qint8

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach())
    quantized = QLinear.from_module(layer, weights=qint8)  # 4 bits would compile an extension first
    return lambda: quantized.qweight.dequantize(), (quantized.weight,)


def torchao_linear(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """A compiled linear layer of torchao with 4-bit weights and 8-bit activations, without an adapter."""
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

    quantized = FakeQuantizedLinear.from_linear(
        layer,
        IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        IntxFakeQuantizeConfig(torch.int4, "per_channel"),
    )
    return torch.compile(quantized)
