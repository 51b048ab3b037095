"""Blocks: parts of a network that are tuned by themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from quantlab.contracts.model import Inputs

TEMPORAL = "temporal"
"""The name of the block of all sites that see the timestep and conditions but not the sample."""

BlockRun = Callable[[Mapping[str, "Tensor"]], Mapping[str, "Tensor"]]
"""A block's forward: from the tensors that enter it to those that leave it, by name."""


class Grouping(StrEnum):
    """Which sites form a block."""

    LAYER = "layer"
    """Each site by itself (AdaRound)."""
    BLOCK = "block"
    """The sites of the innermost list element with several of them, a residual or transformer block (BRECQ); a site
    in no such element by itself."""


@dataclass(frozen=True)
class Partition:
    """How a network is cut into blocks.

    Attributes:
        grouping: which sites form a block.
        temporal_first: the sites that see the timestep and conditions but not the sample form the first block, named
            TEMPORAL, and belong to no other (TFMQ-DM, arXiv 2311.16503).
        inner_outputs: a block also gives the outputs of the sites inside it.
    """

    grouping: Grouping
    temporal_first: bool = False
    inner_outputs: bool = False


@dataclass(frozen=True)
class Border:
    """What crosses the border of a block in one run of the whole network, by name.

    Attributes:
        inputs: the tensors that enter; dimension 0 of most is the batch.
        outputs: the tensors that leave, and the outputs of inner sites where the partition asks for them.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Block:
    """The smallest part of the network that computes some sites and that no path leaves and enters again.

    Both networks give a border tensor the same name; the student may have more inputs, such as the timestep.

    Attributes:
        name: a module path, a site, or TEMPORAL.
        sites: those of its sites that may be trained, in the graph's order.
        outputs: names of the tensors that leave it; what else a forward returns are outputs of inner sites.
        student: the quantized block, with gradients.
        teacher: the float block.
        record_student: the border in a run of the whole quantized network as it is now, without gradients.
        record_teacher: the border in a run of the whole float network, without gradients.
    """

    name: str
    sites: tuple[str, ...]
    outputs: tuple[str, ...]
    student: BlockRun
    teacher: BlockRun
    record_student: Callable[[Inputs], Border]
    record_teacher: Callable[[Inputs], Border]


BlockCutter = Callable[[Partition], tuple[Block, ...]]
"""Cuts both networks into blocks with sites that may be trained, in the graph's order."""
