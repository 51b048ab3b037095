"""Finding where numbers stop being finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from quantlab.errors import NonFiniteError


def require_finite(layers: Mapping[str, nn.Module], forward: Callable[[], object], where: str) -> None:
    """Run ``forward`` once more and name the first site whose parameters, input or output is not finite.

    Raises:
        NonFiniteError: always; without a bad site it says that the loss itself overflowed.
    """
    found: list[str] = []

    def check(name: str, part: str, values: object) -> None:
        tensors = values if isinstance(values, tuple | list) else (values,)
        for value in tensors:
            if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
                found.append(f"{part} of {name}")

    def watch(name: str, layer: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        def before(module: nn.Module, arguments: tuple[object, ...]) -> None:
            for parameter_name, parameter in module.named_parameters():
                check(name, parameter_name, parameter)
            check(name, "the input", arguments)

        def after(module: nn.Module, arguments: tuple[object, ...], output: object) -> None:
            check(name, "the output", output)

        return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]

    handles = [handle for name, layer in layers.items() for handle in watch(name, layer)]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    raise NonFiniteError(
        "the loss is not finite" + (f"; first in {found[0]}" if found else ", though every site is: it overflowed"),
        where=where,
        next_step="lower tune.adapter_learning_rate or tune.activation_learning_rate, or raise the bits of that site",
    )
