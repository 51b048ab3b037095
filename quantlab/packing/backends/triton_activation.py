"""Activations to codes in one pass on a GPU, through Triton."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quantlab.packing.backends.activation import ActivationKernel, to_codes
from quantlab.packing.backends.triton_product import missing_triton

_BLOCK = 1024


@functools.cache
def triton_activation_kernel(device: str) -> ActivationKernel:
    """The kernel of a kind of device: Triton's where it gives the codes of plain torch on a probe."""
    missing = missing_triton()
    if missing:
        return ActivationKernel({}, f"{missing}: activations take five passes")
    rng = torch.Generator().manual_seed(0)
    scale = torch.tensor(0.037)
    parameters = scale, torch.tensor(121.0), torch.tensor(255.0)
    # Quarters of a step: many values lie on ties, and an odd zero point tells rounding before it from rounding after.
    x = (torch.randint(-1024, 2048, (4099,), generator=rng) / 4 * scale).to(device)
    try:
        same = torch.equal(triton_to_codes(x, *parameters), to_codes(x, *parameters))
    except Exception as error:  # whatever a missing or foreign compiler raises
        return ActivationKernel({}, f"Triton failed ({type(error).__name__}): activations take five passes")
    return (
        ActivationKernel({to_codes: triton_to_codes})
        if same
        else ActivationKernel({}, "Triton's quantizer gives other codes")
    )


def triton_to_codes(x: Tensor, scale: Tensor, zero_point: Tensor, quant_max: Tensor) -> Tensor:
    """As ``to_codes``; the scalars are on the CPU, so that reading them waits for no GPU."""
    from quantlab.packing.backends import triton_kernel

    codes = torch.empty_like(x, dtype=torch.uint8)
    kernel = triton_kernel.interpreted_to_codes if x.device.type == "cpu" else triton_kernel.to_codes
    parameters = scale.item(), zero_point.item(), quant_max.item()
    with torch.cuda.device_of(x):
        kernel[(-(-x.numel() // _BLOCK),)](x, codes, x.numel(), *parameters, BLOCK=_BLOCK)
    return codes
