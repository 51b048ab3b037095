"""torchao's linear layers on a GPU, compiled: int8 weights and activations, and int4 weights. Optional."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.integer_peers import NOT_INSTALLED


def torchao_linear(layer: nn.Module, x: Tensor) -> dict[str, Callable[[], object] | str]:
    """An arm for each scheme on a bfloat16 layer and input, or why there is none."""
    try:
        from torchao import quantization
    except ImportError:
        return dict.fromkeys(("torchao int8", "torchao int4"), NOT_INSTALLED)
    configs: dict[str, Callable[[], Any]] = {
        "torchao int8": quantization.Int8DynamicActivationInt8WeightConfig,
        "torchao int4": quantization.Int4WeightOnlyConfig,
    }
    return {name: _arm(config, layer, x) for name, config in configs.items()}


def _arm(config: Callable[[], Any], layer: nn.Module, x: Tensor) -> Callable[[], object] | str:
    from torchao.quantization import quantize_

    try:
        model = nn.Sequential(copy.deepcopy(layer))
        quantize_(model, config())
        compiled = torch.compile(model)
        compiled(x)
    except Exception as error:  # a peer that fails on this machine is a row, not the end of the run
        return f"failed: {type(error).__name__}"
    return partial(compiled, x)
