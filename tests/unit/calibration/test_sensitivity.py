"""Derivatives and divergences against closed forms and exact ones in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from quantlab.calibration.sensitivity import (
    MAX_DECIBELS,
    divergence,
    fisher_diagonal,
    hessian_traces,
    noise_to_signal,
    sampled_loss,
)
from quantlab.contracts.scores import OutputFamily


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_network() -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return network, torch.randn(7, 3, generator=seeded(1), dtype=torch.float64)


@pytest.mark.parametrize("family", list(OutputFamily))
def test_hutchinson_finds_the_trace_of_the_exact_hessian(family: OutputFamily) -> None:
    network, x = tiny_network()
    reference = network(x).detach() + 0.3  # not at the minimum, so that the second derivative of the network counts too
    weights = [network[0].weight, network[2].weight]

    def loss_at(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        parameters = dict(network.named_parameters()) | {"0.weight": first, "2.weight": second}
        return divergence(torch.func.functional_call(network, parameters, (x,)), reference, family)

    exact = torch.autograd.functional.hessian(loss_at, tuple(weight.detach() for weight in weights))
    traces = [exact[i][i].reshape(weight.numel(), -1).trace().item() for i, weight in enumerate(weights)]
    found = hessian_traces(loss_at(*weights), weights, 400, seeded())
    assert found.tolist() == pytest.approx(traces, rel=0.15)


def test_one_probe_is_exact_for_a_diagonal_hessian() -> None:
    first, second = (torch.ones(2, requires_grad=True, dtype=torch.float64) for _ in range(2))
    loss = (first**2).sum() * 3 + (second**4).sum()
    assert hessian_traces(loss, [first, second], 1, seeded()).tolist() == [12.0, 24.0]


def test_fisher_is_the_mean_of_squared_gradients_of_each_sample() -> None:
    network, x = tiny_network()
    targets = torch.randn(7, 2, generator=seeded(2), dtype=torch.float64)
    losses = ((network(x[i : i + 1]) - targets[i]).square().sum() for i in range(7))
    (found,) = fisher_diagonal(losses, [network[0].weight])
    h = torch.tanh(network[0](x))
    residual = 2 * (network(x) - targets)
    by_hand = ((residual @ network[2].weight) * (1 - h**2))[:, :, None] * x[:, None, :]  # [samples, out, in]
    assert torch.allclose(found, by_hand.square().mean(0))


def test_targets_of_the_models_own_give_its_fisher_information() -> None:
    """A linear Gaussian model has E[x_i^2] as the information of w_oi, whatever its weights."""
    layer, x = nn.Linear(3, 2, bias=False).double(), torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)
    rng = seeded()
    losses = (sampled_loss(layer(x), OutputFamily.GAUSSIAN, rng) for _ in range(3000))
    (found,) = fisher_diagonal(losses, [layer.weight])
    assert torch.allclose(found, x.square().expand(2, 3), rtol=0.1)


def test_categorical_information_of_a_bias_is_p_times_1_minus_p() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    rng = seeded()
    losses = (sampled_loss(logits * 1, OutputFamily.CATEGORICAL, rng) for _ in range(3000))
    (found,) = fisher_diagonal(losses, [logits])
    p = logits.detach().softmax(-1)
    assert torch.allclose(found, p * (1 - p), atol=0.02)


def test_divergences_in_closed_form() -> None:
    a, b = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert divergence(a, b, OutputFamily.GAUSSIAN).item() == pytest.approx((1 + 4) / 2 / 2)
    half, skewed = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    # KL of (1/2, 1/2) from the reference (3/4, 1/4).
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert divergence(half, skewed, OutputFamily.CATEGORICAL).item() == pytest.approx(expected)


def test_noise_to_signal_in_closed_form() -> None:
    y = torch.tensor([3.0, 4.0])
    assert noise_to_signal(y + torch.tensor([0.3, 0.4]), y) == pytest.approx(-20, abs=1e-4)
    assert noise_to_signal(torch.zeros(2), y) == pytest.approx(0)
    assert noise_to_signal(y, y) == noise_to_signal(0 * y, 0 * y) == -MAX_DECIBELS
    assert noise_to_signal(y, 0 * y) == MAX_DECIBELS
