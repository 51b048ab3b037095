"""Low-rank branches: a small float product beside a quantized weight, Q(x) Q(R) + x (B A)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantlab.errors import NonFiniteError


class LowRankBranch(nn.Module):
    """The two factors of what is computed in float on the float input; never merged into the weight.

    Linear: A [rank, in], B [out, rank]. Convolution: A [groups * rank, in / groups, *kernel] with the layer's own
    stride and padding, then B [out, rank, 1, 1], both in the layer's groups. Both start at zero. The rank is at most
    that of a group's weight.
    """

    def __init__(self, weight: Tensor, rank: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        rank = min(rank, weight.shape[0] // groups, weight[0].numel())
        ones = (1,) * (weight.dim() - 2)
        self.A = nn.Parameter(weight.new_zeros(groups * rank, *weight.shape[1:]), requires_grad=False)
        self.B = nn.Parameter(weight.new_zeros(weight.shape[0], rank, *ones), requires_grad=False)

    @property
    def rank(self) -> int:
        """Of each group's product."""
        return self.B.shape[1]

    def fit(self, weight: Tensor) -> None:
        """Approximate a weight [out, in / groups, *k] best in the sense of squares, by the SVD of each group's rows.

        Both factors get the square root of the singular values, so that neither leaves float16's range; they are
        rounded to float16, which the product then has in it.

        Raises:
            NonFiniteError: a factor does not fit into float16.
        """
        u, s, v = torch.linalg.svd(
            weight.detach().float().flatten(1).unflatten(0, (self.groups, -1)), full_matrices=False
        )
        root = s[:, : self.rank].sqrt()
        self.B.data = (u[..., : self.rank] * root[:, None]).reshape(self.B.shape).to(self.B)
        self.A.data = (root[..., None] * v[:, : self.rank]).reshape(self.A.shape).to(self.A)
        self.round_factors()

    def round_factors(self) -> None:
        """Put the factors at values that float16 holds, as they are stored and counted.

        Raises:
            NonFiniteError: a factor does not fit into float16.
        """
        for factor in (self.A, self.B):
            rounded = factor.data.half()
            if not torch.isfinite(rounded).all():
                raise NonFiniteError("a low-rank branch does not fit into float16", where="branch")
            factor.data = rounded.to(factor)

    def product(self) -> Tensor:
        """B A in the shape of the weight [out, in / groups, *k]."""
        a = self.A.flatten(1).unflatten(0, (self.groups, -1))
        b = self.B.flatten(1).unflatten(0, (self.groups, -1))
        return (b @ a).reshape(self.B.shape[0], *self.A.shape[1:])
