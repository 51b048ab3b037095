"""What is multiplied outside the sites, against counts by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from quantlab.graph.capture import capture
from quantlab.graph.sites import find_sites
from quantlab.graph.uncovered import by_reason, find_uncovered, peak_activation_bytes


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3)
        self.up = nn.ConvTranspose1d(6, 5, 2, stride=2)
        self.mix, self.biased = nn.Linear(10, 3), nn.Linear(3, 3)
        self.table = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.line(x), output_size=[12])[..., :10]  # [B, 4, 8] -> [B, 6, 6] -> [B, 5, 10]
        scores = torch.einsum("bij,bkj->bik", y, y)
        mixed = self.mix(torch.baddbmm(y, scores, y))
        mixed = F.linear(mixed, self.biased.weight, self.biased.bias + 1)
        mixed = F.linear(mixed, self.biased.weight * 2)
        return torch.einsum("bij->bji", mixed @ self.table)


def captured(batch: int = 3):
    model = Products().eval()
    return model, capture(model, {"x": torch.randn(batch, 4, 8)}, {})


def test_every_product_is_counted_once_and_has_a_reason() -> None:
    model, graph = captured()
    found = [(entry.where, entry.operation, entry.macs) for entry in find_uncovered(model, graph)]
    assert found == [
        ("up", "ConvTranspose1d", 6 * 6 * 5 * 2),
        ("", "einsum", 5 * 5 * 10),
        ("", "baddbmm", 5 * 10 * 5),
        ("biased", "linear", 5 * 3 * 3),
        ("", "linear", 5 * 3 * 3),
        ("", "matmul", 5 * 3 * 2),
    ]
    reasons = [reason for _, reason in by_reason(find_uncovered(model, graph))]
    assert reasons == [
        "it is told the size of its output",
        "an einsum is no matrix product",
        "it adds a third tensor",
        "it uses a layer's weight with another bias than the layer's",
        "its weight is computed in the forward",
        "one of its operands is a parameter, or not of floats",
    ]
    assert [site.name for site in find_sites(model, graph)] == ["line", "mix"]


def test_torchs_own_attention_layer_is_counted_as_a_whole() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    model = Wrapped().eval()
    (found,) = find_uncovered(model, capture(model, {"x": torch.randn(3, 5, 8)}, {}))
    assert found.macs == 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8 and "opaque" in found.reason


class Chain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([x, x, x], 1)
        return wide.sum(1) + x[:, 0]


def test_the_peak_is_that_of_what_is_alive_together() -> None:
    graph = capture(Chain(), {"x": torch.randn(2, 4, 5)}, {})
    # the input and its threefold copy, then the sum beside both
    assert peak_activation_bytes(graph) == 4 * (20 + 60 + 5)
