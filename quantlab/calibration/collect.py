"""What the sites of a network see on the calibration set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.contracts.model import CalibrationBatch, CalibrationSet, Task
from quantlab.contracts.sampler import CalibrationPairs
from quantlab.errors import NonFiniteError, QuantlabError
from quantlab.quant.attention import QuantizedAttention, operands

SeeInput = Callable[[str, Tensor], None]
"""Called with a site's name and its input, before the site computes."""


def first_pairs(calibration: CalibrationSet, samples: int) -> CalibrationPairs:
    """The first ``samples`` trajectories at every step.

    Raises:
        QuantlabError: fewer trajectories were recorded than are asked for.
    """
    if samples > calibration.num_samples:
        raise QuantlabError(
            "more calibration samples are asked for than were recorded",
            where="calibrate.samples",
            got=samples,
            allowed=f"at most {calibration.num_samples} (calibrate.trajectories)",
        )
    steps = torch.arange(calibration.num_steps).repeat_interleave(samples)
    return CalibrationPairs(steps, torch.arange(samples).repeat(calibration.num_steps))


def calibration_batch(
    task: Task, calibration: CalibrationSet, samples: int, pairs: CalibrationPairs | None = None
) -> CalibrationBatch:
    """The chosen recorded inputs joined along the batch, step by step, guidance doubled.

    Args:
        task: knows how guidance doubles a batch.
        calibration: what was recorded.
        samples: without ``pairs``, so many of the first trajectories at every step.
        pairs: what a sampler chose.

    Raises:
        QuantlabError: fewer trajectories were recorded than are asked for.
    """
    if pairs is None:
        pairs = first_pairs(calibration, samples)
    chosen = [(int(step), pairs.samples[pairs.steps == step]) for step in pairs.steps.unique()]
    steps = [task.network_inputs(calibration.step(step, at_step)) for step, at_step in chosen]
    inputs = {name: torch.cat([step[name] for step in steps]) for name in steps[0]}
    return CalibrationBatch(inputs, inputs[task.timestep_input] if task.timestep_input else None)


def watch_inputs(network: nn.Module, sites: Sequence[str], see: SeeInput, forward: Callable[[], object]) -> None:
    """Run ``forward`` and show each site's input to ``see``, in the order in which the sites compute."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, arguments: see(name, arguments[0])

    handles = [network.get_submodule(name).register_forward_pre_hook(hook(name)) for name in sites]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()


def collect_inputs(
    network: nn.Module, sites: Sequence[str], forward: Callable[[], object]
) -> Mapping[str, tuple[Tensor, ...]]:
    """The inputs of every site, a tensor for each call in one forward.

    Raises:
        NonFiniteError: a site's input holds NaN or infinity.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in sites}

    def keep(name: str, x: Tensor) -> None:
        if not torch.isfinite(x).all():
            raise NonFiniteError("the input holds NaN or infinity during calibration", where=f"site {name}")
        seen[name].append(x)

    watch_inputs(network, sites, keep, forward)
    silent = [name for name, inputs in seen.items() if not inputs]
    if silent:
        raise QuantlabError(
            "a site was never reached during calibration", where=f"site {silent[0]}", next_step='keep it "float"'
        )
    return {name: tuple(inputs) for name, inputs in seen.items()}


def collect_operands(
    attentions: Mapping[str, QuantizedAttention], forward: Callable[[], object]
) -> Mapping[str, Mapping[str, Tensor]]:
    """The float tensor of every slot of every attention in one forward; none runs without attentions.

    Raises:
        NonFiniteError: one of them holds NaN or infinity.
        QuantlabError: an attention was not reached.
    """
    seen: dict[str, Mapping[str, Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def keep(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            seen[name] = operands(*arguments, **keywords)

        return keep

    handles = [each.register_forward_pre_hook(hook(name), with_kwargs=True) for name, each in attentions.items()]
    try:
        with torch.no_grad():
            if attentions:
                forward()
    finally:
        for handle in handles:
            handle.remove()
    for name in attentions:
        if name not in seen:
            raise QuantlabError("an attention was never reached during calibration", where=f"site {name}")
        for slot, x in seen[name].items():
            if not torch.isfinite(x).all():
                raise NonFiniteError("the tensor holds NaN or infinity", where=f"site {name}, {slot}")
    return seen
