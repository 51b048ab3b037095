"""compressed-tensors: a folder of safetensors with a quantization_config that its library reads."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quantlab.contracts.quantizer import Quantizer
from quantlab.errors import PackError
from quantlab.packing.backends.integers import InputGrid, NotExecutable, input_grid
from quantlab.packing.coded import CodedWeight, code_weight
from quantlab.packing.exports.packages import require_packages
from quantlab.packing.exports.subject import Subject
from quantlab.packing.manifest import dtype_name
from quantlab.packing.stored import dequantize
from quantlab.quant.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from quantlab.quant.operands import QuantizedOperands
from quantlab.store import atomic_write, atomic_write_json
from quantlab.torchvision_shim import ensure_torchvision_imports

WEIGHTS, CONFIG = "model.safetensors", "config.json"
WEIGHTS_ONLY = "leave out how inputs are quantized: --weights-only, or weights_only=True"
Layer = QuantizedLinear | QuantizedConv2d


@dataclass(frozen=True)
class CompressedSite:
    """How a linear layer lies in the files.

    Attributes:
        site: its path.
        bits: of its channels, the distinct widths.
        stored_bits: of its codes in the file.
        input_bits: of its input's codes; None where the file does not quantize it.
    """

    site: str
    bits: tuple[int, ...]
    stored_bits: int
    input_bits: int | None

    @property
    def rides(self) -> bool:
        """Whether some codes lie in more bits than they have: exact, but no smaller."""
        return self.stored_bits > min(self.bits)


@dataclass(frozen=True)
class CompressedExport:
    """What ``export_compressed_tensors`` wrote.

    Attributes:
        folder: with the weights and the configuration.
        sites: linear layers with packed codes.
        floats: quantized layers held as floats: exactly what they compute with, and as large as before.
    """

    folder: Path
    sites: tuple[CompressedSite, ...]
    floats: tuple[str, ...]

    def __str__(self) -> str:
        size = (self.folder / WEIGHTS).stat().st_size
        riding = sum(site.rides for site in self.sites)
        lines = [f"compressed-tensors in {self.folder}: {size:,} bytes, {len(self.sites)} linear layers packed"]
        if riding:
            lines += [f"{riding} sites hold codes in more bits than they need: exact, and no smaller for it"]
        if self.floats:
            lines += [f"{len(self.floats)} convolutions as floats: exact, and as large as before"]
        return "\n".join(lines)


def export_compressed_tensors(subject: Subject, folder: Path, *, weights_only: bool) -> CompressedExport:
    """Write a quantized network for the library compressed-tensors; the weights it reads back are ours to the bit.

    Its inputs are quantized by round(x / s + z), ours by round(x / s) + z: they differ where x / s is a tie.

    Args:
        subject: the network.
        folder: gets the two files.
        weights_only: leave out how inputs are quantized, and hold convolutions as floats.

    Raises:
        PackError: the format cannot hold a site, or a package is missing.
    """
    require_packages("compressed-tensors", "compressed_tensors")
    ensure_torchvision_imports()
    tensors = _float_tensors(subject.network)
    groups: dict[tuple[int, int | None], list[str]] = defaultdict(list)
    sites, floats, ignored = [], [], []
    for name, module in subject.network.named_modules():
        if isinstance(module, QuantizedOperands) and module.quantizers and not weights_only:
            raise _refusal("quantized operands of a product", name, WEIGHTS_ONLY)
        if isinstance(module, QuantizedLayer) and not isinstance(module, Layer):
            raise _refusal(f"a site of type {type(module).__name__}", name, "keep it float by a line under keep")
        if isinstance(module, nn.Linear | nn.Embedding) and not _is_coded(module):
            ignored.append(name)
        if not isinstance(module, Layer):
            continue
        _require_plain(name, module)
        grid = None if weights_only or module.input_quantizer is None else _input(name, module.input_quantizer)
        if isinstance(module, QuantizedConv2d):
            if not weights_only and (module.weight_quantizer is not None or grid is not None):
                raise _refusal("a quantized convolution", name, f"keep it float, or {WEIGHTS_ONLY}")
            tensors[f"{name}.weight"] = module.quantized_weight().detach().clone()
            floats += [name] if module.weight_quantizer is not None else []
            continue
        if module.weight_quantizer is None:
            if grid is not None:
                raise _refusal("an input with codes beside a float weight", name, WEIGHTS_ONLY)
            tensors[f"{name}.weight"] = module.float_weight().detach().clone()
            continue
        coded = code_weight(name, module)
        width = _width(name, coded)
        found = _packed(name, coded, width)
        tensors |= {f"{name}.{key}": value for key, value in found.items()}
        if grid is not None:
            tensors |= {f"{name}.{key}": value for key, value in _input_tensors(grid).items()}
        input_bits = None if grid is None else _bits_of(grid)
        groups[width, input_bits].append(name)
        sites.append(CompressedSite(name, tuple(sorted(set(coded.bits.tolist()))), width, input_bits))
    if not sites:
        raise PackError(
            "the model has no linear layer with a quantized weight, and the format packs no other",
            next_step="export to onnx, which holds convolutions too",
        )
    config = {**subject.config, "quantization_config": _config(groups, ignored)}
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    atomic_write(folder / WEIGHTS, lambda partial: save_file(contiguous, partial, {"format": "pt"}))
    atomic_write_json(folder / CONFIG, config)  # type: ignore[arg-type]
    return CompressedExport(folder, tuple(sites), tuple(floats))


def _refusal(what: str, site: str, next_step: str) -> PackError:
    return PackError(f"compressed-tensors has no place for {what}", where=site, next_step=next_step)


def _is_coded(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear) and module.weight_quantizer is not None


def _require_plain(name: str, layer: Layer) -> None:
    """Raise PackError for what has no place in the format, beside a weight or after it."""
    if layer.adapter is not None:
        raise PackError("the layer has an adapter that is not merged", where=name)
    if layer.weight.dtype != torch.float32:
        raise _refusal(
            f"weights that are rounded to {dtype_name(layer.weight.dtype)}", name, "load the model in float32"
        )
    other = "export to onnx, or keep the packed file"
    if layer.smoothing is not None:
        raise _refusal("smoothing scales of inputs", name, other)
    if layer.branch is not None:
        raise _refusal("a low-rank branch beside the weight", name, other)


def _input(name: str, quantizer: Quantizer) -> InputGrid:
    try:
        grid = input_grid(quantizer)
    except NotExecutable as reason:
        raise PackError(
            f"compressed-tensors cannot hold this site: {reason}", where=name, next_step=WEIGHTS_ONLY
        ) from reason
    if grid.timesteps is not None:
        raise _refusal("scales by timestep", name, WEIGHTS_ONLY)
    if not 0 <= int(grid.zero_point) <= grid.quant_max:
        raise _refusal(f"a zero point of {int(grid.zero_point)} beyond the codes of an input", name, WEIGHTS_ONLY)
    return grid


def _bits_of(grid: InputGrid) -> int:
    return (grid.quant_max + 1).bit_length() - 1


def _width(name: str, coded: CodedWeight) -> int:
    """The fewest bits that hold all codes and zero points of a layer."""
    if coded.parameters.split:
        raise _refusal("a weight whose parts have scales of their own", name, "export to onnx")
    zero_point = coded.parameters.zero_point
    largest = max(int((2 ** coded.bits.max()) - 1), int(zero_point.max()))
    if int(zero_point.min()) < 0 or largest > 255:
        raise _refusal("a zero point beyond 8 bits", name, "export to onnx")
    return max(1, largest.bit_length())


def _packed(name: str, coded: CodedWeight, width: int) -> dict[str, Tensor]:
    """The tensors of a layer, proved to give our weight when the library unpacks them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationScheme

    half = 2 ** (width - 1)
    codes = (coded.codes.to(torch.int16) - half).to(torch.int8)
    zero_point = (coded.parameters.zero_point.to(torch.int16) - half).to(torch.int8)[:, None]
    tensors = {
        "weight_packed": pack_to_int32(codes, width),
        "weight_scale": coded.parameters.scale[:, None].clone(),
        "weight_zero_point": pack_to_int32(zero_point, width, packed_dim=0),
        "weight_shape": torch.tensor(codes.shape),
    }
    scheme = QuantizationScheme(targets=[name], weights=_weight_arguments(width))
    compressor: Any = BaseCompressor.get_value_from_registry("pack-quantized")
    found = compressor.decompress(tensors, scheme)["weight"]
    if not torch.equal(found, dequantize(coded.codes, coded.parameters, torch.float32)):
        raise PackError("the library reads back another weight than was written", where=name)
    return tensors


def _input_tensors(grid: InputGrid) -> dict[str, Tensor]:
    half = (grid.quant_max + 1) // 2
    return {"input_scale": grid.scale.clone(), "input_zero_point": (grid.zero_point - half).to(torch.int8)}


def _float_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Everything of the network that no quantized layer codes, each tensor with memory of its own."""
    owned = [name for name, module in network.named_modules() if isinstance(module, Layer)]
    kept = {f"{name}.bias" for name in owned}
    prefixes = tuple(f"{name}." for name in owned)
    operands = tuple(f"{name}." for name, module in network.named_modules() if isinstance(module, QuantizedOperands))
    return {
        name: value.detach().clone()
        for name, value in network.state_dict().items()
        if name in kept or not name.startswith(prefixes + operands)
    }


def _weight_arguments(width: int) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy

    return QuantizationArgs(num_bits=width, symmetric=False, strategy=QuantizationStrategy.CHANNEL)


def _config(groups: Mapping[tuple[int, int | None], list[str]], ignored: list[str]) -> dict[str, object]:
    """The ``quantization_config``: a group of layers for each pair of widths."""
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        QuantizationStrategy,
    )

    schemes: dict[str, QuantizationScheme | list[str]] = {}
    for index, ((width, input_bits), names) in enumerate(sorted(groups.items(), key=str)):
        inputs = None
        if input_bits is not None:
            inputs = QuantizationArgs(num_bits=input_bits, symmetric=False, strategy=QuantizationStrategy.TENSOR)
        schemes[f"group_{index}"] = QuantizationScheme(
            targets=names,
            weights=_weight_arguments(width),
            input_activations=inputs,
            format=CompressionFormat.pack_quantized,
        )
    config = QuantizationConfig(
        config_groups=schemes,
        format=CompressionFormat.pack_quantized.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignored,
    )
    return json.loads(config.model_dump_json())
