"""Going on with a training that was killed, to the very result of one that was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from quantlab.contracts.tuning import Checkpoint, Loss, TuneJob


def save_training(
    checkpoint: Checkpoint,
    iteration: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    history: Mapping[str, list[float]],
    losses: Mapping[str, Loss] = MappingProxyType({}),
) -> None:
    """Write parameters, optimizer state, history and what the losses remember.

    Args:
        checkpoint: where to.
        iteration: the number of iterations done.
        parameters: what is trained, under names that stay the same.
        optimizer: of them.
        history: values of the losses so far, by name.
        losses: those that may have a memory, by label.
    """
    tensors = {f"parameter/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value
    tensors |= {f"history/{name}": torch.tensor(values, dtype=torch.float64) for name, values in history.items()}
    for label, loss in losses.items():
        tensors |= {f"loss/{label}/{key}": value for key, value in loss.state().items()}
    checkpoint.save(iteration, tensors)


def restore_training(
    checkpoint: Checkpoint,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    history: dict[str, list[float]],
    losses: Mapping[str, Loss] = MappingProxyType({}),
) -> int:
    """Go back, in place, to what ``save_training`` wrote; returns the number of iterations done.

    At the start of a training, 0 iterations, the losses get an empty memory.
    """
    iteration, tensors = checkpoint.load() or (0, {})
    for label, loss in losses.items():
        prefix = f"loss/{label}/"
        loss.load({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})
    if iteration == 0:
        return 0
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


def save_layers(job: TuneJob, done: int, history: Mapping[str, Sequence[float]]) -> None:
    """Write all layers of a job after ``done`` of its parts, with the losses of each part by its name."""
    tensors = {f"layer/{site}/{k}": v for site, layer in job.layers.items() for k, v in layer.state_dict().items()}
    tensors |= {f"history/{name}": torch.tensor(losses, dtype=torch.float64) for name, losses in history.items()}
    job.checkpoint.save(done, tensors)


def restore_layers(job: TuneJob, parts: Sequence[str]) -> dict[str, list[float]]:
    """Go back to what ``save_layers`` wrote, if anything; returns the losses of the ``parts`` that are done."""
    saved = job.checkpoint.load()
    if saved is None:
        return {}
    done, tensors = saved
    for site, layer in job.layers.items():
        prefix = f"layer/{site}/"
        layer.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return {name: tensors[f"history/{name}"].tolist() for name in parts[:done]}
