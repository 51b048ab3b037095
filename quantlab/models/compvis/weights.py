"""From the tensors of a checkpoint to those of converted modules, with one message for everything that does not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantlab.errors import ModelError

UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
COND_STAGE = "cond_stage_model."
EMA = "model_ema."

_BESIDE = frozenset(
    (
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "lvlb_weights",
        "logvar",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "cond_ids",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "scale_factor",
        "model_ema.decay",
        "model_ema.num_updates",
    )
)
"""Tensors that follow from the config, and counters of training."""
_BESIDE_PREFIXES = (f"{FIRST_STAGE}loss.", f"{FIRST_STAGE}model_ema.")
"""What the first stage was trained with."""
_NAMED = 8
"""So many keys of each kind are named."""


@dataclass(frozen=True)
class Source:
    """Where a tensor of a converted module lies in the checkpoint.

    Attributes:
        key: in the checkpoint.
        rows: which of its rows, in this order; None for all of them.
        of: how many rows it has for each row of the converted tensor.
    """

    key: str
    rows: Tensor | None = None
    of: int = 1

    def misfit(self, tensor: Tensor, shape: torch.Size) -> str | None:
        """How the checkpoint's tensor does not fit, or None; a kernel of 1 may become a linear layer's weight."""
        wanted = (shape[0] * self.of, *shape[1:]) if len(shape) else ()
        given = tuple(tensor.shape)
        if given[: len(wanted)] == wanted and all(size == 1 for size in given[len(wanted) :]):
            return None
        return f"{self.key} {list(given)} instead of {list(wanted)}"

    def take(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """The converted tensor, in float32."""
        rows = tensor if self.rows is None else tensor[self.rows]
        return rows.reshape(shape).float()


@dataclass(frozen=True)
class Part:
    """A converted module without its weights yet.

    Attributes:
        module: its parameters may lie on the meta device.
        sources: of every tensor of its state dict.
        averaged: its weights may have a moving average in the checkpoint, which then counts.
    """

    module: nn.Module
    sources: Mapping[str, Source]
    averaged: bool = False


def fill(parts: Sequence[Part], state: Mapping[str, Tensor], where: str, ignored: Collection[str] = ()) -> None:
    """Put a checkpoint's weights into the modules, in evaluation mode and without gradients.

    Args:
        parts: the modules.
        state: of the checkpoint.
        where: its file, for messages.
        ignored: prefixes of further tensors that are not needed.

    Raises:
        ModelError: tensors are missing, nobody knows them, or their shapes or values are wrong; all are named.
    """
    averages = any(key.startswith(EMA) for key in state)
    missing: list[str] = []
    misfits: list[str] = []
    used = set(_BESIDE)
    for part in parts:
        shapes = {name: value.shape for name, value in part.module.state_dict().items()}
        for name, source in part.sources.items():
            key = average_key(source.key) if averages and part.averaged else source.key
            used |= {key, source.key}
            if key not in state:
                missing.append(key)
            elif misfit := source.misfit(state[key], shapes[name]):
                misfits.append(misfit)
    unknown = [key for key in state if key not in used and not key.startswith((*_BESIDE_PREFIXES, *ignored))]
    broken = [key for key in sorted(used & state.keys() - _BESIDE) if not state[key].isfinite().all()]
    _refuse({"missing": missing, "not known": unknown, "of the wrong shape": misfits, "not finite": broken}, where)
    for part in parts:
        shapes = {name: value.shape for name, value in part.module.state_dict().items()}
        taken = {}
        for name, source in part.sources.items():
            key = average_key(source.key) if averages and part.averaged else source.key
            taken[name] = source.take(state[key], shapes[name])
        part.module.load_state_dict(taken, assign=True)
        part.module.eval().requires_grad_(False)


def average_key(key: str) -> str:
    """Where the moving average of a tensor of the denoiser lies: its name without dots."""
    return EMA + key.removeprefix("model.").replace(".", "")


def _refuse(problems: Mapping[str, Sequence[str]], where: str) -> None:
    lines = []
    for kind, keys in problems.items():
        named = list(dict.fromkeys(keys))
        if named:
            more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
            lines.append(f"{kind}: {', '.join(named[:_NAMED])}{more}")
    if lines:
        raise ModelError(
            "the checkpoint does not fit its config",
            where=where,
            got="; ".join(lines),
            next_step="give the config that the checkpoint was trained with, as model.config",
        )
