"""Compiled functions, for where a recipe asks for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


@cache
def compiled_for(function: Callable[P, R], dtype: torch.dtype, dims: int) -> Callable[P, R]:
    """``function`` compiled for tensors of this type and so many dimensions, sizes left open.

    Each pair has a compiled function of its own. The compiler counts recompilations by code object, and one that
    layers of all kinds share reaches its limit, after which torch runs it uncompiled without a word; here the code is
    a copy, and ``fullgraph`` turns reaching the limit into an error.
    """
    template = cast(FunctionType, function)
    code = template.__code__.replace(co_name=f"{template.__name__}_{dims}d_{str(dtype).removeprefix('torch.')}")
    own = FunctionType(code, template.__globals__, code.co_name, template.__defaults__, template.__closure__)
    return cast(Callable[P, R], torch.compile(own, dynamic=True, fullgraph=True))
