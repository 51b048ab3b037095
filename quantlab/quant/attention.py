"""Attention with quantizers on the operands of its two products."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from quantlab.quant.operands import QuantizedOperands

QUERY, KEY, VALUE, PROBABILITIES = "query", "key", "value", "probabilities"


class QuantizedAttention(QuantizedOperands):
    """Scaled dot-product attention, written out where something of it is quantized and fused otherwise.

    Its slots are "query", "key", "value" and "probabilities".
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        timestep: Tensor | None = None,
    ) -> Tensor:
        """The arguments of torch's fused attention, [B, H, L, D] and [B, H, S, D], and its result [B, H, L, E].

        ``timestep`` [B] is for per-timestep quantizers.
        """
        if not self.quantizers:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        query, key = self.quantized(QUERY, query, timestep), self.quantized(KEY, key, timestep)
        value = self.quantized(VALUE, value, timestep)
        found = probabilities(query, key, attn_mask, is_causal, scale, enable_gqa)
        found = self.quantized(PROBABILITIES, found, timestep)
        return F.dropout(found, dropout_p) @ _for_every_head(value, query, enable_gqa)

    def operands(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        timestep: Tensor | None = None,
    ) -> Mapping[str, Tensor]:
        """The float tensor of every slot, from the arguments of an attention."""
        found = probabilities(query, key, attn_mask, is_causal, scale, enable_gqa)
        return {QUERY: query, KEY: key, VALUE: value, PROBABILITIES: found}


def probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor:
    """softmax(scale query key^T), masked [B, H, L, S]; the scale is 1 / sqrt(D) when it is not given."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ _for_every_head(key, query, enable_gqa).transpose(-2, -1) * factor
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def _for_every_head(x: Tensor, query: Tensor, enable_gqa: bool) -> Tensor:
    """Heads of key or value repeated for the query heads that share them."""
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) if enable_gqa else x
