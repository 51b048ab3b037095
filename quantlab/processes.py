"""One run over several processes, as torchrun or ``accelerate launch`` start them."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from quantlab.errors import ProcessError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroupGloo

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""A process waits for the first one's longest stage; one that has ended is noticed at once."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen by one of them.

    The first computes, writes the run folder and speaks. The others follow it stage by stage, read what it stored, and
    draw their share of images.

    Attributes:
        rank: of this process; 0 is the first.
        count: how many there are.
        local_rank: of this process among those of its machine.
        group: connects them, through gloo. It is not torch's default group, over which libraries that find one, such as
            torchmetrics, would share their own state.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    group: ProcessGroupGloo | None = field(default=None, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the first."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """The device of this process: each has a GPU of its own where just "cuda" is asked for."""
        return f"cuda:{self.local_rank}" if asked == "cuda" and self.count > 1 else asked

    def share(self, total: int) -> range:
        """Which of ``total`` pieces of work are this process's."""
        return range(self.rank, total, self.count)

    def tell(self, value: T) -> T:
        """The first process's value, in every one; raises ProcessError when another has ended."""
        if not self.first:
            return self._receive(0)
        for rank in range(1, self.count):
            self._send(value, rank)
        return value

    def everyone(self, value: T) -> list[T]:
        """The values of all processes by rank, in every one; raises as ``tell`` does."""
        if not self.first:
            self._send(value, 0)
        return self.tell([value, *map(self._receive, range(1, self.count))] if self.first else [])

    def collect(self, own: Mapping[int, Tensor], total: int) -> list[Tensor]:
        """In the first process: all pieces in order, its own among them; raises as ``tell`` does."""
        return [own[index] if index in own else self._receive(index % self.count) for index in range(total)]

    def hand_in(self, own: Mapping[int, Tensor]) -> None:
        """In every other process: give its pieces to the first; raises as ``tell`` does."""
        for index in sorted(own):
            self._send(own[index], 0)

    def _send(self, value: object, rank: int) -> None:
        import torch

        content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        for part in (torch.tensor([len(content)]), content):
            self._wait(lambda group, part=part: group.send([part], rank, 0))

    def _receive(self, rank: int) -> Any:
        import torch

        size = torch.zeros(1, dtype=torch.int64)
        self._wait(lambda group: group.recv([size], rank, 0))
        content = torch.empty(int(size), dtype=torch.uint8)
        self._wait(lambda group: group.recv([content], rank, 0))
        return pickle.loads(content.numpy().tobytes())

    def _wait(self, exchange: Callable[[Any], Any]) -> None:
        try:
            exchange(self.group).wait()
        except RuntimeError as error:
            raise ProcessError(
                "another process of this run has ended",
                got=str(error).splitlines()[0],
                next_step="its own message says why; the same command goes on after the last finished stage",
            ) from error


ALONE = Processes()
"""The only process of a run."""


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that this one was started with, connected; ``ALONE`` when it was started by itself.

    They are told by the environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

    Raises:
        ProcessError: the variables are incomplete, or the processes do not reach one another.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    from torch import distributed

    try:
        store, rank, _ = next(distributed.rendezvous("env://", timeout=PATIENCE))
        group = distributed.ProcessGroupGloo(distributed.PrefixStore("quantlab", store), rank, count, PATIENCE)
        found = Processes(rank, count, int(os.environ.get("LOCAL_RANK", "0")), group)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ProcessError(
            "the processes of this run cannot be connected",
            where="RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT",
            got=error,
            next_step="start them with torchrun or accelerate launch, or unset WORLD_SIZE for a run in one process",
        ) from error
    try:
        yield found
    except Exception:
        # No farewell: the connections close with the process, which is how the others learn of it.
        print(f"process {found.rank} of {count} (they count from 0) ends:", file=sys.stderr)
        raise
    found.everyone(None)  # none leaves while another still listens to it
