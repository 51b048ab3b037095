"""How the models that ship were trained: ``quantlab zoo train NAME`` repeats it, on one thread in float32."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from quantlab.errors import ArtefactError, RecipeError, nearest
from quantlab.store import atomic_write, atomic_write_text
from quantlab.zoo.classifier import train_classifier
from quantlab.zoo.denoiser import Training
from quantlab.zoo.description import DenoiserModel, JudgeModel
from quantlab.zoo.models import DENOISERS, JUDGES, VISION
from quantlab.zoo.vision import VisionModel

Log = Callable[[int, int, float], None]
"""Called with the iteration, the number of iterations and the loss, a running mean where it is a denoiser's."""

LOG_EVERY = 10
"""Iterations of a denoiser after which its loss is noted; a twentieth of a training is a multiple of it."""
KEEP_EVERY = 100
"""Iterations of a denoiser after which its state is written, so that a killed training goes on."""


def _quiet(iteration: int, iterations: int, loss: float) -> None:
    """Says nothing."""


def train(name: str, folder: Path, log: Log = _quiet) -> Path:
    """Train the zoo model ``name`` on one thread and write it to ``folder``; returns the weights' path.

    Raises:
        RecipeError: no zoo model has this name.
        ArtefactError: the folder holds the state of a stopped training that is damaged or had other settings.
    """
    known = {**DENOISERS, **JUDGES, **VISION}
    if name not in known:
        raise RecipeError(f'there is no zoo model "{name}"', allowed=", ".join(known), next_step=nearest(name, known))
    folder.mkdir(parents=True, exist_ok=True)  # before minutes of training, not after
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread makes the sums, and so the weights, the same on every run
    try:
        if name in JUDGES or name in VISION:
            return _train_classifier({**JUDGES, **VISION}[name], folder, log)
        return _train_denoiser(DENOISERS[name], folder, log)
    finally:
        torch.set_num_threads(threads)


def _train_classifier(model: JudgeModel | VisionModel, folder: Path, log: Log) -> Path:
    losses: list[tuple[int, float]] = []

    def keep(iteration: int, iterations: int, loss: float) -> None:
        if _is_logged(iteration, iterations):
            losses.append((iteration, round(loss, 5)))
        log(iteration, iterations, loss)

    start = time.perf_counter()
    lessons = model.data.lessons if isinstance(model, JudgeModel) else model.lessons
    network, accuracy = train_classifier(model.build, lessons, model.settings, keep)
    record = {"test_accuracy": accuracy, "settings": vars(model.settings), "loss": losses}
    return save(network, model.name, folder, record | {"seconds": round(time.perf_counter() - start, 1)})


def _train_denoiser(model: DenoiserModel, folder: Path, log: Log) -> Path:
    training, total = Training(model), model.settings.iterations
    record: dict = {"settings": vars(model.settings), "loss": [], "seconds": 0.0}
    partial = folder / f"{model.name}.partial.pt"
    if partial.exists():
        record = _go_on(training, partial, record["settings"])
    start = time.perf_counter() - record["seconds"]
    while training.iteration < total:
        training.step()
        if training.iteration % LOG_EVERY == 0:
            record["loss"].append((training.iteration, round(training.running, 5)))
        log(training.iteration, total, training.running)
        record["seconds"] = round(time.perf_counter() - start, 1)
        if training.iteration % KEEP_EVERY == 0:
            state = {"training": training.state(), "record": record}
            atomic_write(partial, lambda path, state=state: torch.save(state, path))
    record["loss"] = [entry for entry in record["loss"] if _is_logged(entry[0], total)]
    path = save(training.average, model.name, folder, record)
    partial.unlink(missing_ok=True)
    return path


def _go_on(training: Training, partial: Path, settings: dict[str, object]) -> dict:
    """Put a training where an earlier one was stopped; returns the record up to there."""
    next_step = "delete the file, or give another --output"
    try:
        kept = torch.load(partial, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ArtefactError(
            "the training that was stopped cannot be read", where=str(partial), got=error, next_step=next_step
        ) from error
    if kept["record"]["settings"] != settings:
        raise ArtefactError(
            "the training that was stopped had other settings",
            where=str(partial),
            got=str(kept["record"]["settings"]),
            allowed=str(settings),
            next_step=next_step,
        )
    training.restore(kept["training"])
    return kept["record"]


def _is_logged(iteration: int, iterations: int) -> bool:
    return iteration % max(1, iterations // 20) == 0


def save(model: nn.Module, name: str, folder: Path, record: Mapping[str, object]) -> Path:
    """Write a model as fp16 safetensors with its training record beside it; returns the weights' path."""
    from safetensors.torch import save_file

    path = folder / f"{name}.safetensors"
    state = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    atomic_write(path, lambda partial: save_file(state, partial))
    record = {"name": name, "torch": torch.__version__, **record}
    atomic_write_text(path.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    return path
