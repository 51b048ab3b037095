"""Low-rank adapters: W0 + B A."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from quantlab.contracts.tuning import AdapterSpec, ConvAdapter


class LowRankAdapter(nn.Module):
    """The two factors of a weight's change; the second starts at zero, so the change does too, until ``approximate``.

    Linear: A [rank, in], B [out, rank]. Convolution: A [rank, in / groups, *kernel], and B [out, rank, 1, 1]
    (EfficientDM) or B [out, rank, *kernel] with one product for each kernel tap (released MPQ-DM).
    """

    def __init__(self, weight: Tensor, spec: AdapterSpec, rng: torch.Generator) -> None:
        super().__init__()
        kernel = weight.shape[2:]
        a = torch.empty(spec.rank, weight[0].numel())
        # The start of torch's own linear layers: uniform with bound 1 / sqrt(fan in).
        bound = 1 / math.sqrt(a.shape[1])
        a.uniform_(-bound, bound, generator=rng)
        tail = kernel if spec.conv is ConvAdapter.PER_TAP else (1,) * len(kernel)
        self.A = nn.Parameter(a.view(spec.rank, *weight.shape[1:]).to(weight), requires_grad=False)
        self.B = nn.Parameter(weight.new_zeros(weight.shape[0], spec.rank, *tail), requires_grad=False)

    def approximate(self, change: Tensor) -> None:
        """Start at the product of this rank that is nearest to ``change`` in the weight's shape, in place.

        B = U S^1/2 and A = S^1/2 V^T of its singular value decomposition, of [out, in * kernel] for a pointwise B and
        of [out, in] at each kernel tap otherwise (MPQ-DMv2, arXiv 2507.04290, framework figure; LoftQ, arXiv
        2310.08659). Where the rank exceeds that of the matrix, the rest keeps its start.
        """
        per_tap = self.B.dim() > 2 and self.B[0, 0].numel() > 1
        rows = change.movedim((0, 1), (-2, -1)) if per_tap else change.flatten(1)
        left, values, right = torch.linalg.svd(rows.double(), full_matrices=False)
        rank = min(self.A.shape[0], values.shape[-1])
        root = values[..., :rank].sqrt()
        b, a = left[..., :rank] * root[..., None, :], root[..., None] * right[..., :rank, :]
        if per_tap:
            b, a = b.movedim((-2, -1), (0, 1)), a.movedim((-2, -1), (0, 1))
        with torch.no_grad():
            self.B[:, :rank] = b.reshape(self.B[:, :rank].shape).to(self.B)
            self.A[:rank] = a.reshape(self.A[:rank].shape).to(self.A)

    def delta(self) -> Tensor:
        """The change of the weight, in the weight's shape."""
        if self.B.dim() == 2 or self.B[0, 0].numel() == 1:
            return (self.B.flatten(1) @ self.A.flatten(1)).view(self.B.shape[0], *self.A.shape[1:])
        taps = "hwd"[: self.B.dim() - 2]
        return torch.einsum(f"or{taps},ri{taps}->oi{taps}", self.B, self.A)
