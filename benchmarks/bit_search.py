"""OMQ: how many channels of a layer move up and down, by the error of its output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.measure import Case
from quantlab.calibration.stats import SiteRecord, TensorSiteData
from quantlab.contracts.allocation import SiteData
from quantlab.contracts.quant import Observer

GROUPS = 5


def cases(quick: bool) -> Iterator[Case]:
    """A linear layer of 1280 at 256 rows, and a convolution of 512 channels at 16x16."""
    rng = torch.Generator().manual_seed(5)
    yield _case(nn.Linear(1280, 1280), torch.randn(256, 1280, generator=rng), "linear 1280, 256 rows")
    if not quick:
        conv, x = nn.Conv2d(512, 512, 3, padding=1), torch.randn(1, 512, 16, 16, generator=rng)
        yield _case(conv, x, "convolution 512, 16x16")


def _case(layer: nn.Linear | nn.Conv2d, x: Tensor, work: str) -> Case:
    record = SiteRecord.of_layer(layer.requires_grad_(False), (x,))
    channels = len(layer.weight)
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(6))
    candidates = []
    for step in range(GROUPS + 1):
        bits = torch.full((channels,), 4, dtype=torch.int8)
        count = step * (channels // 10)
        bits[order[:count]] += 1
        bits[order[channels - count :]] -= 1
        candidates.append(bits)

    def each() -> int:
        return SiteData.best_bits(TensorSiteData({"layer": record}), "layer", candidates, Observer.MIN_MAX, 8)

    def by_channel() -> int:
        return TensorSiteData({"layer": record}).best_bits("layer", candidates, Observer.MIN_MAX, 8)

    def by_gram() -> int:
        return gram_choice(TensorSiteData({"layer": record}), candidates)

    arms = {
        "one product for each candidate": each,
        "errors of channels": by_channel,
        "errors from a Gram matrix": by_gram,
    }
    facts = {name: "same choice" if arm() == each() else "another choice" for name, arm in arms.items()}
    work = f"{work}, {len(candidates)} candidates of 3 widths, 8-bit inputs"
    return Case("OMQ search", work, "one product for each candidate", arms, facts)


def gram_choice(data: TensorSiteData, candidates: Sequence[Tensor]) -> int:
    """The candidate with the least error, from second moments of the quantized inputs: no product for each width.

    With x' the quantized input and D_w = W - Q_w(W), the output's error is W (x - x') + D_w x'. Of its square the sum
    over rows is, for a channel with d of D_w, d G d + 2 d P, up to what all widths share: G = sum x' x'^T and
    P = sum x' (y - W x'). G alone takes n / out of a width's product, n the inputs of a channel.
    """
    record, widths = data._records["layer"], sorted(set(torch.cat(list(candidates)).tolist()))
    weight = data.weight("layer")
    (x,), (y,) = data._inputs_at("layer", 8), data._float_outputs("layer")
    rest = (y - record.compute(x, weight)).movedim(record.channel_dim, -1).flatten(0, -2)
    rows = record.patches(x)[:, 0]
    gram, product = rows.T @ rows, rest.T @ rows
    errors = {}
    for width in widths:
        bits = torch.full((len(weight),), width, dtype=torch.int8)
        change = (weight - data.quantized_weight("layer", bits, Observer.MIN_MAX)).flatten(1)
        errors[width] = (change * (change @ gram + 2 * product)).double().sum(1)
    totals = [sum(float(errors[width][bits == width].sum()) for width in widths) for bits in candidates]
    return totals.index(min(totals))
