"""What the backward pass keeps, and what a computation needs while it runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def saved_mib(forward: Callable[[], object]) -> float:
    """MiB of the tensors saved for backward in one forward; a storage that is saved twice counts once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(storages.values()) / 2**20


def peak_mib(work: Callable[[], object]) -> float:
    """MiB that torch had allocated at most during ``work``, beyond what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    del kept
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, current)
    return peak / 2**20
