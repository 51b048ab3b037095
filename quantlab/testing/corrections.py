"""The contract of a correction of the sampler."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantlab.contracts.check import check_corrected, check_fitted
from quantlab.contracts.correction import Correction, CorrectionData, CorrectionStep
from quantlab.testing.contract import Subject, examples, rng, same

SETTINGS = examples(10)


def corrects_predictions(subject: Subject) -> None:
    """The corrected prediction has the shape and dtype of the one that came, and is finite."""

    @SETTINGS
    @given(st.integers(0, 2**16), st.sampled_from([torch.float32, torch.bfloat16]))
    def holds(seed: int, dtype: torch.dtype) -> None:
        correction = subject.build()
        fitted = _fit(subject, correction, data_of(seed))
        prediction = torch.randn(5, 2, 4, 4, generator=rng(seed)).to(dtype)
        before = prediction.clone()

        def corrected() -> Tensor:
            return check_corrected(correction, prediction, correction.correct(fitted, 1, prediction))

        value = subject.pure(corrected, "`correct` returns the shape and dtype of the prediction, in any batch size")
        subject.require(bool(torch.isfinite(value).all()), "the corrected prediction is finite", value)
        subject.require(same(before, prediction), "it does not change the prediction in place", prediction)

    holds()


def corrects_the_variance(subject: Subject) -> None:
    """The variance of the noise stays finite and not below 0."""

    @SETTINGS
    @given(st.integers(0, 2**16), st.floats(0.01, 1.0), st.floats(0.01, 0.5))
    def holds(seed: int, eta: float, alpha: float) -> None:
        correction = subject.build()
        fitted = _fit(subject, correction, data_of(seed))
        step = CorrectionStep(1, alpha, 1.5 * alpha)
        # Of the noise that DDIM adds (arXiv 2010.02502, equation 16, squared).
        variance = eta**2 * (1 - step.alpha_previous) / (1 - alpha) * (1 - alpha / step.alpha_previous)
        value = subject.call(lambda: correction.variance(fitted, step, variance), "`variance` returns a number")
        ok = isinstance(value, float) and math.isfinite(value) and value >= 0
        subject.require(ok, "`variance` is a finite float, not below 0", repr(value))

    holds()


def keeps_all_in_what_it_stores(subject: Subject) -> None:
    """What ``fit`` returned is all that the other two need: a new correction goes on with it."""
    correction, other = subject.build(), subject.build()
    fitted = _fit(subject, correction, data_of(1))
    _fit(subject, other, data_of(2))
    prediction = torch.randn(3, 2, 4, 4, generator=rng(3))
    expected = correction.correct(fitted, 0, prediction)
    stored = {name: value.detach().clone().contiguous() for name, value in fitted.items()}
    for which in (correction, other, subject.build()):
        value = which.correct(stored, 0, prediction)
        contract = "all that it measured is in what `fit` returned: it keeps nothing in the object"
        subject.require(same(value, expected), contract, f"a difference of {float((value - expected).abs().max()):g}")
    again = _fit(subject, other, data_of(1))
    alike = again.keys() == fitted.keys() and all(same(again[name], fitted[name]) for name in fitted)
    subject.require(alike, "the same data give the same tensors", str(sorted(again)))


def data_of(seed: int) -> CorrectionData:
    """Predictions of three steps, those of the quantized model a little off."""
    exact = torch.randn(3, 4, 2, 4, 4, generator=rng(seed))
    noise = torch.randn(exact.shape, generator=rng(seed + 1))
    return CorrectionData(torch.tensor([901, 451, 1]), exact, 1.1 * exact + 0.05 + 0.1 * noise)


def _fit(subject: Subject, correction: Correction, data: CorrectionData) -> dict[str, Tensor]:
    contract = "`fit` returns what is stored, tensors by name"
    return subject.pure(lambda: check_fitted(correction, correction.fit(data)), contract)


CHECKS = (corrects_predictions, corrects_the_variance, keeps_all_in_what_it_stores)
