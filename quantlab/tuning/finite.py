"""Finding where numbers stop being finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from quantlab.errors import NonFiniteError

NEXT_STEP = "lower tune.adapter_learning_rate or tune.activation_learning_rate, or raise the bits of that site"


def require_finite_gradients(parameters: Mapping[str, nn.Parameter], where: str, next_step: str = NEXT_STEP) -> None:
    """Raises NonFiniteError with the first parameter whose gradient is not finite."""
    gradients = {name: value.grad for name, value in parameters.items() if value.grad is not None}
    if torch.isfinite(torch.nn.utils.get_total_norm(gradients.values())):
        return
    bad = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
    what = f"the gradient of {bad[0]} is not finite" if bad else "the gradients are so large that their norm overflows"
    raise NonFiniteError(what, where=where, next_step=next_step)


def blame_non_finite(
    network: nn.Module, forward: Callable[[], object], where: str, next_step: str = NEXT_STEP
) -> NonFiniteError:
    """The error for a loss that is not finite: it names the first module of ``forward`` where that begins.

    Args:
        network: its modules are watched in the order in which they compute.
        forward: the forward that gave the loss, run once more.
        where: the step, for the message.
        next_step: what to do now, for the message.
    """
    found: list[str] = []

    def check(name: str, part: str, values: object) -> None:
        for value in values if isinstance(values, tuple | list) else (values,):
            if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
                found.append(f"{part} of {name}")

    def watch(name: str, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        def before(module: nn.Module, arguments: tuple[object, ...]) -> None:
            for parameter_name, parameter in module.named_parameters():
                check(name, parameter_name, parameter)
            check(name, "the input", arguments)

        def after(module: nn.Module, arguments: tuple[object, ...], output: object) -> None:
            check(name, "the output", output)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    handles = [handle for name, module in network.named_modules() if name for handle in watch(name, module)]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return NonFiniteError(
        "the loss is not finite" + (f"; first in {found[0]}" if found else ", though every module is: it overflowed"),
        where=where,
        next_step=next_step,
    )
