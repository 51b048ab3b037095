"""What a change of weights does to a network's output: divergence, Fisher information, the Hessian's trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from quantlab.contracts.scores import OutputFamily

MAX_DECIBELS = 300.0
"""Where a noise-to-signal ratio ends on both sides: float64 knows nothing beyond, and sums of scores stay finite."""


def divergence(output: Tensor, reference: Tensor, family: OutputFamily) -> Tensor:
    """Mean over samples of the Kullback-Leibler divergence of ``output`` from ``reference``, a 0-dim tensor.

    A denoiser predicts the mean of a Gaussian, so its divergence is half the squared error over the variance, taken
    as 1. At ``output == reference`` the gradient is 0 and the Hessian is the Fisher information.

    Args:
        output: [B, ...], or logits [B, ..., K].
        reference: the same shape.
        family: what the numbers mean.
    """
    match family:
        case OutputFamily.GAUSSIAN:
            return (output - reference).square().sum() / (2 * len(output))
        case OutputFamily.CATEGORICAL:
            mine, theirs = output.log_softmax(-1), reference.log_softmax(-1)
            return F.kl_div(mine, theirs, reduction="sum", log_target=True) / len(output)


def sampled_loss(output: Tensor, family: OutputFamily, rng: torch.Generator) -> Tensor:
    """Negative log-likelihood of a target that is drawn from the output's own distribution, summed; 0-dim.

    The loss against the float network itself has no gradient at the float network. With targets drawn from the model
    the mean squared gradient is the Fisher information, and no labels are needed.
    """
    match family:
        case OutputFamily.GAUSSIAN:
            noise = torch.randn(output.shape, generator=rng, dtype=output.dtype).to(output.device)
            return (output - (output.detach() + noise)).square().sum() / 2
        case OutputFamily.CATEGORICAL:
            rows = output.flatten(0, -2)
            labels = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=rng).to(output.device)
            return -rows.log_softmax(-1).gather(1, labels).sum()


def noise_to_signal(output: Tensor, reference: Tensor) -> float:
    """10 log10(|output - reference|^2 / |reference|^2) in dB: minus the SQNR, within ``MAX_DECIBELS``."""
    noise = (output - reference).double().square().sum()
    ratio = torch.log10(noise) - torch.log10(reference.double().square().sum())
    # An exact output has no noise whatever the signal, a dead one included.
    return -MAX_DECIBELS if noise == 0 else float((10 * ratio).clamp(-MAX_DECIBELS, MAX_DECIBELS))


def fisher_diagonal(losses: Iterable[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Mean over samples of the squared gradient, for each parameter in its own shape.

    Args:
        losses: of one sample each, 0-dim; consumed one by one.
        parameters: what they depend on.
    """
    totals, count = [torch.zeros_like(parameter) for parameter in parameters], 0
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters)
        for total, gradient in zip(totals, gradients, strict=True):
            total.addcmul_(gradient, gradient)
        count += 1
    return [total / count for total in totals]


def hessian_traces(loss: Tensor, parameters: Sequence[Tensor], probes: int, rng: torch.Generator) -> Tensor:
    """Trace of the Hessian's diagonal block of each parameter, float64 [len(parameters)] (Hutchinson's estimator).

    E[v^T H v] = trace(H) for v of independent signs (HAWQ-V2, arXiv 1911.03852, section 3.1). A vector covers one
    parameter at a time: the blocks between two of them have mean 0, but drown the trace of a small one.

    Args:
        loss: 0-dim, twice differentiable.
        parameters: what it depends on.
        probes: vectors to average over, for each parameter.
        rng: the signs are drawn from it.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    traces = torch.zeros(len(parameters), dtype=torch.float64)
    for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        for _ in range(probes):
            signs = _signs(parameter, rng)
            (product,) = torch.autograd.grad((gradient * signs).sum(), parameter, retain_graph=True)
            traces[index] += (signs * product).double().sum().item()
    return traces / probes


def _signs(like: Tensor, rng: torch.Generator) -> Tensor:
    return (torch.randint(2, like.shape, generator=rng) * 2 - 1).to(like.device, like.dtype)
