"""Going on with a training that was killed, to the very result of one that was not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from quantlab.contracts.tuning import Checkpoint


def save_training(
    checkpoint: Checkpoint,
    iteration: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    history: Mapping[str, list[float]],
) -> None:
    """Write parameters, optimizer state and history.

    Args:
        checkpoint: where to.
        iteration: the number of iterations done.
        parameters: what is trained, under names that stay the same.
        optimizer: of them.
        history: losses so far, by name.
    """
    tensors = {f"parameter/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value
    tensors |= {f"history/{name}": torch.tensor(values, dtype=torch.float64) for name, values in history.items()}
    checkpoint.save(iteration, tensors)


def restore_training(
    checkpoint: Checkpoint,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    history: dict[str, list[float]],
) -> int:
    """Go back, in place, to what ``save_training`` wrote, if anything; returns the number of iterations done."""
    saved = checkpoint.load()
    if saved is None:
        return 0
    iteration, tensors = saved
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"parameter/{name}"])
        prefix = f"optimizer/{name}/"
        found = ((key, value.to(parameter.device)) for key, value in tensors.items() if key.startswith(prefix))
        state = {key.removeprefix(prefix): value for key, value in found}
        if state:
            optimizer.state[parameter] = state
    for name in history:
        history[name] = tensors[f"history/{name}"].tolist()
    schedule.last_epoch = iteration
    for group, base in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
        group["lr"] = base * schedule.lr_lambdas[0](iteration)
    return iteration
