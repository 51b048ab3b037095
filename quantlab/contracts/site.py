"""What can be quantized: sites and their slots."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class SiteKind(StrEnum):
    """The operation at a site."""

    CONV = "conv"
    """A convolution in 1, 2 or 3 dimensions."""
    CONV_TRANSPOSE = "conv_transpose"
    """A transposed convolution in 1, 2 or 3 dimensions."""
    LINEAR = "linear"
    EMBEDDING = "embedding"
    """A table whose rows are looked up; it multiplies nothing and has no input that could be quantized."""
    MATMUL = "matmul"
    """A matrix product of two activations outside fused attention."""
    ATTENTION = "attention"
    """Fused attention: two products of activations."""


@dataclass(frozen=True)
class Slot:
    """One quantizable input of a site.

    Attributes:
        name: "input", or for several inputs their role ("query", "input.0", ...).
        shape: the tensor's shape at batch 1 in the captured example.
        call_index: which call of the site in one forward this is; 0 unless a module is called more than once.
    """

    name: str
    shape: tuple[int, ...]
    call_index: int = 0


@dataclass(frozen=True)
class Site:
    """One quantizable operation.

    Attributes:
        name: the module's own path, "up_blocks.0.resnets.1.conv1"; recipe patterns match this.
        kind: what the operation is.
        weight_shape: [out, in / groups, *kernel] whatever layout torch has, [rows, values] of an embedding, or None for
            an operation without a weight.
        macs: multiply-accumulates of one forward at batch 1, all calls together.
        slots: the quantizable inputs.
        tags: roles found from the graph: "first", "last", "time_embed", "modulation", "skip", "attention.query", ...
        block: path of the block that holds the site ("up_blocks.2"), or the site's own name outside any block.
        groups: groups of a convolution.
        split: input channels of each tensor that a skip concatenation before the site joins; () without one.
        shares: sites with the same word here must have one format, so a policy that decides by the site gives them
            equal bits; "" for a site of its own.
    """

    name: str
    kind: SiteKind
    weight_shape: tuple[int, ...] | None
    macs: int
    slots: tuple[Slot, ...]
    tags: frozenset[str] = frozenset()
    block: str = ""
    groups: int = 1
    split: tuple[int, ...] = ()
    shares: str = ""

    @property
    def out_channels(self) -> int:
        """Output channels of the weight; 0 without one."""
        return self.weight_shape[0] if self.weight_shape else 0

    @property
    def has_samples_first(self) -> bool:
        """Whether dimension 0 of every input is the batch, so that each sample may have a scale of its own."""
        return all(slot.shape[:1] == (1,) for slot in self.slots)

    @property
    def weight_count(self) -> int:
        """Number of weights."""
        if not self.weight_shape:
            return 0
        count = 1
        for size in self.weight_shape:
            count *= size
        return count
