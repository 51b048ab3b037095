"""What is multiplied outside the sites, against counts by hand."""

from __future__ import annotations

import torch
from torch import nn

from quantlab.graph.capture import capture
from quantlab.graph.uncovered import find_uncovered, peak_activation_bytes


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3)
        self.up = nn.ConvTranspose1d(6, 5, 2)
        self.mix = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.line(x))  # [B, 4, 8] -> [B, 6, 6] -> [B, 5, 7]
        scores = torch.einsum("bij,bkj->bik", y, y)
        mixed = self.mix(torch.bmm(scores, y))
        return torch.einsum("bij->bji", mixed)


def captured(batch: int = 3):
    model = Products().eval()
    return model, capture(model, {"x": torch.randn(batch, 4, 8)}, {})


def test_every_product_is_counted_once() -> None:
    model, graph = captured()
    found = [(entry.where, entry.operation, entry.macs) for entry in find_uncovered(model, graph)]
    assert found == [
        ("line", "Conv1d", 6 * 6 * 4 * 3),
        ("up", "ConvTranspose1d", 6 * 6 * 5 * 2),
        ("", "einsum", 5 * 5 * 7),
        ("", "bmm", 5 * 7 * 5),
    ]


class Chain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([x, x, x], 1)
        return wide.sum(1) + x[:, 0]


def test_the_peak_is_that_of_what_is_alive_together() -> None:
    graph = capture(Chain(), {"x": torch.randn(2, 4, 5)}, {})
    # the input and its threefold copy, then the sum beside both
    assert peak_activation_bytes(graph) == 4 * (20 + 60 + 5)
