"""What a block is tuned on: its inputs in the quantized network, its outputs in the float one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlab.calibration.parts import num_rows, row_parts
from quantlab.contracts.block import Block, Border
from quantlab.contracts.model import CalibrationBatch, Inputs
from quantlab.errors import QuantlabError
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


def recorded_in_parts(block: Block, rows: int | None) -> Block:
    """The block with borders that are recorded in forwards of at most ``rows`` rows; None: the block itself."""
    if rows is None:
        return block

    def in_parts(record: Callable[[Inputs], Border]) -> Callable[[Inputs], Border]:
        def whole(inputs: Inputs) -> Border:
            parts = list(row_parts(inputs, rows))
            sizes, borders = [num_rows(part) for part in parts], [record(part) for part in parts]
            seen = ([border.inputs for border in borders], [border.outputs for border in borders])
            return Border(*(_joined(block.name, tensors, sizes) for tensors in seen))

        return whole

    return replace(block, record_student=in_parts(block.record_student), record_teacher=in_parts(block.record_teacher))


def _joined(block: str, parts: Sequence[Mapping[str, Tensor]], sizes: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of all parts of a batch, joined along their rows; a number belongs to every row."""
    found: dict[str, Tensor] = {}
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        if first.dim() and [len(value) for value in values] != list(sizes):
            raise QuantlabError(
                "a tensor at the border of a block has not the batch in dimension 0, so it cannot be recorded in parts",
                where=f"block {block}, {name}",
                got=list(first.shape),
                next_step="leave calibrate.batch out, or choose another grouping",
            )
        found[name] = torch.cat(values) if first.dim() else first
    return found
