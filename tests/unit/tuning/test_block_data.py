"""Borders of blocks that are recorded in parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toys import make_toy, tune_job

from quantlab.contracts.block import Border, Grouping, Partition
from quantlab.errors import QuantlabError
from quantlab.tuning.block_data import BlockData, recorded_in_parts


@pytest.mark.parametrize("rows", [1, 7, 32])
@pytest.mark.parametrize("grouping", list(Grouping))
def test_parts_are_the_whole(grouping: Grouping, rows: int) -> None:
    toy = make_toy()
    job = tune_job(toy, toy.student())
    for block in job.cut(Partition(grouping)):
        assert recorded_in_parts(block, None) is block
        whole = BlockData.record(block, job.batch, with_float_inputs=True)
        parts = BlockData.record(recorded_in_parts(block, rows), job.batch, with_float_inputs=True)
        assert parts.rows == whole.rows == 32
        for name in ("inputs", "float_inputs", "targets"):
            found, expected = getattr(parts, name), getattr(whole, name)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value)


def test_a_border_without_the_batch_first_cannot_be_recorded_in_parts() -> None:
    toy = make_toy()
    job = tune_job(toy, toy.student())
    block = job.cut(Partition(Grouping.BLOCK))[0]

    def record(inputs):
        return Border({"x": inputs["sample"][:, 0].movedim(0, 1), "scale": torch.tensor(2.0)}, {})

    with pytest.raises(QuantlabError, match="not the batch in dimension 0"):
        recorded_in_parts(replace(block, record_student=record), 5).record_student(job.batch.inputs)
