"""What the sites of a network see on the calibration set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.calibration.parts import row_parts
from quantlab.calibration.spill import Spill, Streaming
from quantlab.contracts.model import CalibrationBatch, CalibrationSet, Inputs, Run, Task
from quantlab.contracts.sampler import CalibrationPairs
from quantlab.contracts.site import Site, SiteKind
from quantlab.errors import NonFiniteError, QuantlabError
from quantlab.quant.operands import QuantizedOperands

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
        _require_finite(x, name)
        seen[name].append(x)

    watch_inputs(network, sites, keep, forward)
    _require_reached(name for name, inputs in seen.items() if not inputs)
    return {name: tuple(inputs) for name, inputs in seen.items()}


class SpilledInputs(Mapping[str, tuple[Tensor, ...]]):
    """The inputs of every site as ``collect_inputs`` gives them, from forwards of parts of the batch, on disk.

    Args:
        network: that holds the sites.
        sites: layers; those without the samples in dimension 0 see one row after another.
        forward: of the network.
        inputs: of the whole batch.
        streaming: rows of a part, and where the files go.

    Raises:
        NonFiniteError: a site's input holds NaN or infinity.
        QuantlabError: a site was not reached.
    """

    def __init__(
        self, network: nn.Module, sites: Sequence[Site], forward: Run, inputs: Inputs, streaming: Streaming
    ) -> None:
        self._calls = dict.fromkeys((site.name for site in sites), 0)
        self._spill = Spill[tuple[str, int]](streaming.folder, next(network.parameters()).device)
        by_name = {site.name: site for site in sites}
        for part in row_parts(inputs, streaming.rows):
            self._calls = dict.fromkeys(self._calls, 0)

            def keep(name: str, x: Tensor) -> None:
                _require_finite(x, name)
                site = by_name[name]
                rows_first = site.has_samples_first or site.kind in (SiteKind.CONV, SiteKind.CONV_TRANSPOSE)
                self._spill.append((name, self._calls[name]), x if rows_first else x.reshape(-1, x.shape[-1]))
                self._calls[name] += 1

            watch_inputs(network, list(by_name), keep, lambda: forward(part))  # noqa: B023
        _require_reached(name for name, calls in self._calls.items() if not calls)

    def __getitem__(self, name: str) -> tuple[Tensor, ...]:
        return tuple(self._spill[name, call] for call in range(self._calls[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)


def _require_finite(x: Tensor, site: str) -> None:
    if not torch.isfinite(x).all():
        raise NonFiniteError("the input holds NaN or infinity during calibration", where=f"site {site}")


def _require_reached(silent: Iterable[str]) -> None:
    for name in silent:
        raise QuantlabError(
            "a site was never reached during calibration", where=f"site {name}", next_step='keep it "float"'
        )


Operands = Mapping[tuple[str, str], Tensor]
"""The float tensors of products of activations, by site and slot."""


def collect_operands(
    products: Mapping[str, QuantizedOperands], forward: Run, inputs: Inputs, streaming: Streaming | None = None
) -> Operands:
    """The float tensor of every slot of every product of activations; nothing runs without one.

    Args:
        products: by site, attentions included.
        forward: of the network that holds them.
        inputs: of the whole batch.
        streaming: parts of the batch and tensors on disk; None: one forward, in memory.

    Raises:
        NonFiniteError: one of them holds NaN or infinity.
        QuantlabError: a product was not reached.
    """
    if not products:
        return {}
    device = next(iter(inputs.values())).device
    held: dict[tuple[str, str], Tensor] = {}
    spill = None if streaming is None else Spill[tuple[str, str]](streaming.folder, device)
    reached: set[str] = set()

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def keep(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            reached.add(name)
            for slot, x in products[name].operands(*arguments, **keywords).items():
                if not torch.isfinite(x).all():
                    raise NonFiniteError("the tensor holds NaN or infinity", where=f"site {name}, {slot}")
                if spill is None:
                    held[name, slot] = x
                else:
                    spill.append((name, slot), x)

        return keep

    handles = [each.register_forward_pre_hook(hook(name), with_kwargs=True) for name, each in products.items()]
    try:
        with torch.no_grad():
            for part in row_parts(inputs, None if streaming is None else streaming.rows):
                forward(part)
    finally:
        for handle in handles:
            handle.remove()
    for name in products:
        if name not in reached:
            raise QuantlabError("a product of activations was never reached during calibration", where=f"site {name}")
    return held if spill is None else spill
