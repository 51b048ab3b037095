"""What a block is tuned on: its inputs in the quantized network, its outputs in the float one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.contracts.block import Block
from quantlab.contracts.model import CalibrationBatch
from quantlab.tuning.rounding import mix


@dataclass(frozen=True)
class BlockData:
    """Recorded tensors of M rows.

    Attributes:
        inputs: of the block in the quantized network as it is, by name.
        float_inputs: those that the float network has too, or none.
        targets: outputs of the float network.
        rows: M.
    """

    inputs: Mapping[str, Tensor]
    float_inputs: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    rows: int

    @classmethod
    def record(cls, block: Block, batch: CalibrationBatch, with_float_inputs: bool) -> BlockData:
        """Run both networks on the batch."""
        teacher, student = block.record_teacher(batch.inputs), block.record_student(batch.inputs)
        rows = len(next(iter(batch.inputs.values())))
        return cls(student.inputs, teacher.inputs if with_float_inputs else {}, teacher.outputs, rows)

    def draw(self, size: int, float_share: float, rng: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs and targets of some rows.

        Args:
            size: how many; all of them when there are fewer.
            float_share: probability of an input's element to be the float network's.
            rng: draws both.
        """
        index = torch.randperm(self.rows, generator=rng)[:size]
        inputs = {name: self._take(value, index) for name, value in self.inputs.items()}
        for name, value in self.float_inputs.items():
            if name in inputs and value.is_floating_point():
                inputs[name] = mix(inputs[name], self._take(value, index), float_share, rng)
        return inputs, {name: self._take(value, index) for name, value in self.targets.items()}

    def _take(self, value: Tensor, index: Tensor) -> Tensor:
        """Rows of a tensor with the batch, or several entries a row, in dimension 0; others belong to every row."""
        index = index.to(value.device)
        if value.dim() == 0 or value.shape[0] % self.rows:
            return value
        if value.shape[0] == self.rows:
            return value[index]
        return value.unflatten(0, (self.rows, -1))[index].flatten(0, 1)
