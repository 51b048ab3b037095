"""The contract of a quantizer."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import BaseModel

    from quantlab.contracts.quant import QParams, QuantSpec
    from quantlab.contracts.sections import Pack


class Quantizer(nn.Module):
    """Quantizes one tensor: a weight, or the input of a site.

    Life: ``from_spec``, ``observe`` any number of times, ``freeze``, then ``forward``. To observe and freeze again
    finds parameters for the new values alone. Loading a state dict into a new quantizer of the same spec stands for
    ``observe`` and ``freeze``.
    """

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config: ClassVar[type[BaseModel]]

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: QuantSpec, bits: int | Tensor, config: BaseModel) -> Quantizer:
        """A quantizer without a range yet; ``bits`` is an int, or int8 [out] for a per-channel weight."""

    @abstractmethod
    def observe(self, x: Tensor, timestep: Tensor | None = None) -> None:
        """Take x [B, ...] into account; ``timestep`` [B] is needed by a per-timestep quantizer."""

    @abstractmethod
    def freeze(self) -> None:
        """Turn what was observed into parameters."""

    @abstractmethod
    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Quantize and dequantize: the shape and dtype of x."""

    def choose(self, output_error: Callable[[], float]) -> None:
        """Decide what only the site's output can tell; called once after ``freeze``.

        Args:
            output_error: mean squared error of the site's output against the float one, with this quantizer as it is
                at the call.
        """

    def round_parameters(self) -> None:
        """Put parameters that forward rounds at their rounded values, in place; forward gives the same as before."""

    def store_as(self, settings: Pack) -> None:
        """Put parameters, in place and for good, at values that a file with these settings holds.

        A format that cannot be packed has nothing to do.
        """

    def constrain(self) -> None:
        """Bring parameters back to where they must be, in place; called after every step of an optimizer."""

    @abstractmethod
    def qparams(self) -> QParams | None:
        """What is stored, or None for a format that cannot be packed."""

    def extra_bytes(self) -> int:
        """Bytes stored besides the codes, one float32 scale a channel and what ``qparams`` tells."""
        return 0
