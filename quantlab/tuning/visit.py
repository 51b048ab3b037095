"""Going through a network's layers in the order in which they compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from quantlab.errors import NonFiniteError, QuantlabError

Visit = Callable[[str, Tensor, Tensor | None], None]
"""Called with a layer's name, its input and its timestep [B], or None where it has none."""


def visit_layers(layers: Mapping[str, nn.Module], forward: Callable[[], object], visit: Visit) -> None:
    """Call ``visit`` for every layer right before it first computes in one ``forward`` without gradient.

    A visitor may change its layer: the layers after it then see what the changed one gives, so that one forward goes
    through the network layer by layer. It calls ``layer.forward`` where it needs the layer's own output.

    Args:
        layers: by name.
        forward: of the network that holds them.
        visit: what is done at each layer.

    Raises:
        NonFiniteError: a layer's input holds NaN or infinity.
        QuantlabError: a layer was not reached.
    """
    seen: set[str] = set()

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if name in seen:
                return
            seen.add(name)
            if not torch.isfinite(arguments[0]).all():
                raise NonFiniteError("the input holds NaN or infinity", where=f"site {name}")
            visit(name, arguments[0], arguments[1] if len(arguments) > 1 else None)

        return before

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in layers if name not in seen]
    if missing:
        raise QuantlabError("a site was never reached", where=f"site {missing[0]}", next_step='keep it "float"')
