"""Which kernel each site gets, and why: integers where they are exact, the simulation where not."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import nn

from quantlab.graph.captured import CapturedGraph
from quantlab.packing.backends.activation import ActivationKernel
from quantlab.packing.backends.fuse import fuse
from quantlab.packing.backends.int_mm import IntMmProduct, missing_int_mm
from quantlab.packing.backends.integers import (
    IntegerSite,
    NotExecutable,
    integers_of,
)
from quantlab.packing.backends.layers import IntegerLayer, Product
from quantlab.packing.backends.onednn import OneDnnProduct, missing_operators
from quantlab.packing.backends.packed import MakeProduct, PackedProduct
from quantlab.packing.backends.reference import ReferenceProduct
from quantlab.packing.backends.rows import RowsProduct
from quantlab.packing.backends.triton_product import TritonProduct, missing_triton
from quantlab.packing.backends.verify import verify
from quantlab.quant.attention import QuantizedAttention
from quantlab.quant.layers import QuantizedLayer
from quantlab.quant.operands import QuantizedOperands


class Backend(StrEnum):
    """What computes the integer products."""

    ONEDNN = "onednn"
    """torch's oneDNN operators on a CPU."""
    CUDA_INT8 = "cuda-int8"
    """torch's product of int8 matrices, weights unpacked once: for a GPU; on a CPU slow, and a test."""
    TRITON = "triton"
    """A Triton kernel that unpacks weights in registers: for a GPU; on a CPU Triton's interpreter, and a test."""
    REFERENCE = "reference"
    """Plain torch integers: exact, slow, on every machine."""


class Kernel(StrEnum):
    """What a site is computed by."""

    ONEDNN = "onednn int8"
    CUDA_INT8 = "int8 matrices"
    TRITON = "triton tiles"
    REFERENCE = "reference int32"
    SIMULATED = "simulated"


@dataclass(frozen=True)
class _Maker:
    """How a backend makes products.

    Attributes:
        kernel: what they are called in the dispatch.
        devices: kinds of device that it computes on.
        missing: what it lacks here, "" when nothing.
        product: makes the product of a part, with a bias, the geometry of a convolution, on a device.
    """

    kernel: Kernel
    devices: tuple[str, ...]
    missing: Callable[[], str]
    product: Callable[..., Product]


_ANY_DEVICE = ("cpu", "cuda")
_MAKERS = {
    Backend.ONEDNN: _Maker(
        Kernel.ONEDNN,
        ("cpu",),
        missing_operators,
        lambda part, bias, geometry, device: OneDnnProduct.of(part, bias, geometry),
    ),
    Backend.CUDA_INT8: _Maker(
        Kernel.CUDA_INT8, _ANY_DEVICE, missing_int_mm, functools.partial(RowsProduct.of, matrix=IntMmProduct.of)
    ),
    Backend.TRITON: _Maker(
        Kernel.TRITON, _ANY_DEVICE, missing_triton, functools.partial(RowsProduct.of, matrix=TritonProduct.of)
    ),
    Backend.REFERENCE: _Maker(
        Kernel.REFERENCE,
        ("cpu",),
        lambda: "",
        lambda part, bias, geometry, device: ReferenceProduct(part, bias, geometry),
    ),
}


@dataclass(frozen=True)
class SiteDispatch:
    """The kernel of one site.

    Attributes:
        site: its path.
        kernel: what computes it.
        why: why it is simulated, or what its integers cost; "" when there is nothing to say.
        codes: how the codes of its input come about, where that is fused with what stands before it.
    """

    site: str
    kernel: Kernel
    why: str = ""
    codes: str = ""


@dataclass(frozen=True)
class Lowered:
    """A network whose layers compute in integers.

    Attributes:
        network: a copy; it shares nothing with the one it was made from.
        dispatch: the kernel of every site.
    """

    network: nn.Module
    dispatch: tuple[SiteDispatch, ...]


def lower_graph(
    network: nn.Module, graph: CapturedGraph, backend: Backend, activation: ActivationKernel, keep_packed: bool = False
) -> tuple[Lowered, CapturedGraph]:
    """A network that computes in integers, as ``lower`` makes it, and its graph with quantization fused."""
    lowered = lower(network, backend, activation, keep_packed)
    fused = fuse(lowered.network, graph)
    told = tuple(replace(entry, codes=fused.codes.get(entry.site, "")) for entry in lowered.dispatch)
    return replace(lowered, dispatch=told), fused.graph


def lower(network: nn.Module, backend: Backend, activation: ActivationKernel, keep_packed: bool = False) -> Lowered:
    """A copy of a network with quantized layers that computes in integers where they are exact.

    The copy is made around the new layers: their float weights are never copied.

    Args:
        network: with quantized layers.
        backend: what computes the products.
        activation: quantizes the inputs.
        keep_packed: hold weights in their own bits, and unpack those of a layer whenever it runs.
    """
    maker = _MAKERS[backend]
    missing = maker.missing()
    dispatch: list[SiteDispatch] = []
    made: dict[int, object] = {}
    for path, module in network.named_modules():
        if isinstance(module, QuantizedLayer):
            entry, layer = _lower_layer(path, module, maker, activation, keep_packed, missing)
            dispatch.append(entry)
            if layer is not None:
                made[id(module)] = layer
        elif isinstance(module, QuantizedOperands) and module.quantizers:
            what = (
                "the two products of attention have"
                if isinstance(module, QuantizedAttention)
                else "a product of activations has"
            )
            dispatch.append(SiteDispatch(path, Kernel.SIMULATED, f"{what} no integer kernel"))
    return Lowered(copy.deepcopy(network, made), tuple(dispatch))


def _lower_layer(
    path: str, layer: QuantizedLayer, maker: _Maker, activation: ActivationKernel, keep_packed: bool, missing: str
) -> tuple[SiteDispatch, IntegerLayer | None]:
    try:
        if missing:
            raise NotExecutable(missing)
        device = layer.weight.device
        if device.type not in maker.devices:
            raise NotExecutable(f"it is on {device}, and this backend computes on {' or '.join(maker.devices)}")
        # Integers are read and proved on the CPU; only products live on the device.
        site = integers_of(layer if device.type == "cpu" else copy.deepcopy(layer).cpu())
        products = _products(site, maker, device, keep_packed)
        built = IntegerLayer(site, products, activation, layer.smoothing, layer.branch, device)
        built.train(layer.training)
        verify(built, site, layer.input_channels, tuple(layer.weight.shape[2:]))
    except NotExecutable as reason:
        return SiteDispatch(path, Kernel.SIMULATED, str(reason)), None
    return SiteDispatch(path, maker.kernel, _cost(built)), built


def _products(site: IntegerSite, maker: _Maker, device: torch.device, keep_packed: bool) -> list[Product]:
    make: MakeProduct = functools.partial(maker.product, device=device)
    # Tiles are packed anyway.
    if keep_packed and maker.kernel is not Kernel.TRITON:
        if device.type != "cpu":
            raise NotExecutable(f"on {device} weights stay packed in the backend {Backend.TRITON} alone")
        make = functools.partial(PackedProduct.of, make)
    # The bias is added once.
    return [make(part, site.bias if position == 0 else None, site.geometry) for position, part in enumerate(site.parts)]


def _cost(layer: IntegerLayer) -> str:
    """What makes a layer more than one product."""
    notes = [f"{len(layer.products)} products, one for each part of its input"] if len(layer.products) > 1 else []
    pieces = max(len(product.packed) if isinstance(product, OneDnnProduct) else 1 for product in layer.products)
    notes += ["unpacked at every call"] if isinstance(layer.products[0], PackedProduct) else []
    notes += [f"weights beyond int8 take {pieces} products"] if pieces > 1 else []
    notes += ["a convolution through its patches"] if _is_through_patches(layer) else []
    notes += ["a low-rank product in float"] if layer.branch is not None else []
    return "; ".join(notes)


def _is_through_patches(layer: IntegerLayer) -> bool:
    return any(
        isinstance(product, RowsProduct) and any(size > 1 for size in product.kernel) for product in layer.products
    )


def dispatch_text(dispatch: Sequence[SiteDispatch]) -> str:
    """The table: how many sites each kernel computes, then each site that has something to say."""
    counts = Counter(entry.kernel for entry in dispatch)
    lines = ["integer execution: " + ", ".join(f"{number} sites {kernel}" for kernel, number in counts.items())]
    told = [entry for entry in dispatch if entry.why or entry.codes]
    width = max((len(entry.site) for entry in told), default=0)
    notes = ("; ".join(filter(None, (entry.why, entry.codes))) for entry in told)
    return "\n".join(
        [
            *lines,
            *(f"  {entry.site:{width}}  {entry.kernel:{15}}  {note}" for entry, note in zip(told, notes, strict=True)),
        ]
    )


def loaded_bytes(network: nn.Module) -> int:
    """Bytes of what a lowered network holds: float rest, int8 weights, scales."""
    held: dict[int, int] = {}
    for module in network.modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        held |= {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors if tensor.numel()}
        if isinstance(module, IntegerLayer):
            held[id(module)] = module.held_bytes()
    return sum(held.values())
