"""The contract of a quantizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantlab.contracts.check import check_quantized
from quantlab.contracts.quant import Observer, PerChannel, PerTensor, QuantSpec
from quantlab.contracts.quantizer import Quantizer
from quantlab.errors import RecipeError
from quantlab.quant.grid import WeightGrid
from quantlab.testing.contract import Subject, devices, examples, rng, same

SETTINGS = examples(12)
SHAPES = st.sampled_from([(4, 6), (5, 3, 3, 3), (1, 8), (3, 1)])
OBSERVERS = st.sampled_from([Observer.MIN_MAX, Observer.MSE])


@dataclass(frozen=True)
class Use:
    """A weight with a scale for each channel, or an input with one scale."""

    spec: QuantSpec
    bits: int | Tensor
    x: Tensor


def weight(shape: tuple[int, ...], observer: Observer, seed: int) -> Use:
    """A weight whose channels have different bits and sizes."""
    sizes = torch.logspace(-2, 1, shape[0]).view(-1, *(1,) * (len(shape) - 1))
    x = torch.randn(shape, generator=rng(seed)) * sizes
    bits = torch.randint(1, 9, shape[:1], generator=rng(seed + 1)).to(torch.int8)
    return Use(QuantSpec(PerChannel(0), observer), bits, x)


def activation(shape: tuple[int, ...], observer: Observer, seed: int) -> Use:
    """An input far from symmetric."""
    bits = int(torch.randint(2, 9, (), generator=rng(seed)))
    return Use(QuantSpec(PerTensor(), observer), bits, torch.randn(shape, generator=rng(seed)).exp() - 0.5)


USES = st.builds(weight, SHAPES, OBSERVERS, st.integers(0, 2**16)) | st.builds(
    activation, SHAPES, OBSERVERS, st.integers(0, 2**16)
)


def quantizes_something(subject: Subject) -> None:
    """It takes weights or inputs, and refuses the other with a RecipeError."""
    uses = (weight((4, 6), Observer.MSE, 0), activation((4, 6), Observer.MSE, 0))
    taken = [use for use in uses if _frozen(subject, use) is not None]
    subject.require(bool(taken), "`from_spec` accepts weights or inputs", "a RecipeError for both")


def keeps_shape_and_dtype(subject: Subject) -> None:
    """Forward returns the shape, dtype and device of its input, all finite."""

    @SETTINGS
    @given(USES, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def holds(use: Use, dtype: torch.dtype) -> None:
        quantizer = _frozen(subject, use)
        if quantizer is None:
            return
        for device in devices():
            x = use.x.to(device, dtype)
            value = _forward(subject, quantizer.to(device), x)
            contract = "forward returns the shape and dtype of its input, all finite"
            subject.call(partial(check_quantized, quantizer, x, value), contract)
            contract = "forward returns a tensor on the device of its input"
            subject.require(value.device.type == device, contract, value)

    holds()


def has_no_more_levels_than_bits(subject: Subject) -> None:
    """A channel of n bits has at most 2^n values."""

    @SETTINGS
    @given(USES)
    def holds(use: Use) -> None:
        quantizer = _frozen(subject, use)
        if quantizer is None:
            return
        value = _forward(subject, quantizer, use.x)
        rows = value.flatten(1) if isinstance(use.bits, Tensor) else value.reshape(1, -1)
        for row, bits in zip(rows, torch.as_tensor(use.bits).reshape(-1), strict=True):
            found, most = len(row.unique()), 2 ** int(bits)
            subject.require(
                found <= most, f"a channel of {int(bits)} bits has at most {most} values", f"{found} values"
            )

    holds()


def is_idempotent(subject: Subject) -> None:
    """What lies on the grid stays: quantizing twice is quantizing once, for a format with scales and zero points."""

    @SETTINGS
    @given(USES)
    def holds(use: Use) -> None:
        quantizer = _frozen(subject, use)
        if quantizer is None or quantizer.qparams() is None:
            return
        once = _forward(subject, quantizer, use.x)
        twice = _forward(subject, quantizer, once)
        contract = "quantizing what is quantized changes nothing"
        subject.require(same(once, twice), contract, f"a difference of {float((once - twice).abs().max()):g}")

    holds()


def lies_on_the_grid_that_it_stores(subject: Subject) -> None:
    """Forward gives scale * (q - zero_point) with codes q in the range that ``qparams`` tells."""

    @SETTINGS
    @given(USES)
    def holds(use: Use) -> None:
        quantizer = _frozen(subject, use)
        parameters = quantizer.qparams() if quantizer is not None else None
        if quantizer is None or parameters is None:
            return
        expected = use.bits.shape if isinstance(use.bits, Tensor) else torch.Size()
        contract = f"`qparams` has one scale and zero point for each channel or one in all, {list(expected)}"
        subject.require(parameters.scale.shape == parameters.zero_point.shape == expected, contract, parameters.scale)
        grid = WeightGrid.of(parameters, use.x.dim())
        value = _forward(subject, quantizer, use.x).double()
        codes = value / grid.scale.double() + grid.zero_point.double()
        off = float((codes - codes.round()).abs().max())
        contract = "forward gives scale * (q - zero_point) with whole q, as `qparams` stores them"
        subject.require(off < 1e-2, contract, f"a code {off:.3f} away from a whole number")
        inside = bool(((codes.round() >= 0) & (codes.round() <= grid.quant_max.double())).all())
        subject.require(inside, "codes lie between quant_min and quant_max", f"codes up to {float(codes.max()):.0f}")

    holds()


def passes_gradients_straight_through(subject: Subject) -> None:
    """The gradient with respect to x is 1 inside the range and 0 beyond it."""

    @SETTINGS
    @given(USES)
    def holds(use: Use) -> None:
        quantizer = _frozen(subject, use)
        if quantizer is None:
            return
        x = (2 * use.x).requires_grad_()
        value = _forward(subject, quantizer, x)
        contract = "the gradient with respect to x is finite and not 0 everywhere"
        (gradient,) = subject.call(lambda: torch.autograd.grad(value.sum(), x), contract)
        subject.require(bool(torch.isfinite(gradient).all() and gradient.any()), contract, gradient)
        parameters = quantizer.qparams()
        if parameters is None:
            return
        grid = WeightGrid.of(parameters, x.dim())
        position = x.detach().double() / grid.scale.double() + grid.zero_point.double()
        top = grid.quant_max.double()
        inside, beyond = (position > 0.01) & (position < top - 0.01), (position < -0.51) | (position > top + 0.51)
        contract = "a straight-through gradient is 1 inside the range and 0 beyond it"
        wrong = (inside & (gradient != 1)) | (beyond & (gradient != 0))
        subject.require(not bool(wrong.any()), contract, f"{gradient[wrong][:4]}")

    holds()


def survives_its_state(subject: Subject) -> None:
    """A new quantizer with the state of an old one computes the same, bit for bit."""

    @SETTINGS
    @given(USES)
    def holds(use: Use) -> None:
        quantizer = _frozen(subject, use)
        if quantizer is None:
            return
        state = {name: value.clone() for name, value in quantizer.state_dict().items()}
        fresh = subject.plugin.from_spec(use.spec, use.bits, subject.config())
        subject.call(lambda: fresh.load_state_dict(state), "its state_dict loads into a new quantizer of the same spec")
        contract = "with the same state it computes the same, bit for bit: all that it needs is in its state_dict"
        value, expected = _forward(subject, fresh, use.x), _forward(subject, quantizer, use.x)
        subject.require(same(value, expected), contract, f"a difference of {float((value - expected).abs().max()):g}")

    holds()


def keeps_nothing_between_lives(subject: Subject) -> None:
    """Two at once do not disturb each other, and observing again forgets what was seen before."""
    uses = [weight((4, 6), Observer.MSE, 1), activation((4, 6), Observer.MSE, 1)]
    for use in uses:
        alone = _frozen(subject, use)
        other, second = make(subject, use.spec, use.bits), make(subject, use.spec, use.bits)
        if alone is None or other is None or second is None:
            continue
        expected = _forward(subject, alone, use.x)

        def at_once(one: Quantizer = other, two: Quantizer = second, x: Tensor = use.x) -> None:
            one.observe(x)
            two.observe(3 * x)
            two.freeze()
            one.freeze()

        contract = "two quantizers at once do not disturb each other: nothing is shared between objects"
        subject.call(at_once, contract)
        subject.require(same(_forward(subject, other, use.x), expected), contract, "other values")
        second.observe(use.x)
        second.freeze()
        contract = "observe and freeze again find parameters for the new values alone"
        subject.require(same(_forward(subject, second, use.x), expected), contract, "other values")


def counts_what_it_stores(subject: Subject) -> None:
    """Floats besides scale, zero point and timesteps are in ``extra_bytes``."""

    @SETTINGS
    @given(USES)
    def holds(use: Use) -> None:
        quantizer = _frozen(subject, use)
        if quantizer is None:
            return
        extra, parameters = quantizer.extra_bytes(), quantizer.qparams()
        subject.require(type(extra) is int and extra >= 0, "`extra_bytes` is a whole number from 0", repr(extra))
        floats = sum(value.numel() for value in quantizer.state_dict().values() if value.is_floating_point())
        channels = torch.as_tensor(use.bits).numel()
        told = channels if parameters is None else parameters.scale.numel() + parameters.zero_point.numel()
        contract = f"`extra_bytes` counts what is stored besides the {told} floats that the accounting knows of"
        subject.require(
            floats <= told or extra > 0, contract, f"{floats} floats in its state_dict, extra_bytes {extra}"
        )

    holds()


def _frozen(subject: Subject, use: Use) -> Quantizer | None:
    """A quantizer that has seen its tensor; None where the class refuses such a tensor."""
    quantizer = make(subject, use.spec, use.bits)
    if quantizer is None:
        return None

    def live() -> Quantizer:
        quantizer.observe(use.x)
        quantizer.freeze()
        return quantizer

    return subject.pure(live, "`observe` takes what passes at its place and `freeze` turns it into parameters")


def _forward(subject: Subject, quantizer: Quantizer, x: Tensor) -> Tensor:
    before = x.detach().clone()
    value = subject.pure(lambda: quantizer(x), "`forward(x)` quantizes and dequantizes x")
    subject.require(same(before, x.detach()), "forward does not change x in place", "another x")
    contract = "the same x gives the same values"
    subject.require(same(value.detach(), quantizer(x).detach()), contract, "other values")
    return value


def make(subject: Subject, spec: QuantSpec, bits: int | Tensor) -> Quantizer | None:
    """A new quantizer, or None where the class refuses the spec with a RecipeError."""

    def build() -> Quantizer | None:
        try:
            return subject.plugin.from_spec(spec, bits, subject.config())
        except RecipeError:
            return None

    return subject.call(build, "`from_spec(spec, bits, config)` returns a quantizer, or refuses with a RecipeError")


CHECKS = (
    quantizes_something,
    keeps_shape_and_dtype,
    has_no_more_levels_than_bits,
    is_idempotent,
    lies_on_the_grid_that_it_stores,
    passes_gradients_straight_through,
    survives_its_state,
    keeps_nothing_between_lives,
    counts_what_it_stores,
)
