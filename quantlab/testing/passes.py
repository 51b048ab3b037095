"""The contract of a smoothing pass."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantlab.contracts.check import check_scales
from quantlab.testing.contract import Subject, devices, examples, same

SETTINGS = examples(50)
MAGNITUDES = st.lists(
    st.tuples(*[st.one_of(st.just(0.0), st.floats(2**-20, 2**20, width=32))] * 2), min_size=1, max_size=12
)


def returns_a_scale_for_each_channel(subject: Subject) -> None:
    """Positive finite scales [in], also of channels that are dead on one side."""

    @SETTINGS
    @given(MAGNITUDES)
    def holds(magnitudes: list[tuple[float, float]]) -> None:
        weight, inputs = (torch.tensor(side) for side in zip(*magnitudes, strict=True))
        smoothing = subject.build()
        scales = _scales(subject, smoothing, weight, inputs)
        contract = "`scales` are positive and finite, one for each input channel, even where all magnitudes are 0"
        subject.call(lambda: check_scales(smoothing, scales, len(weight), ""), contract)

    holds()


def repeats_itself(subject: Subject) -> None:
    """The same magnitudes give the same scales, on every device, and the arguments stay as they are."""
    weight, inputs = torch.tensor([0.5, 2.0, 1e-3]), torch.tensor([8.0, 0.1, 4.0])
    first, second = subject.build(), subject.build()
    expected = _scales(subject, first, weight.clone(), inputs.clone())
    _scales(subject, second, inputs.clone(), weight.clone())
    for smoothing in (first, second):
        again = _scales(subject, smoothing, weight, inputs)
        contract = "the same magnitudes give the same scales: it keeps nothing between calls"
        subject.require(same(again, expected), contract, again)
    untouched = torch.equal(weight, torch.tensor([0.5, 2.0, 1e-3])) and torch.equal(
        inputs, torch.tensor([8.0, 0.1, 4.0])
    )
    subject.require(untouched, "it does not change the magnitudes that it is given", weight)
    for device in devices():
        there = _scales(subject, first, weight.to(device), inputs.to(device))
        subject.require(there.device.type == device, f"scales lie on the device of the magnitudes, {device}", there)


def _scales(subject: Subject, smoothing: object, weight: Tensor, inputs: Tensor) -> Tensor:
    function = smoothing.scales  # type: ignore[attr-defined]
    return subject.pure(lambda: function(weight, inputs), "`scales(weight_absmax, input_absmax)` returns scales")


CHECKS = (returns_a_scale_for_each_channel, repeats_itself)
