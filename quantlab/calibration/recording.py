"""The recorded trajectories as a file: written part by part, read step by step, and told by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from quantlab.calibration.parts import in_parts
from quantlab.calibration.tensor_file import TensorFile, TensorSpec, bytes_of
from quantlab.contracts.model import CalibrationSet, Progress, Run, Task
from quantlab.contracts.sections import Calibrate, RecordedDtype
from quantlab.errors import ModelError, NonFiniteError
from quantlab.store import JSON, atomic_write, digest_of

OUTPUTS = "outputs"
"""The tensor of the predictions in the file; those of the inputs are called ``inputs/NAME``."""


def record(task: Task, run: Run, settings: Calibrate, rng: torch.Generator, progress: Progress, path: Path) -> None:
    """Write what the float network sees and says into a safetensors file, whole or not at all.

    Of the samples, ``settings.batch`` are in memory at once.

    Raises:
        ModelError: the task recorded another number of samples than it was asked for.
        NonFiniteError: a value is beyond half precision.
    """
    total = settings.trajectories if task.available_samples is None else task.available_samples
    total = min(total, settings.trajectories)
    size = settings.batch or total
    parts = [range(start, min(start + size, total)) for start in range(0, total, size)]
    run = in_parts(run, settings.batch)

    def recorded(number: int) -> CalibrationSet:
        samples = parts[number]

        def tell(done: int, steps: int) -> None:
            progress(number * steps + done, len(parts) * steps)

        data = task.calibrate(run, samples, rng, tell)
        # In one part a task may have fewer samples than it was asked for.
        if len(parts) > 1 and data.num_samples != len(samples):
            raise ModelError(
                "the model recorded another number of samples than it was asked for",
                where=f"{type(task).__name__}.calibrate",
                got=data.num_samples,
                allowed=str(len(samples)),
                next_step="have its `available_samples` say how many there are",
            )
        return data

    def write(partial: Path) -> None:
        first = recorded(0)
        layout = _Layout(task, first, total if len(parts) > 1 else first.num_samples, settings.dtype)
        with TensorFile(partial, layout.specs, layout.metadata) as file:
            layout.write(file, first, 0)
            del first  # one part at a time
            for number in range(1, len(parts)):
                layout.write(file, recorded(number), parts[number].start)

    atomic_write(path, write)


class _Layout:
    """What the file holds, from the first part of a recording.

    A tensor that is expanded over the steps is stored for one of them.
    """

    def __init__(self, task: Task, first: CalibrationSet, total: int, dtype: RecordedDtype) -> None:
        self.specs: dict[str, TensorSpec] = {}
        self.metadata: dict[str, str] = {}
        for name, value in _tensors(first).items():
            steps = 1 if _is_constant(value) else value.shape[0]
            on_disk = value.dtype
            # A timestep in half precision would be another timestep.
            if dtype is RecordedDtype.FLOAT16 and value.is_floating_point() and name != f"inputs/{task.timestep_input}":
                on_disk = torch.float16
                self.metadata[name] = str(value.dtype).removeprefix("torch.")
            self.specs[name] = TensorSpec((steps, total, *value.shape[2:]), on_disk)

    def write(self, file: TensorFile, part: CalibrationSet, start: int) -> None:
        """Write the samples of a part, the first of which is number ``start`` of all."""
        for name, value in _tensors(part).items():
            spec = self.specs[name]
            for step in range(spec.shape[0]):
                stored = value[step].to(spec.dtype)
                if stored.dtype != value.dtype and not torch.isfinite(stored).all():
                    raise NonFiniteError(
                        "a recorded value is beyond half precision",
                        where=f"calibrate.dtype, {name}, step {step}",
                        next_step=f"set calibrate.dtype to {RecordedDtype.NETWORK}",
                    )
                file.write(name, stored, (step, start))


def _tensors(data: CalibrationSet) -> dict[str, Tensor]:
    return {f"inputs/{name}": value for name, value in data.inputs.items()} | {OUTPUTS: data.outputs}


def _is_constant(value: Tensor) -> bool:
    """Whether a tensor [S, ...] is one step's, expanded."""
    return value.shape[0] > 1 and value.stride(0) == 0


def load_recording(path: Path, device: torch.device) -> CalibrationSet:
    """What was recorded, mapped into memory: a step is read, and goes to ``device``, when it is asked for."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        dtypes = {name: getattr(torch, dtype) for name, dtype in (file.metadata() or {}).items()}
    outputs = tensors.pop(OUTPUTS)
    inputs = {
        name.removeprefix("inputs/"): value.expand(outputs.shape[0], *value.shape[1:])
        for name, value in tensors.items()
    }
    dtypes = {"" if name == OUTPUTS else name.removeprefix("inputs/"): dtype for name, dtype in dtypes.items()}
    return CalibrationSet(inputs, outputs, dtypes, device)


def provenance(task: Task, data: CalibrationSet, sampling: Mapping[str, JSON], seed: int) -> dict[str, JSON]:
    """What a recording is of, as JSON: the sampler, the timesteps, and a hash of every tensor and of all.

    Args:
        task: that was recorded.
        data: the recording.
        sampling: scheduler, steps, guidance and the like.
        seed: of all noise.
    """
    timesteps = data.inputs[task.timestep_input][:, 0].tolist() if task.timestep_input else None
    tensors: dict[str, JSON] = {}
    for name, value in _tensors(data).items():
        once = value[:1] if _is_constant(value) else value
        tensors[name] = {
            "shape": list(once.shape),
            "dtype": str(once.dtype).removeprefix("torch."),
            "sha256": _hash(once),
        }
    about: dict[str, JSON] = {
        "samples": data.num_samples,
        "source": dict(task.calibration_source(data.num_samples)),
        "sampling": dict(sampling),
        "seed": seed,
        "timesteps": timesteps,
        "tensors": tensors,
    }
    return {**about, "digest": digest_of(about)}


def _hash(value: Tensor) -> str:
    """SHA-256 of a tensor's elements, step by step."""
    digest = hashlib.sha256()
    for step in value:
        digest.update(bytes_of(step))
    return digest.hexdigest()
