"""Metrics of classes against closed forms, and Wilson's interval against SciPy's."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binomtest

from quantlab.evaluation.answers import Answers
from quantlab.evaluation.interval import wilson
from quantlab.evaluation.metrics.agreement import Agreement, KlToFloat
from quantlab.evaluation.metrics.fid import NoOptions
from quantlab.evaluation.metrics.top_k import TopK, TopKConfig

LOGITS = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0], [5.0, 5.0, 5.0]])
EXACT = torch.tensor([[3.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
LABELS = torch.tensor([0, 0, 1, 0])


def answers() -> Answers:
    return Answers(LOGITS, LABELS, EXACT)


@pytest.mark.parametrize("successes", [0, 1, 17, 39, 40])
def test_wilson_is_scipys(successes: int) -> None:
    around = binomtest(successes, 40).proportion_ci(0.95, method="wilson")
    assert wilson(successes, 40) == pytest.approx((around.low, around.high), abs=1e-12)


def test_ties_count_against() -> None:
    """Right, second, tied for second, and all equal: only what is strictly above the third class counts for k = 2."""
    values = TopK(TopKConfig(k=(1, 2))).values(answers())
    assert values["top-1"].tolist() == [1, 0, 0, 0] and values["top-2"].tolist() == [1, 1, 0, 0]


def test_agreement_and_divergence() -> None:
    assert Agreement(NoOptions()).values(answers())["agreement"].tolist() == [1, 0, 1, 1]
    found = KlToFloat(NoOptions()).values(answers())["kl-to-float"]
    p, q = EXACT.double().softmax(1), LOGITS.double().softmax(1)
    assert torch.allclose(found, (p * (p / q).log()).sum(1)) and found[0] == 0


def test_intervals_are_wilsons_of_shares_and_students_of_means() -> None:
    found = Agreement(NoOptions()).intervals(answers())["agreement"]
    assert found == wilson(3, 4)
    divergence = KlToFloat(NoOptions())
    low, high = divergence.intervals(answers())["kl-to-float"]
    assert (low + high) / 2 == pytest.approx(divergence.compute(answers())["kl-to-float"]) and low < high


def test_picked_answers_keep_their_labels() -> None:
    again = answers().pick(torch.tensor([1, 1, 0]))
    assert len(again) == 3 and again.labels.tolist() == [0, 0, 0]
    assert torch.equal(again.logits[2], LOGITS[0]) and torch.equal(again.float_logits[0], EXACT[1])
