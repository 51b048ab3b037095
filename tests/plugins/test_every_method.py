"""Every method goes through the whole engine once, on a network with all that methods look for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab import ModelError, load_registry, quantize
from quantlab.plugins import Kind

ABLATIONS = ("mpq-dm-v2-", "mpq-dm-head", "mpq-dm-tail", "mpq-dm-smooth", "mpq-dm-omq", "mpq-dm-trd", "mpq-dm-plus")
METHODS = sorted(name for name in load_registry().entries(Kind.METHOD) if not name.startswith(ABLATIONS))
"""All but variants that differ from another in one choice, which the tests of fragments compare."""


class Part(nn.Module):
    """A convolution shifted by the time embedding, then attention over the positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.shift = nn.Linear(4, 4)
        self.query, self.key, self.value, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = F.silu(self.conv(x) + self.shift(embedding)[:, :, None, None])
        tokens = x.flatten(2).transpose(1, 2)
        heads = (layer(tokens)[:, None] for layer in (self.query, self.key, self.value))
        attended = self.out(F.scaled_dot_product_attention(*heads)[:, 0])
        return x + attended.transpose(1, 2).unflatten(2, x.shape[2:])


class Small(nn.Module):
    """Two such parts with a skip concatenation before the second."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 4)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.mid_block = Part(4)
        self.parts = nn.ModuleList([Part(8)])
        self.last = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        embedding = F.silu(self.time(timestep.float()[:, None] / 1000))
        first = self.first(sample)
        inner = self.mid_block(first, embedding)
        return self.last(self.parts[0](torch.cat([inner, first], 1), embedding))


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Small().eval()
        return network, [{"sample": torch.randn(4, 1, 4, 4), "timestep": torch.tensor([901, 601, 301, 1])}] * 2


@pytest.mark.parametrize("name", METHODS)
def test_it_quantizes_a_small_network(small, name: str) -> None:
    network, batches = small

    def run() -> Tensor:
        settings = {"corrections": [], "tune": {"rank": 2, "batch": 4, "adapter_learning_rate": 1e-3}}
        found = quantize(network, batches, name, activation_bits=4, samples=8, iterations=2, settings=settings)
        return found.module(**batches[0])

    if not load_registry().method(name).data_free:
        with pytest.raises(ModelError, match="no training data"):
            run()
        return
    expected = network(**batches[0])
    error = (run() - expected).square().mean()
    assert 0 < error < expected.square().mean()
