"""Which sites must have one format."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from quantlab.graph.capture import capture
from quantlab.graph.sites import find_sites


def groups(model: nn.Module, **inputs: torch.Tensor) -> list[set[str]]:
    found: dict[str, set[str]] = {}
    for site in find_sites(model.eval(), capture(model, inputs, {})):
        if site.shares:
            found.setdefault(site.shares, set()).add(site.name)
    return list(found.values())


class Attention(nn.Module):
    """Written out; keys and values are of the norm's input where ``cross``."""

    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.cross = cross
        self.norm = nn.LayerNorm(8)
        self.query, self.key, self.value, self.project = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        context = x if self.cross else h
        scores = self.query(h) @ self.key(context).transpose(-1, -2)
        return self.project(scores.softmax(-1) @ self.value(context))


def test_projections_of_one_tensor_share() -> None:
    x = torch.randn(3, 5, 8)
    assert groups(Attention(False), x=x) == [{"query", "key", "value"}]
    assert groups(Attention(True), x=x) == [{"key", "value"}]


def test_projections_of_the_digits_unet(cases) -> None:
    sites = cases("digits").sites
    shared = {name: site.shares for name, site in sites.items() if site.shares}
    assert len(shared) == 12 and {name.rpartition(".")[2] for name in shared} == {"to_q", "to_k", "to_v"}
    assert all(first == name.rpartition(".")[0] + ".to_q" for name, first in shared.items())


class Fire(nn.Module):
    """Two convolutions side by side, joined; a third whose output is changed by another tensor first."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide, self.scaled = (nn.Conv2d(4, 4, size, padding=size // 2) for size in (1, 3, 1))
        self.out = nn.Conv2d(12, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([F.relu(self.narrow(x)), F.relu(self.wide(x)), self.scaled(x) * x], dim=1)
        return self.out(joined)


def test_layers_that_a_concat_joins_share() -> None:
    assert groups(Fire(), x=torch.randn(3, 4, 6, 6)) == [{"narrow", "wide"}]


class Dense(nn.Module):
    """Every layer's output is joined with all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 4)
        self.out = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.first(x)
        b = self.second(a)
        c = self.third(torch.cat([a, b], -1))
        return self.out(torch.cat([b, c], -1))


def test_sets_that_overlap_are_one() -> None:
    assert groups(Dense(), x=torch.randn(3, 4)) == [{"first", "second", "third"}]
