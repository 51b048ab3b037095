"""The contract of a metric, of images or of classes."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from quantlab.contracts.check import check_metric
from quantlab.contracts.model import GenerativeTask
from quantlab.contracts.sections import Model, Sampling
from quantlab.errors import ModelError
from quantlab.evaluation.answers import Answers, ClassMetric
from quantlab.evaluation.samples import ImageMetric, SampleSet
from quantlab.models.builtin import BuiltinConfig, BuiltinSource
from quantlab.testing.contract import Subject, rng


def measures_images(subject: Subject) -> None:
    """One or more named numbers, none of them NaN, the same again, with the images left as they are."""
    metric = _usable(subject)
    if metric is None:
        return
    make = samples_of if isinstance(metric, ImageMetric) else answers_of
    images = make(40)
    copies = {field.name: getattr(images, field.name) for field in fields(images)}
    copies = {name: value.clone() for name, value in copies.items() if isinstance(value, Tensor)}
    values = _compute(subject, metric, images)
    subject.require(not any(math.isnan(v) for v in values.values()), "no value is NaN", str(values))
    touched = [name for name, value in copies.items() if not torch.equal(value, getattr(images, name))]
    subject.require(not touched, "it does not change the samples", ", ".join(touched))
    other = subject.build()
    _compute(subject, other, make(30, 5))
    again = _compute(subject, other, images)
    subject.require(
        again == values, "the same samples give the same numbers: it keeps nothing between calls", str(again)
    )


def says_what_it_looks_at(subject: Subject) -> None:
    """Only a ``paired`` metric looks at the float images of the same noise."""
    metric = _usable(subject)
    if not isinstance(metric, ImageMetric) or metric.paired:
        return
    images = samples_of(40)
    other = replace(images, teacher_images=images.teacher_images.flip(0))
    contract = "a metric that compares with the float image of the same noise says so in `paired`"
    subject.require(_compute(subject, metric, images) == _compute(subject, metric, other), contract, "paired = False")


def samples_of(count: int, seed: int = 0) -> SampleSet:
    """Images and features of noise."""
    draw = rng(seed)
    images = torch.rand(count, 1, 16, 16, generator=draw) * 2 - 1
    noise = 0.1 * torch.randn(images.shape, generator=draw)

    def features(shift: float, size: int = 6) -> Tensor:
        return torch.randn(count, size, generator=draw) + shift

    return SampleSet(
        images=images,
        labels=torch.arange(count) % 10,
        features=features(0.2),
        logits=features(0.0, 10),
        teacher_images=(images + noise).clamp(-1, 1),
        teacher_features=features(0.0),
        reference_features=features(0.1),
        spatial=features(0.0, 8),
        reference_spatial=features(0.1, 8),
        feature_logits=features(0.0, 10),
        prompts=[f"a picture of {index % 10}" for index in range(count)],
    )


def answers_of(count: int, seed: int = 0) -> Answers:
    """Logits of noise, and those of a float network near them."""
    draw = rng(seed)
    logits = torch.randn(count, 10, generator=draw)
    return Answers(logits, torch.arange(count) % 10, logits + 0.3 * torch.randn(count, 10, generator=draw))


def _usable(subject: Subject) -> ImageMetric | ClassMetric | None:
    """The metric, or None where something that it needs is not on this machine."""
    metric: ImageMetric | ClassMetric = subject.build()
    if isinstance(metric, ClassMetric):
        return metric

    def ready() -> bool:
        try:
            metric.require(_task())
        except ModelError:
            return False
        return True

    return metric if subject.call(ready, "`require(task)` returns, or raises ModelError") else None


def _task() -> GenerativeTask:
    source = BuiltinSource(BuiltinConfig())
    task = source.load(Model(name="digits"), Sampling(steps=2), torch.device("cpu"), torch.float32)
    assert isinstance(task, GenerativeTask)
    return task


def _compute(subject: Subject, metric: Any, samples: SampleSet | Answers) -> dict[str, float]:
    contract = "`compute(samples)` returns one or more numbers by name"
    return subject.pure(lambda: check_metric(metric, metric.compute(samples)), contract)


CHECKS = (measures_images, says_what_it_looks_at)
