"""ONNX with QuantizeLinear and DequantizeLinear: the graph of a quantized network, weights as integers."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.contracts.quantizer import Quantizer
from quantlab.errors import PackError
from quantlab.graph.modules import first_tensor
from quantlab.packing.backends.integers import NotExecutable, input_grid
from quantlab.packing.coded import code_weight
from quantlab.packing.exports.onnx_modules import OPSET, OnnxWeight, input_module
from quantlab.packing.exports.onnx_types import OnnxInteger
from quantlab.packing.exports.packages import require_packages
from quantlab.packing.exports.subject import Subject
from quantlab.quant.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from quantlab.quant.operands import QuantizedOperands
from quantlab.quant.split import SplitQuantizer
from quantlab.store import atomic_write

MAX_BYTES = 2**31
"""Of one file in the format, which is a protobuf message."""
METADATA = "quantlab"
"""The key of the model's own metadata under which the description stands as JSON."""


@dataclass(frozen=True)
class OnnxSite:
    """How a layer's weight lies in the file.

    Attributes:
        site: its path.
        bits: of its channels, the distinct widths.
        stored_as: the type of its codes, one for each part with scales of its own.
    """

    site: str
    bits: tuple[int, ...]
    stored_as: tuple[OnnxInteger, ...]

    @property
    def rides(self) -> bool:
        """Whether some codes lie in more bits than they have: exact, but no smaller."""
        widths = {OnnxInteger.UINT4: 4, OnnxInteger.UINT8: 8, OnnxInteger.UINT16: 16}
        return any(widths[kind] > min(self.bits) for kind in self.stored_as)


@dataclass(frozen=True)
class OnnxExport:
    """What ``export_onnx`` wrote.

    Attributes:
        path: the file.
        inputs: names of the inputs, with their shapes as exported.
        sites: every layer with a quantized weight.
    """

    path: Path
    inputs: Mapping[str, Sequence[int | str]]
    sites: tuple[OnnxSite, ...]

    def __str__(self) -> str:
        riding = sum(site.rides for site in self.sites)
        kinds = [kind for site in self.sites for kind in site.stored_as]
        counts = ", ".join(f"{kinds.count(kind)} as {kind}" for kind in OnnxInteger if kind in kinds)
        inputs = ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in self.inputs.items())
        lines = [
            f"ONNX, opset {OPSET}, in {self.path}: {self.path.stat().st_size:,} bytes",
            f"inputs: {inputs}",
            f"weights: {counts or 'all float'}",
        ]
        if riding:
            lines += [f"{riding} sites hold codes in wider integers than they need: exact, and no smaller for it"]
        return "\n".join(lines)


def export_onnx(subject: Subject, inputs: Mapping[str, Tensor], path: Path) -> OnnxExport:
    """Write a quantized network as one ONNX file whose numbers are those of the simulation.

    Weights lie as unsigned integers of 4, 8 or 16 bits with a scale and a zero point for each output channel, inputs
    pass through QuantizeLinear and DequantizeLinear, everything else stays float32.

    Args:
        subject: the network with its forward, on the CPU and in float32.
        inputs: of the forward, by name, with at least two samples; the batch stays free where the graph allows it.
        path: the file to write.

    Raises:
        PackError: a package is missing, a quantizer has no integer form in the format, torch cannot translate the
            forward, or the file would be larger than the format allows.
    """
    require_packages("onnx", "onnx", "onnxscript")
    network = copy.deepcopy(subject.network).eval()
    sites = tuple(_put_nodes(network))
    forward = _Forward(network, subject.forward, tuple(inputs))
    program = _exported(forward, tuple(inputs.values()), tuple(inputs))
    _narrow(program.model.graph)
    shapes = {
        value.name: [str(size) if not isinstance(size, int) else size for size in value.shape]
        for value in program.model.graph.inputs
    }
    description = {
        "quantlab": version("quantlab"),
        "method": subject.method,
        "sites": [{"site": site.site, "bits": site.bits, "stored_as": site.stored_as} for site in sites],
        "recipe": subject.recipe,
    }
    program.model.metadata_props[METADATA] = json.dumps(description)
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    if size >= MAX_BYTES:
        raise PackError(
            "the model is too large for one ONNX file",
            got=f"{size:,} bytes",
            allowed=f"{MAX_BYTES:,} bytes",
            next_step="keep the packed file, which has no such limit",
        )
    atomic_write(path, lambda partial: program.save(partial, external_data=False))
    return OnnxExport(path, shapes, sites)


class _Forward(nn.Module):
    """The network as a module that takes tensors in turn and returns the first tensor of its output."""

    def __init__(
        self, network: nn.Module, forward: Callable[[nn.Module, Mapping[str, Tensor]], Any], names: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.network, self.names, self.call = network, names, forward

    def forward(self, *values: Tensor) -> Tensor:
        found = first_tensor(self.call(self.network, dict(zip(self.names, values, strict=True))))
        assert found is not None, "a network returns a tensor"
        return found


def _put_nodes(network: nn.Module) -> list[OnnxSite]:
    """Put modules that compute by nodes of ONNX into the places of weights and quantizers."""
    sites = []
    for path, module in list(network.named_modules()):
        if isinstance(module, QuantizedLinear | QuantizedConv2d):
            if module.weight.dtype != torch.float32 or module.weight.device.type != "cpu":
                raise PackError(
                    "only a network in float32 on the CPU is exported",
                    where=path,
                    got=f"{module.weight.dtype} on {module.weight.device}",
                    next_step="load it again with dtype float32 and device cpu",
                )
            if module.adapter is not None:
                raise PackError("the layer has an adapter that is not merged", where=path)
            if module.weight_quantizer is not None:
                coded = code_weight(path, module)
                module.stored = weight = OnnxWeight(coded, path)
                module.weight_quantizer = None
                module.thaw()
                widths = tuple(sorted(set(coded.bits.tolist())))
                sites.append(OnnxSite(path, widths, tuple(weight.kinds)))
            if module.input_quantizer is not None:
                module.input_quantizer = _input(module.input_quantizer, path)  # type: ignore[assignment]
        elif isinstance(module, QuantizedLayer):
            raise PackError(
                "only linear layers and 2d convolutions are exported",
                where=path,
                got=type(module).__name__,
                next_step="keep the site float by a line under keep",
            )
        elif isinstance(module, QuantizedOperands):
            for slot, quantizer in module.quantizers.items():
                module.quantizers[slot] = _input(quantizer, f"{path}.{slot}")  # type: ignore[arg-type]
    return sites


def _input(quantizer: Quantizer, site: str) -> nn.Module:
    if isinstance(quantizer, SplitQuantizer):
        quantizer.parts = nn.ModuleList(_input(part, site) for part in quantizer.parts)  # type: ignore[arg-type]
        return quantizer
    try:
        return input_module(input_grid(quantizer), site)
    except NotExecutable as reason:
        raise PackError(
            f"ONNX cannot hold this site: {reason}",
            where=site,
            next_step="quantize its input by the quantizer affine, or keep the site float by a line under keep",
        ) from reason


def _exported(forward: nn.Module, values: tuple[Tensor, ...], names: tuple[str, ...]) -> Any:
    """The program that torch's exporter makes, the batch free where the graph allows it."""
    shapes = (tuple({0: torch.export.Dim.AUTO} if value.dim() else None for value in values),)
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                forward,
                values,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(names),
                output_names=["output"],
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as error:  # whatever torch's exporter meets in somebody's forward
        reason = str(error.__cause__ or error).strip().splitlines()
        raise PackError(
            "torch cannot translate the forward of the network to ONNX",
            got=f"{type(error.__cause__ or error).__name__}: {reason[0] if reason else ''}",
            next_step="keep the packed file; quantlab pack RUN",
        ) from error
    finally:
        exporter.setLevel(level)


def _narrow(graph: Any) -> None:
    """Store codes and zero points of weights in 4 bits where these hold them; torch has no such type.

    A tensor may serve several nodes, since the exporter joins equal ones; so each node gets what it needs.
    """
    import onnx_ir

    four_bits = onnx_ir.DataType.UINT4
    made: dict[str, Any] = {}
    for node in graph:
        if node.op_type != "DequantizeLinear" or node.inputs[0].name not in graph.initializers:
            continue
        places = {position: node.inputs[position] for position in (0, 2)}  # codes, zero point
        numbers = {position: value.const_value.numpy() for position, value in places.items()}
        if max(int(found.max()) for found in numbers.values()) > OnnxInteger.UINT4.largest:
            continue
        for position, value in places.items():
            if value.name not in made:
                name, narrow = f"{value.name}.uint4", numbers[position].astype(four_bits.numpy())
                made[value.name] = onnx_ir.Value(
                    name=name,
                    type=onnx_ir.TensorType(four_bits),
                    shape=value.shape,
                    const_value=onnx_ir.Tensor(narrow, dtype=four_bits, name=name),
                )
                graph.register_initializer(made[value.name])
            node.replace_input_with(position, made[value.name])
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
