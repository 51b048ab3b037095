"""Lets torchvision be imported beside a CPU-only build of torch.

A torchvision wheel compiled for CUDA cannot load its operators next to a CPU-only torch, and its import then fails
with "operator torchvision::nms does not exist", which takes timm, torchmetrics and diffusers down with it. Declaring
the two operator names is enough, since nothing here calls them.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_OPERATORS = ("nms", "qnms")


@cache
def ensure_torchvision_imports() -> torch.library.Library | None:
    """Declare torchvision's missing operators; does nothing when they are there or torchvision is not installed.

    Call it before the first import of diffusers, timm, torchmetrics or torchvision. The library is returned, and kept
    by the cache, because its definitions go when it is collected.
    """
    import torch

    if "torchvision" in sys.modules or find_spec("torchvision") is None:
        return None
    if torch.version.cuda is not None or torch.version.hip is not None:
        return None
    # "FRAGMENT" may be opened more than once in a process; "DEF" may not.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor input) -> Tensor")
    return library
