"""Files written piece by piece are safetensors files like any other."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from quantlab.calibration.tensor_file import TensorFile, TensorSpec, write_tensors
from quantlab.errors import ArtefactError

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """A few named tensors of all kinds, some without elements or dimensions, some transposed."""
    names = draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=1, unique=True))
    found = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        rng = torch.Generator().manual_seed(draw(st.integers(0, 9)))
        value = torch.randint(-3, 9, shape, generator=rng).to(draw(st.sampled_from(DTYPES)))
        found[name] = value.movedim(0, -1) if shape and draw(st.booleans()) else value
    return found


@settings(max_examples=40, deadline=None)
@given(tensors())
def test_safetensors_reads_what_was_written(values: dict[str, torch.Tensor]) -> None:
    values.pop("__metadata__", None)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file.safetensors"
        write_tensors(path, values, {"iteration": "7"})
        found = load_file(path)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"iteration": "7"}
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.randoms(use_true_random=False))
def test_parts_may_come_in_any_order(steps: int, samples: int, size: int, order) -> None:
    whole = torch.arange(steps * samples * 3).view(steps, samples, 3)
    starts = [(step, start) for step in range(steps) for start in range(0, samples, size)]
    order.shuffle(starts)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file.safetensors"
        with TensorFile(path, {"x": TensorSpec((steps, samples, 3), torch.int64)}) as file:
            for step, start in starts:
                file.write("x", whole[step, start : start + size], (step, start))
        assert torch.equal(load_file(path)["x"], whole)


def test_a_tensor_must_be_written_whole(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtefactError, match="not written whole"),
        TensorFile(tmp_path / "f", {"x": TensorSpec((2, 3), torch.float32)}) as file,
    ):
        file.write("x", torch.zeros(3), (1,))


def test_shared_memory_becomes_two_tensors(tmp_path: Path) -> None:
    value = torch.randn(4, generator=torch.Generator().manual_seed(0))
    write_tensors(tmp_path / "f", {"a": value, "b": value, "c": value[1:3]})
    found = load_file(tmp_path / "f")
    assert torch.equal(found["b"], value) and torch.equal(found["c"], value[1:3])


def test_a_foreign_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no such dtype"):
        write_tensors(tmp_path / "f", {"x": torch.zeros(2, dtype=torch.complex64)})
