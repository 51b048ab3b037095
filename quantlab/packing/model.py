"""A model that was read from a packed file, and how a pipeline gets it."""

from __future__ import annotations

import inspect
import typing
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from quantlab.contracts.allocation import BitMap
from quantlab.contracts.correction import FittedCorrection
from quantlab.contracts.model import Inputs, Run
from quantlab.errors import ModelError
from quantlab.graph.bind import bind
from quantlab.graph.captured import CapturedGraph, OutputType
from quantlab.graph.modules import first_tensor
from quantlab.graph.run import runner
from quantlab.packing.manifest import Manifest
from quantlab.quant.operation import Weighted

DENOISERS = ("unet", "transformer")
"""Where the pipelines of diffusers hold the network."""


@dataclass(frozen=True)
class PackedModel:
    """A quantized denoiser, ready to run.

    Attributes:
        network: quantized layers at their paths. With ``keep_packed`` the ``weight`` of each is NaN throughout, and its
            ``stored`` gives the weight.
        graph: the forward.
        manifest: where it comes from.
        bit_map: bits of every quantized layer and input.
        corrections: of its sampler.
    """

    network: nn.Module
    graph: CapturedGraph
    manifest: Manifest
    bit_map: BitMap
    corrections: tuple[FittedCorrection, ...] = ()

    @property
    def method(self) -> str:
        """The method that quantized it."""
        return self.manifest.origin.method

    @cached_property
    def run(self) -> Run:
        """The forward on keyword tensors; the first tensor that it returns."""
        forward = runner(self.network, self.graph)

        def run(inputs: Inputs) -> Tensor:
            found = first_tensor(forward(inputs))
            assert found is not None, "a denoiser returns a tensor"
            return found

        return run

    @property
    def loaded_bytes(self) -> int:
        """Memory of everything that the network holds; what is shared counts once."""
        tensors = [*self.network.parameters(), *self.network.buffers()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    def install(self, pipeline: Any, component: str | None = None) -> Any:
        """Make a diffusers pipeline denoise with this model; returns the pipeline.

        The very object that the pipeline holds gets the quantized layers and the forward, so that references to it,
        its ``config`` and its class go on working. Its float weights are let go.

        Args:
            pipeline: it holds a network of the same class and shape.
            component: the attribute with the network; "unet" or "transformer", whichever there is, without it.

        Raises:
            ModelError: there is no such network, or it is another one than this.
        """
        return install(self.network, self.graph, self.manifest.timestep_input, pipeline, component)


def install(
    quantized: nn.Module, graph: CapturedGraph, timestep_input: str | None, pipeline: Any, component: str | None = None
) -> Any:
    """Put a quantized network and its graph into a pipeline; see ``PackedModel.install``."""
    names = (component,) if component else DENOISERS
    name = next((name for name in names if isinstance(getattr(pipeline, name, None), nn.Module)), None)
    if name is None:
        raise ModelError("the pipeline has no such network", where=type(pipeline).__name__, allowed=", ".join(names))
    network = getattr(pipeline, name)
    if type(network) is not type(quantized) or _children(network) != _children(quantized):
        raise ModelError(
            "the pipeline holds another network than the one that was quantized",
            where=name,
            got=type(network).__name__,
            allowed=type(quantized).__name__,
            next_step="build the pipeline from the same model and configuration",
        )
    for part, child in quantized.named_children():
        setattr(network, part, child)
    for part, parameter in quantized.named_parameters(recurse=False):
        setattr(network, part, parameter)
    for part, buffer in quantized.named_buffers(recurse=False):
        setattr(network, part, buffer)
    bind(network, promised_output(graph, type(network)), timestep_input)
    return pipeline


def _children(network: nn.Module) -> dict[str, str]:
    """Paths of all linear layers, convolutions and embeddings with their shapes."""
    layers = ((name, module) for name, module in network.named_modules() if isinstance(module, Weighted))
    return {name: str(list(module.weight.shape)) for name, module in layers}


def promised_output(graph: CapturedGraph, cls: type[nn.Module]) -> CapturedGraph:
    """The graph, returning the class that the forward of ``cls`` promises where the captured call returned a tuple."""
    return graph if graph.output_type is not None else replace(graph, output_type=_output_type(cls))


def _output_type(cls: type[nn.Module]) -> OutputType | None:
    """The class that a forward's annotation promises, where the captured call returned a plain tuple."""
    try:
        annotation = typing.get_type_hints(cls.forward).get("return")
    except (NameError, TypeError):
        return None
    for option in typing.get_args(annotation) or (annotation,):
        if inspect.isclass(option) and hasattr(option, "to_tuple"):
            names = tuple(field.name for field in fields(option))  # pyright: ignore[reportArgumentType]
            return OutputType(f"{option.__module__}:{option.__qualname__}", names[:1])
    return None
