"""A recording is the same whole or in parts, is whole or not there, and is known by its hash."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toys import ToyDenoiser, ToyTask, silent

from quantlab.calibration.recording import load_recording, provenance, record
from quantlab.contracts.model import CalibrationSet
from quantlab.contracts.sections import Calibrate, Model, RecordedDtype, Sampling
from quantlab.errors import ModelError, NonFiniteError
from quantlab.models.builtin import BuiltinConfig, BuiltinSource, BuiltinTask
from quantlab.models.module import ModuleTask

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> BuiltinTask:
    source = BuiltinSource(BuiltinConfig())
    return source.load(Model(name="digits"), Sampling(steps=3, guidance=1.5), CPU, torch.float32)


def recorded(task, folder: Path, progress=silent, seed: int = 0, **settings) -> CalibrationSet:
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    rng = torch.Generator().manual_seed(seed)

    def run(inputs):
        output = task.network(**inputs, **task.static)
        return output[0] if isinstance(output, tuple) else output

    record(task, run, Calibrate(**settings), rng, progress, path)
    return load_recording(path, CPU)


def test_parts_of_the_digits_are_the_whole(digits: BuiltinTask, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    whole = recorded(digits, tmp_path, trajectories=7)
    parts = recorded(digits, tmp_path, lambda *done: told.append(done), trajectories=7, batch=3)
    assert whole.num_samples == parts.num_samples == 7
    for name in ("class_labels", "timestep"):
        assert torch.equal(whole.inputs[name], parts.inputs[name])
    assert torch.equal(whole.inputs["sample"][0], parts.inputs["sample"][0]), "the noise is that of the index"
    torch.testing.assert_close(whole.inputs["sample"], parts.inputs["sample"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.outputs, parts.outputs, rtol=1e-4, atol=1e-4)
    assert told[-1] == (9, 9) and told == sorted(told)


def test_a_forward_has_no_more_rows_than_a_part(digits: BuiltinTask, tmp_path: Path) -> None:
    rows: list[int] = []
    handle = digits.network.register_forward_pre_hook(
        lambda module, arguments, inputs: rows.append(len(inputs["sample"])), with_kwargs=True
    )
    recorded(digits, tmp_path, trajectories=4, batch=3)
    handle.remove()
    assert max(rows) == 3, "although guidance doubles the batch"


def test_what_is_the_same_at_every_step_is_stored_once(digits: BuiltinTask, tmp_path: Path) -> None:
    data = recorded(digits, tmp_path, trajectories=4)
    stored = load_file(tmp_path / "0.safetensors")
    assert stored["inputs/class_labels"].shape == (1, 4) and stored["inputs/timestep"].shape == (3, 4)
    assert data.inputs["class_labels"].tolist() == [[0, 1, 2, 3]] * 3
    assert data.step(2, torch.tensor([3, 1]))["class_labels"].tolist() == [3, 1]


def test_half_precision_halves_the_file_and_reads_as_before(digits: BuiltinTask, tmp_path: Path) -> None:
    full = recorded(digits, tmp_path, trajectories=16)
    half = recorded(digits, tmp_path, trajectories=16, dtype=RecordedDtype.FLOAT16)
    before, after = ((tmp_path / f"{index}.safetensors").stat().st_size for index in range(2))
    assert after < 0.56 * before
    step, exact = half.step(1, slice(4)), full.step(1, slice(4))
    assert step["sample"].dtype == torch.float32 and step["timestep"].dtype == torch.int64
    assert torch.equal(step["sample"], exact["sample"].half().float())
    assert torch.equal(half.output(2, slice(4)), full.output(2, slice(4)).half().float())


@dataclass
class Huge(ToyTask):
    """A prediction beyond half precision, and a timestep that half precision cannot tell from its neighbours."""

    size: float = 1.0

    def calibrate(self, run, samples, rng, progress):
        sample = torch.full((2, len(samples), 1, 2, 2), self.size)
        return CalibrationSet({"sample": sample, "timestep": torch.full((2, len(samples)), 968.3)}, sample)


def test_half_precision_spares_the_timestep_and_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    data = recorded(Huge(ToyDenoiser()), tmp_path, trajectories=2, dtype=RecordedDtype.FLOAT16)
    assert data.step(0, slice(None))["timestep"].tolist() == torch.full((2,), 968.3).tolist()
    with pytest.raises(NonFiniteError, match="beyond half precision"):
        recorded(Huge(ToyDenoiser(), size=1e5), tmp_path, trajectories=2, dtype=RecordedDtype.FLOAT16)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_recording_that_is_stopped_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    class Stopped(ToyTask):
        def calibrate(self, run, samples, rng, progress):
            if samples.start > 2:
                raise error
            return super().calibrate(run, samples, rng, progress)

    with pytest.raises(error):
        recorded(Stopped(ToyDenoiser()), tmp_path, trajectories=8, batch=2)
    assert list(tmp_path.iterdir()) == []


def test_a_task_that_runs_out_of_samples_is_told(tmp_path: Path) -> None:
    class Short(ToyTask):
        def calibrate(self, run, samples, rng, progress):
            return super().calibrate(run, range(samples.start, min(samples.stop, 3)), rng, progress)

    assert recorded(Short(ToyDenoiser()), tmp_path, trajectories=8).num_samples == 3
    with pytest.raises(ModelError, match="another number of samples"):
        recorded(Short(ToyDenoiser()), tmp_path, trajectories=8, batch=2)


def test_rows_of_a_module_are_recorded_once_each(tmp_path: Path) -> None:
    rows = torch.arange(40.0).view(10, 4)
    task = ModuleTask(nn.Identity(), [{"input": rows}])
    whole = recorded(task, tmp_path, trajectories=7).outputs[0]
    parts = recorded(task, tmp_path, trajectories=7, batch=3).outputs[0]
    assert sorted(whole[:, 0].tolist()) == sorted(parts[:, 0].tolist())
    every = recorded(task, tmp_path, trajectories=99, batch=4)
    assert sorted(every.outputs[0, :, 0].tolist()) == rows[:, 0].tolist()


def test_provenance_is_known_by_what_was_recorded(digits: BuiltinTask, tmp_path: Path) -> None:
    def about(data: CalibrationSet, guidance: float = 1.5) -> dict:
        return provenance(digits, data, {"scheduler": "ddim", "guidance": guidance}, 0)

    first, again = (about(recorded(digits, tmp_path, trajectories=4)) for _ in range(2))
    assert first == again
    assert first["timesteps"] == [667, 334, 1] and first["samples"] == 4
    assert first["tensors"]["inputs/class_labels"]["shape"] == [1, 4]
    other = about(recorded(digits, tmp_path, trajectories=4, seed=1))
    assert other["tensors"]["inputs/class_labels"] == first["tensors"]["inputs/class_labels"]
    assert other["tensors"]["inputs/sample"] != first["tensors"]["inputs/sample"]
    digests = {
        each["digest"] for each in (first, other, about(recorded(digits, tmp_path, trajectories=4), guidance=2.0))
    }
    assert len(digests) == 3
