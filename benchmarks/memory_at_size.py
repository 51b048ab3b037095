"""Measure the memory and time of quantizing a UNet of the size of Stable Diffusion 1.4, with random weights.

    python benchmarks/memory_at_size.py --output docs/results/memory-at-size/sd.json
    python benchmarks/memory_at_size.py --size small --output docs/results/memory-at-size/small.json

Goes through recording, MPQ-DM's bits over all sites, and the reconstruction of one block, and prints the peak of the
resident memory in each phase: anonymous pages, and pages of files that the system may drop when it needs the room.
Ends the process when both together pass ``--limit``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantlab.contracts.block import Partition
from quantlab.contracts.model import CalibrationSet, Inputs, Progress, Run, Task
from quantlab.contracts.sections import Sampling, Tune
from quantlab.plugins import load_registry
from quantlab.recipe.check import check, check_plugins
from quantlab.recipe.layers import merge, node_of
from quantlab.recipe.schema import SCHEMA_VERSION, Recipe
from quantlab.report.console import make_console
from quantlab.sampling import SampleStep, Schedule, recorded
from quantlab.stages import prepare, quantize
from quantlab.stages.context import RunContext
from quantlab.store import Store, create_run
from quantlab.torchvision_shim import ensure_torchvision_imports
from quantlab.tuning.reconstruct import ReconstructConfig, ReconstructTuner

GIB = 2**30
TOKENS = 77
SIZES: Mapping[str, dict[str, object]] = {
    "sd": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768},
    "small": {"block_out_channels": (64, 128, 320, 320), "cross_attention_dim": 256},
}
"""What differs from diffusers' defaults; "sd" is the configuration of Stable Diffusion 1.4."""


class UNetTask(Task):
    """A text-conditional denoiser of random weights on random text embeddings.

    Args:
        size: a key of ``SIZES``.
        latents: height and width of what is recorded.
        steps: of the sampler.
    """

    timestep_input = "timestep"
    static: Mapping[str, object] = {"return_dict": False}

    def __init__(self, size: str, latents: int, steps: int) -> None:
        ensure_torchvision_imports()
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        self.network = UNet2DConditionModel(**SIZES[size]).eval().requires_grad_(False)  # type: ignore[arg-type]
        self.width, self.latents = int(str(SIZES[size]["cross_attention_dim"])), latents
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.schedule = Schedule((1 - betas).cumprod(0), Sampling(steps=steps))

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        """Latents of 8 x 8: the graph is the same at every size."""
        rng = torch.Generator().manual_seed(0)
        return {
            "sample": torch.randn(batch, 4, 8, 8, generator=rng),
            "timestep": torch.arange(batch) * 37,
            "encoder_hidden_states": torch.randn(batch, TOKENS, self.width, generator=rng),
        }

    def network_inputs(self, inputs: Inputs) -> dict[str, Tensor]:
        """As they are: no guidance."""
        return dict(inputs)

    def combine(self, output: Tensor, inputs: Inputs) -> Tensor:
        """As it is."""
        return output

    def calibrate(self, run: Run, samples: range, rng: torch.Generator, progress: Progress) -> CalibrationSet:
        """Trajectories from noise."""
        noise = torch.randn(len(samples), 4, self.latents, self.latents, generator=rng)
        text = torch.randn(len(samples), TOKENS, self.width, generator=rng)
        steps: list[SampleStep] = []

        def keep(step: SampleStep) -> None:
            steps.append(step)
            progress(step.index + 1, self.schedule.settings.steps)

        with torch.no_grad():
            self.schedule.sample(run, noise, {"encoder_hidden_states": text}, rng, keep)
        return recorded(steps)


@dataclass
class Phase:
    """What a phase took; GiB and seconds, the memory at its peak."""

    name: str
    seconds: float = 0.0
    anonymous_gib: float = 0.0
    file_backed_gib: float = 0.0
    resident_gib: float = 0.0

    def see(self, anonymous: float, file_backed: float) -> None:
        """Raise the peaks to a measurement."""
        self.anonymous_gib = max(self.anonymous_gib, anonymous)
        self.file_backed_gib = max(self.file_backed_gib, file_backed)
        self.resident_gib = max(self.resident_gib, anonymous + file_backed)


class Meter:
    """Reads the resident memory of this process ten times a second."""

    def __init__(self, limit_gib: float) -> None:
        self.limit_gib, self.phases = limit_gib, [Phase("start")]
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            anonymous, file_backed = resident_gib()
            self.phases[-1].see(anonymous, file_backed)
            if anonymous + file_backed > self.limit_gib:
                print(f"{self.phases[-1].name}: {anonymous + file_backed:.1f} GiB is over the limit", file=sys.stderr)
                os._exit(1)
            time.sleep(0.1)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens in the context."""
        self.phases.append(Phase(name))
        start = time.perf_counter()
        yield
        self.phases[-1].seconds = time.perf_counter() - start
        print(line(self.phases[-1]), flush=True)


def resident_gib() -> tuple[float, float]:
    """Anonymous and file-backed memory of this process."""
    found = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    anonymous, file_backed = (int(found[name].split()[0]) * 1024 / GIB for name in ("RssAnon", "RssFile"))
    return anonymous, file_backed


def line(phase: Phase) -> str:
    """A row of the table."""
    values = (phase.seconds, phase.anonymous_gib, phase.file_backed_gib, phase.resident_gib)
    return "| {} | {:.0f} | {:.2f} | {:.2f} | {:.2f} |".format(phase.name, *values)


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """MPQ-DM at W4A8, first and last layer at 8 bits, recorded in parts and in half precision."""
    registry = load_registry()
    calibrate: dict[str, object] = {"trajectories": arguments.samples, "samples": arguments.samples}
    if arguments.batch:
        calibrate |= {"batch": arguments.batch, "dtype": "float16"}
    own = {
        "version": SCHEMA_VERSION,
        "model": {"source": "memory", "name": arguments.size},
        "method": "mpq-dm",
        "budget": {"weight_bits": 4, "activation_bits": 8},
        "keep": [{"match": name, "bits": 8} for name in ("conv_in", "conv_out")],
        "sampling": {"steps": arguments.steps},
        "calibrate": calibrate,
        # Ranges from extremes: the MSE search, which goes through the rows of one weight in chunks, takes far longer.
        "weights": {"observer": "min_max"},
        "allocate": ["uniform", {"kurtosis": {"search_observer": "min_max"}}],
    }
    root = node_of(registry.method("mpq-dm").fragment, "method mpq-dm")
    root = merge(root, node_of(own, "memory_at_size.py"))
    return check_plugins(check(Recipe, root), root, registry)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Go through all phases."""
    meter, recipe = Meter(arguments.limit), recipe_of(arguments)
    context = RunContext(Store(folder), create_run(folder, "size", "0" * 16), load_registry(), make_console(quiet=True))
    with meter.phase("build the network"):
        task = UNetTask(arguments.size, arguments.latents, arguments.steps)
    with meter.phase("capture"):
        captured = prepare.capture(context, task)
    plan = prepare.plan(captured.sites, recipe, {})
    with meter.phase("record"):
        calibrated = prepare.calibrate(context, captured, recipe.sampling, recipe.calibrate, recipe.seed)
    with meter.phase("assign bits and scales"):
        assigned = quantize.assign_bits(context, captured, calibrated, plan, recipe, "mpq-dm")
    with meter.phase("reconstruct a block"):
        settings = Tune(iterations=arguments.iterations, batch=1)
        checkpoint = quantize.FileCheckpoint(folder)
        job = quantize.tune_job(
            captured, calibrated, assigned, context.registry, settings, 0, checkpoint, lambda done, total: None
        )
        tuner = ReconstructTuner(ReconstructConfig())  # type: ignore[call-arg]
        block = next(block for block in job.cut(Partition(tuner.config.grouping)) if block.name == arguments.block)
        history = tuner.tune(replace(job, cut=lambda partition: (block,))).history[block.name]
    parameters = sum(value.numel() for value in task.network.parameters())
    return {
        "size": arguments.size,
        "parameters": parameters,
        "latents": arguments.latents,
        "rows": arguments.samples * arguments.steps,
        "rows_in_a_forward": arguments.batch,
        "sites": len(plan.layers),
        "capture": captured.graph.method,
        "block": {"name": block.name, "sites": len(block.sites), "first": history[0], "last": history[-1]},
        "iterations": arguments.iterations,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "phases": [asdict(phase) for phase in meter.phases[1:]],
        "peak": {
            name: max(getattr(phase, name) for phase in meter.phases)
            for name in ("anonymous_gib", "file_backed_gib", "resident_gib")
        },
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="sd")
    parser.add_argument("--latents", type=int, default=64, help="height and width")
    parser.add_argument("--samples", type=int, default=1, help="trajectories")
    parser.add_argument("--steps", type=int, default=2, help="of the sampler")
    parser.add_argument("--batch", type=int, default=1, help="rows in one forward; 0: all, in memory")
    parser.add_argument("--iterations", type=int, default=3, help="of the block's reconstruction")
    parser.add_argument("--block", default="down_blocks.0.resnets.0")
    parser.add_argument("--limit", type=float, default=13.0, help="GiB of resident memory at which to stop")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--folder", type=Path, help="on a disk with room; a temporary one without it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(arguments, Path(folder))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
