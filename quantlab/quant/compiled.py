"""Compiled functions, for where a recipe asks for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import TypeVar, cast

import torch
from torch import Tensor

R = TypeVar("R")

VARIANTS = 32
"""Of one compiled function at most: sizes of 1, and sizes that happen to be equal, are compiled for themselves."""


@cache
def compiled_for(function: Callable[..., R], dtype: torch.dtype, dims: int) -> Callable[..., R]:
    """``function`` of tensors, compiled for this type and so many dimensions, sizes left open; without gradient.

    Each pair has a compiled function of its own. The compiler counts recompilations by code object, and one that
    layers of all kinds share reaches its limit, after which torch runs it uncompiled without a word; here the code is
    a copy, and ``fullgraph`` turns reaching the limit into an error.
    """
    template = cast(FunctionType, function)
    code = template.__code__.replace(co_name=f"{template.__name__}_{dims}d_{str(dtype).removeprefix('torch.')}")
    own = FunctionType(code, template.__globals__, code.co_name, template.__defaults__, template.__closure__)
    compiled = torch.compile(own, dynamic=True, fullgraph=True, recompile_limit=VARIANTS)  # pyright: ignore[reportCallIssue]

    def call(*tensors: Tensor) -> R:
        # Whether a tensor is a view, of what shape, and has a gradient: each would be a reason to compile again.
        return cast(R, compiled(*(tensor.data for tensor in tensors)))

    return call
