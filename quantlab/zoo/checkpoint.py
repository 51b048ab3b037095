"""Reading weights from a file without running anything that it holds."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from quantlab.errors import ModelError

CHECKPOINTS = (".pt", ".pth", ".ckpt")
LEFTOVERS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)
"""What training frameworks put into a checkpoint beside its weights; read as nothing."""


class _Nothing:
    """Stands in for a leftover, so that a checkpoint with one can be read and nothing of it is built or run."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch checkpoint that holds nothing but tensors.

    A checkpoint is a state dict, or a mapping with one under ``state_dict``; it is read with ``weights_only=True``, so
    that code inside it is refused and never run. The counters and callbacks that training leaves beside the state dict
    are passed over.

    Raises:
        ModelError: the file is missing, truncated, of another kind, or would run code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix in CHECKPOINTS:
            with torch.serialization.safe_globals([(_Nothing, name) for name in LEFTOVERS]):
                return _state_dict(torch.load(path, map_location="cpu", weights_only=True), path)
    except (OSError, SafetensorError, EOFError) as error:
        raise ModelError("the weights cannot be read", where=str(path), got=error) from error
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ModelError(
            "this is no checkpoint of plain tensors, and nothing else is unpickled",
            where=str(path),
            got=str(error).splitlines()[0],
            next_step="save its state_dict() as safetensors",
        ) from error
    kinds = ", ".join((".safetensors", *CHECKPOINTS))
    raise ModelError(
        "weights of this kind are not read", where=str(path), got=path.suffix or "no ending", allowed=kinds
    )


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    inner = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(inner, Mapping) or not all(isinstance(value, Tensor) for value in inner.values()):
        raise ModelError("the checkpoint holds no state dict", where=str(path), got=type(inner).__name__)
    return {str(name): value for name, value in inner.items()}


def fill(module: nn.Module, state: Mapping[str, Tensor], path: Path, next_step: str) -> nn.Module:
    """Put weights into a module, in float32 and evaluation mode.

    Raises:
        ModelError: names or shapes are those of another model, or a value is not finite.
    """
    expected = {key: value.shape for key, value in module.state_dict().items()}
    wrong = next((key for key in expected if key not in state or state[key].shape != expected[key]), None)
    if wrong or state.keys() - expected:
        got = f"the first that differs is {wrong or min(state.keys() - expected)}"
        raise ModelError("these are the weights of another model", where=str(path), got=got, next_step=next_step)
    damaged = next((key for key, value in state.items() if not value.isfinite().all()), None)
    if damaged:
        raise ModelError("the weights hold NaN or infinity", where=str(path), got=damaged, next_step=next_step)
    module.load_state_dict({key: value.float() for key, value in state.items()})
    return module.eval().requires_grad_(False)
