"""How far a quantized classifier is from the float one, whatever the truth is."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from quantlab.evaluation.answers import Answers, ClassMetric
from quantlab.evaluation.metrics.fid import NoOptions


class Agreement(ClassMetric):
    """Share of inputs that get the class which the float network gives them."""

    name: ClassVar[str] = "agreement"
    share: ClassVar[bool] = True
    Config = NoOptions

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def values(self, answers: Answers) -> dict[str, Tensor]:
        """``agreement``."""
        return {"agreement": (answers.logits.argmax(1) == answers.float_logits.argmax(1)).double()}


class KlToFloat(ClassMetric):
    """Mean KL divergence of the class distribution from the float network's, in nats; far less noisy than top-1."""

    name: ClassVar[str] = "kl-to-float"
    Config = NoOptions

    def __init__(self, config: NoOptions) -> None:
        self.config = config

    def values(self, answers: Answers) -> dict[str, Tensor]:
        """``kl-to-float``: sum over classes of p (log p - log q), p of the float network."""
        exact, found = answers.float_logits.double().log_softmax(1), answers.logits.double().log_softmax(1)
        return {"kl-to-float": (exact.exp() * (exact - found)).sum(1)}
