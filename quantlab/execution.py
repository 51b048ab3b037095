"""Integer execution from Python: of a quantized module, or of the model of an earlier run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from quantlab.allocation.student import tapped_run
from quantlab.api import LoadedRun, QuantizedModule, load_quantized
from quantlab.contracts.model import Evidence, GenerativeTask
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
from quantlab.report.console import Console, make_console
from quantlab.stages.evaluate import draw

_BATCH = 250


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
    run = tapped_run(lowered.network, fused, ())
    integer = replace(student, network=lowered.network, graph=fused, run=lambda inputs: run(inputs)[0])
    return replace(loaded, student=integer), lowered.dispatch


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
    """

    dispatch: tuple[SiteDispatch, ...]
    samples: int
    psnr: float
    fid: float
    simulated_fid: float
    loaded_bytes: int
    float_bytes: int

    def __str__(self) -> str:
        return (
            f"{dispatch_text(self.dispatch)}\n"
            f"{self.samples} images: PSNR to the simulation {self.psnr:.2f} dB; FID {self.fid:.3f}, "
            f"simulated {self.simulated_fid:.3f}\n"
            f"held in memory: {self.loaded_bytes / self.float_bytes:.1%} of float32"
        )


def _psnr(images: Tensor, others: Tensor) -> float:
    error = (images - others).double().square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(DATA_RANGE**2 / error)


def compare_execution(
    folder: Path, method: str | None = None, *, samples: int = 1000, seed: int = 0, backend: str = Backend.ONEDNN
) -> ExecutionQuality:
    """Draw with the quantized model of a run in integers and simulated, from the same noise, and compare.

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
    return ExecutionQuality(dispatch, samples, psnr, fid, simulated_fid, held, float_bytes)
