"""Integer execution from Python: of a quantized module, or of the model of an earlier run."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from quantlab.allocation.student import tapped_run
from quantlab.api import LoadedRun, QuantizedModule, load_quantized
from quantlab.contracts.model import Evidence, GenerativeTask, Inputs, Task
from quantlab.contracts.sections import Evaluate
from quantlab.errors import ArtefactError, ModelError
from quantlab.evaluation.metrics.fid import frechet_distance
from quantlab.evaluation.metrics.paired_error import DATA_RANGE
from quantlab.graph.bind import bind, bound_graph, unbind
from quantlab.graph.captured import CapturedGraph
from quantlab.packing.backends.activation import ActivationKernel, activation_kernel
from quantlab.packing.backends.dispatch import (
    Backend,
    Kernel,
    Lowered,
    SiteDispatch,
    dispatch_text,
    loaded_bytes,
    lower_graph,
)
from quantlab.packing.backends.triton_activation import triton_activation_kernel
from quantlab.packing.model import PackedModel, promised_output
from quantlab.recipe.load import load_recipe
from quantlab.report.console import Console, make_console
from quantlab.report.execution import NOT_MEASURED, Execution, Latency, SiteKernel, write_execution
from quantlab.report.sources import RUN_RESULT, read_rows
from quantlab.stages.describe import save_page
from quantlab.stages.evaluate import draw

_BATCH = 250
_TURNS = 7
_TIMED_BATCH = 8


@dataclass(frozen=True)
class IntegerModule:
    """What ``execute`` returns.

    Attributes:
        module: a copy of the quantized module that computes in integers wherever they are exact, called as before.
        dispatch: the kernel of every site, and why.
        loaded_bytes: what the copy holds in memory: int8 weights, scales, the float rest.
    """

    module: nn.Module
    dispatch: tuple[SiteDispatch, ...]
    loaded_bytes: int


def execute(
    quantized: QuantizedModule | PackedModel,
    backend: str = Backend.ONEDNN,
    *,
    compiled: bool = True,
    keep_packed: bool = False,
    console: Console | None = None,
) -> IntegerModule:
    """A quantized module whose layers compute in integers; the quantized module itself is not changed.

    Each layer is compared with its float64 simulation on a probe first. A site that has no exact integer form keeps
    its simulation, and the reason is printed. Of a packed model that was loaded with ``keep_packed`` no more than one
    layer's weight is ever float at a time.

    Args:
        quantized: in float32, from ``quantize``, or from ``load_quantized`` of a packed file; on the CPU for "onednn"
            and "reference".
        backend: "onednn"; "cuda-int8" or "triton" for a model on a GPU, neither measured yet; or "reference" for slow
            exact integers. The GPU's take a CPU too, for tests of their arithmetic.
        compiled: quantize activations by one compiled pass, where there is a compiler; the codes are the same.
        keep_packed: hold weights in their own bits instead of int8, and unpack those of a layer whenever it runs: less
            memory, slower, the same outputs to the bit.
        console: where reasons are printed.
    """
    if isinstance(quantized, PackedModel):
        network, graph, timestep_input = quantized.network, quantized.graph, quantized.manifest.timestep_input
        graph = promised_output(graph, type(network))
    else:
        network, bound = quantized.module, bound_graph(quantized.module)
        assert bound is not None, "quantize binds the graph to the module"
        graph, timestep_input = bound
    lowered, fused = _lower(network, graph, Backend(backend), compiled, keep_packed, console)
    module = lowered.network if bound_graph(lowered.network) is None else unbind(lowered.network)
    return IntegerModule(bind(module, fused, timestep_input), lowered.dispatch, loaded_bytes(module))


def execute_run(
    loaded: LoadedRun,
    backend: str = Backend.ONEDNN,
    *,
    compiled: bool = True,
    keep_packed: bool = False,
    console: Console | None = None,
) -> tuple[LoadedRun, tuple[SiteDispatch, ...]]:
    """The model of a run with layers that compute in integers, and the kernel of every site; else as ``execute``."""
    student = loaded.student
    lowered, fused = _lower(student.network, student.graph, Backend(backend), compiled, keep_packed, console)
    tapped = tapped_run(lowered.network, fused, ())

    def run(inputs: Inputs) -> Tensor:
        return tapped(inputs)[0]

    return replace(loaded, student=replace(student, network=lowered.network, graph=fused, run=run)), lowered.dispatch


def _lower(
    network: nn.Module,
    graph: CapturedGraph,
    backend: Backend,
    compiled: bool,
    keep_packed: bool,
    console: Console | None,
) -> tuple[Lowered, CapturedGraph]:
    console = console or make_console()
    activation = _activation(network) if compiled else ActivationKernel({})
    if activation.why:
        console.warn(activation.why)
    lowered, fused = lower_graph(network, graph, backend, activation, keep_packed)
    if any(entry.kernel is Kernel.SIMULATED for entry in lowered.dispatch):
        console.warn(dispatch_text(lowered.dispatch))
    return lowered, fused


def _activation(network: nn.Module) -> ActivationKernel:
    device = next((parameter.device.type for parameter in network.parameters()), "cpu")
    return activation_kernel() if device == "cpu" else triton_activation_kernel(device)


@dataclass(frozen=True)
class ExecutionQuality:
    """A run's model in integers beside its simulation, from the same noise.

    Attributes:
        dispatch: the kernel of every site.
        samples: images drawn by each.
        psnr: of the integer images against the simulated ones, dB over all pixels; infinite when equal.
        fid: Fréchet distance of the integer images to the data.
        simulated_fid: of the simulated ones.
        loaded_bytes: held by the integer model.
        float_bytes: held by the float model.
        latency: of one forward beside the float network's.
    """

    dispatch: tuple[SiteDispatch, ...]
    samples: int
    psnr: float
    fid: float
    simulated_fid: float
    loaded_bytes: int
    float_bytes: int
    latency: Latency

    def __str__(self) -> str:
        return (
            f"{dispatch_text(self.dispatch)}\n"
            f"{self.samples} images: PSNR to the simulation {self.psnr:.2f} dB; FID {self.fid:.3f}, "
            f"simulated {self.simulated_fid:.3f}\n"
            f"held in memory: {self.loaded_bytes / self.float_bytes:.1%} of float32; peak memory {NOT_MEASURED}\n"
            f"a forward: {self.latency}"
        )


def _psnr(images: Tensor, others: Tensor) -> float:
    error = (images - others).double().square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(DATA_RANGE**2 / error)


def compare_execution(
    folder: Path, method: str | None = None, *, samples: int = 1000, seed: int = 0, backend: str = Backend.ONEDNN
) -> ExecutionQuality:
    """Draw with the quantized model of a run in integers and simulated, from the same noise, and compare.

    What is measured is kept in the run folder, and its page is written again with it.

    Raises:
        ArtefactError: the folder is no complete run.
        ModelError: its model draws no images, or has no judge to compare them by.
    """
    console = make_console()
    simulated = load_quantized(folder, method)
    if not isinstance(simulated, LoadedRun):
        raise ArtefactError("this is no run folder", where=str(folder), next_step="give the folder of a run")
    task = simulated.task
    if not isinstance(task, GenerativeTask) or not {Evidence.FEATURES, Evidence.REFERENCE} <= set(task.offers):
        raise ModelError("images of this model cannot be compared with real ones", where=str(folder))
    integer, dispatch = execute_run(simulated, backend, console=console)
    settings = Evaluate(samples=samples, batch=_BATCH)
    images: list[Tensor] = []
    for title, loaded in (("Draw in integers", integer), ("Draw simulated", simulated)):
        with console.task(title) as progress, torch.no_grad():
            images.append(draw(task, loaded.student.run, settings, seed, progress, loaded.corrections))
    real = task.reference().features
    assert real is not None, "the task offers features"
    fid, simulated_fid = (frechet_distance(task.judge(drawn)[0], real) for drawn in images)
    psnr = _psnr(*images)
    float_bytes = sum(value.numel() * value.element_size() for value in task.network.state_dict().values())
    held = loaded_bytes(integer.student.network)
    latency = _latency(task, integer)
    sites = tuple(
        SiteKernel(entry.site, entry.kernel, "; ".join(filter(None, (entry.why, entry.codes)))) for entry in dispatch
    )
    write_execution(folder, Execution(simulated.method, sites, latency, held, float_bytes))
    if (folder / RUN_RESULT).is_file():  # an unfinished run has no page yet
        rows = [row for _, row in read_rows([folder])]
        save_page(folder, load_recipe(folder / "recipe.resolved.yaml").recipe, rows)
    return ExecutionQuality(dispatch, samples, psnr, fid, simulated_fid, held, float_bytes, latency)


@torch.no_grad()
def _latency(task: Task, integer: LoadedRun) -> Latency:
    """One forward of the network in integers beside the float network's, in turns after one that is not timed."""
    inputs = task.example_inputs(_TIMED_BATCH)
    forwards = (lambda: task.network(**inputs, **task.static), lambda: integer.run(inputs))
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(_TURNS + 1):
        for forward, times in zip(forwards, seconds, strict=True):
            start = time.perf_counter()
            forward()
            times += [time.perf_counter() - start] if turn else []
    speedup = median(before / after for before, after in zip(*seconds, strict=True))
    float_seconds, integer_seconds = map(median, seconds)
    return Latency(float_seconds, integer_seconds, speedup, _TIMED_BATCH, torch.get_num_threads(), _TURNS)
