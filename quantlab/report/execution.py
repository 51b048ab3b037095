"""How a packed model was executed: the kernel of every site, latency and memory, or the words "not measured"."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from quantlab.errors import ArtefactError
from quantlab.store import JSON, atomic_write_json

EXECUTION_FILE = "execution.json"
"""In the folder of a method, once it was executed."""
PACK_LINK = "pack"
"""In the folder of a method that was packed."""
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class SiteKernel:
    """What computes a site, and why not integers, or what its integers cost; "" when there is nothing to say."""

    site: str
    kernel: str
    why: str


@dataclass(frozen=True)
class Latency:
    """A forward in integers beside one in float: the same process, in turns.

    Attributes:
        float_seconds: median of the float forward.
        integer_seconds: median of the integer forward.
        speedup: median over the turns of float over integer time.
        batch: samples of a forward.
        threads: of torch.
        turns: how often each was timed.
    """

    float_seconds: float
    integer_seconds: float
    speedup: float
    batch: int
    threads: int
    turns: int

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"{self.speedup:.2f} times as fast as float: {self.integer_seconds * 1e3:.1f} ms against "
            f"{self.float_seconds * 1e3:.1f} ms, batch {self.batch}, {threads}, median of {self.turns} turns"
        )


@dataclass(frozen=True)
class Execution:
    """What is known about the execution of a packed method.

    Attributes:
        sites: the kernel of every site; () when it was never executed.
        latency: None when it was not measured.
        loaded_bytes: held in memory by the integer model; None when it was not measured.
        float_bytes: held by the float model.
        peak_bytes: largest memory of a forward; None when it was not measured.
    """

    method: str
    sites: Sequence[SiteKernel] = ()
    latency: Latency | None = None
    loaded_bytes: int | None = None
    float_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def lines(self) -> dict[str, str]:
        """What a table says of it, by heading."""
        counts = Counter(site.kernel for site in self.sites)
        held = NOT_MEASURED
        if self.loaded_bytes is not None and self.float_bytes:
            held = f"{self.loaded_bytes:,} bytes, {self.loaded_bytes / self.float_bytes:.1%} of float"
        return {
            "kernels": ", ".join(f"{number} sites {kernel}" for kernel, number in counts.items()) or NOT_MEASURED,
            "latency": str(self.latency) if self.latency is not None else NOT_MEASURED,
            "held in memory": held,
            "peak memory": f"{self.peak_bytes:,} bytes" if self.peak_bytes is not None else NOT_MEASURED,
        }


def write_execution(run_folder: Path, execution: Execution) -> None:
    """Keep what was measured in a run folder, in the place of what was there."""
    content: JSON = {"schema_version": 1, **asdict(execution)}
    atomic_write_json(run_folder / execution.method / EXECUTION_FILE, content)


def read_executions(run_folder: Path, methods: Sequence[str]) -> list[Execution]:
    """Of the packed methods among these, those that were never executed included."""
    return [found for method in methods if (found := _read(run_folder, method)) is not None]


def _read(run_folder: Path, method: str) -> Execution | None:
    folder = run_folder / method
    file = folder / EXECUTION_FILE
    if not file.is_file():
        return Execution(method) if (folder / PACK_LINK).is_dir() else None
    try:
        content = json.loads(file.read_text())
        version, sites, latency = (content.pop(name) for name in ("schema_version", "sites", "latency"))
        if version != 1:
            raise ValueError(f"schema_version {version}")
        measured = Latency(**latency) if latency is not None else None
        return Execution(**content, sites=tuple(SiteKernel(**site) for site in sites), latency=measured)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(
            "the record of an execution cannot be read",
            where=str(file),
            got=error,
            next_step=f"quantlab execute {run_folder} --method {method}",
        ) from error
