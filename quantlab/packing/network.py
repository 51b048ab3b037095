"""How a network is built again without its weights."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantlab.errors import ArtefactError, PackError
from quantlab.graph.bind import ORIGINAL_CLASS
from quantlab.packing.manifest import NetworkRecord
from quantlab.torchvision_shim import ensure_torchvision_imports

_FILLS = frozenset({Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_})


def describe_network(network: nn.Module) -> NetworkRecord | None:
    """Class and configuration of a diffusers model; None for any other module, which the reader has to bring.

    Raises:
        PackError: the configuration holds what JSON cannot.
    """
    cls = getattr(type(network), ORIGINAL_CLASS, type(network))
    if not _is_diffusers_model(cls):
        return None
    config = {name: value for name, value in dict(network.config).items() if not name.startswith("_")}  # type: ignore[arg-type]
    try:
        return NetworkRecord(class_name=cls.__name__, config=json.loads(json.dumps(config)))
    except TypeError as error:
        raise PackError(
            "the configuration of the model cannot be written as JSON", where=cls.__name__, got=error
        ) from error


def build_network(record: NetworkRecord | None, given: nn.Module | None, dtype: torch.dtype) -> nn.Module:
    """The network with weights of no meaning, in evaluation mode.

    Args:
        record: what the file says of it.
        given: a module of the same structure, which is copied, for a file that does not say how to build one.
        dtype: that it computes in.

    Raises:
        ArtefactError: the file names no model class of diffusers, or there is neither a record nor a module.
    """
    if given is not None:
        network = copy.deepcopy(given)
    elif record is None:
        raise ArtefactError(
            "the network is no model of diffusers, so the file cannot build it",
            next_step="pass a module of the same structure: load_quantized(path, network=module)",
        )
    else:
        network = _built(record)
    nn.Module.to(network, dtype=dtype)  # not diffusers' own, which warns about an empty list of modules
    return network.eval().requires_grad_(False)


def _built(record: NetworkRecord) -> nn.Module:
    ensure_torchvision_imports()
    import diffusers

    # Nothing but a public class of this one package: a file must not choose what code is run.
    cls: Any = getattr(diffusers, record.class_name, None) if not record.class_name.startswith("_") else None
    if not (isinstance(cls, type) and _is_diffusers_model(cls)):
        raise ArtefactError(
            "the file names no model class of diffusers",
            got=record.class_name,
            next_step="install a version of diffusers that has it, or distrust the file",
        )
    try:
        with torch.random.fork_rng(devices=[]), _Uninitialized():
            return cls.from_config(record.config)
    except (TypeError, ValueError, KeyError) as error:
        raise ArtefactError("diffusers cannot build the model", where=record.class_name, got=error) from error


class _Uninitialized(TorchFunctionMode):
    """Parameters are made without values inside: the file has them all, and memory that nothing writes is not used."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("tensor")
        fills = getattr(func, "__module__", None) == nn.init.__name__ or func in _FILLS
        return first if fills and isinstance(first, nn.Parameter) else func(*args, **kwargs)


def _is_diffusers_model(cls: type) -> bool:
    """Whether a class is one of diffusers' public models; other modules may have a ``config`` too."""
    if cls.__module__.partition(".")[0] != "diffusers":
        return False
    import diffusers

    return issubclass(cls, diffusers.ModelMixin) and getattr(diffusers, cls.__name__, None) is cls
