"""Attention with quantized operands against the fused operation and against quantization by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quantlab.contracts.quant import PerTensor, QuantSpec
from quantlab.quant.attention import QuantizedAttention, probabilities
from quantlab.quant.functional import fake_quantize, search_scale
from quantlab.quant.quantizers import AffineConfig, AffineQuantizer


def tensors(heads: int = 4, key_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, 6, 8, generator=rng)
    return query, torch.randn(2, key_heads, 5, 8, generator=rng), torch.randn(2, key_heads, 5, 3, generator=rng)


def quantizer(x: Tensor, bits: int) -> AffineQuantizer:
    made = AffineQuantizer.from_spec(QuantSpec(PerTensor()), bits, AffineConfig())
    made.observe(x)
    made.freeze()
    return made


MASK = torch.arange(30).view(6, 5) % 3 > 0
CASES = {
    "plain": {},
    "scale": {"scale": 0.3},
    "boolean mask": {"attn_mask": MASK},
    "added mask": {"attn_mask": torch.randn(2, 1, 6, 5, generator=torch.Generator().manual_seed(1))},
    "causal": {"is_causal": True},
}


@pytest.mark.parametrize("case", CASES)
def test_written_out_it_is_the_fused_operation(case: str) -> None:
    """Two matrix products and a softmax in float32: a few units of 6e-8 each."""
    query, key, value = tensors()
    fused = F.scaled_dot_product_attention(query, key, value, **CASES[case])
    options = {"mask": None, "is_causal": False, "scale": None, "enable_gqa": False}
    options |= {"mask" if name == "attn_mask" else name: given for name, given in CASES[case].items()}
    written = probabilities(query, key, **options) @ value
    assert (written - fused).abs().max() <= 2e-6 * fused.abs().max()
    assert torch.equal(QuantizedAttention()(query, key, value, **CASES[case]), fused), "fused while all is float"


def test_grouped_queries_share_keys() -> None:
    query, key, value = tensors(heads=4, key_heads=2)
    attention = QuantizedAttention()
    fused = attention(query, key, value, enable_gqa=True)
    attention.quantizers["query"] = torch.nn.Module()
    attention.quantizers["query"].forward = lambda x, timestep: x
    written = attention(query, key, value, enable_gqa=True)
    assert (written - fused).abs().max() <= 2e-6 * fused.abs().max()


def test_four_slots_are_quantized_by_hand() -> None:
    query, key, value = tensors()
    found = QuantizedAttention().operands(query, key, value, MASK)
    bits = {"query": 4, "key": 5, "value": 3, "probabilities": 8}
    attention = QuantizedAttention()
    for slot, x in found.items():
        attention.quantizers[slot] = quantizer(x, bits[slot])

    def by_hand(slot: str, x: Tensor) -> Tensor:
        scale, zero_point = search_scale(found[slot].reshape(1, -1), torch.tensor([bits[slot]]), "mse", 8192)
        return fake_quantize(x, scale[0], zero_point[0], 2 ** bits[slot] - 1)

    scores = by_hand("query", query) @ by_hand("key", key).mT * 8**-0.5
    weights = by_hand("probabilities", scores.masked_fill(~MASK, -torch.inf).softmax(-1))
    expected = weights @ by_hand("value", value)
    assert torch.equal(attention(query, key, value, MASK), expected)
    assert not torch.allclose(expected, F.scaled_dot_product_attention(query, key, value, MASK), atol=1e-2)


def test_gradients_reach_every_operand() -> None:
    given = [x.requires_grad_() for x in tensors()]
    attention = QuantizedAttention()
    for slot, x in QuantizedAttention().operands(*given).items():
        attention.quantizers[slot] = quantizer(x, 8)
    attention(*given).sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in given)
