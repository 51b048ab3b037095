"""PTQD's correction against noise that was made by its own formula."""

from __future__ import annotations

import math

import pytest
import torch
from quantlab_ptqd.noise import BiasOf, NoiseCorrection, NoiseCorrectionConfig, calibrated_variance

from quantlab.contracts.correction import CorrectionData, CorrectionStep
from quantlab.errors import RecipeError
from quantlab.recipe.load import load_recipe
from quantlab.stages.correct import fit_corrections

SLOPES = torch.tensor([0.3, 0.05, 0.0]).double()
BIASES = torch.tensor([[0.1, -0.2], [0.0, 0.5], [-1.0, 0.02]]).double()
DEVIATIONS = torch.tensor([0.02, 0.1, 0.0]).double()


def predictions(noisy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Float predictions [3, 64, 2, 4, 4] with channel means, and the same with error k e + b + r."""
    rng = torch.Generator().manual_seed(0)
    exact = torch.randn(3, 64, 2, 4, 4, generator=rng, dtype=torch.float64) + torch.tensor([0.5, -2.0]).view(2, 1, 1)
    residual = torch.randn(exact.shape, generator=rng, dtype=torch.float64)
    flat, other = residual.movedim(2, 1).flatten(2), exact.movedim(2, 1).flatten(2)
    flat = flat - flat.mean(2, keepdim=True)
    other = other - other.mean(2, keepdim=True)
    flat = flat - (flat * other).sum((1, 2)).view(3, 1, 1) / other.square().sum((1, 2)).view(3, 1, 1) * other
    flat = flat / flat.square().mean((1, 2)).sqrt().view(3, 1, 1)  # uncorrelated with e, of mean 0 and variance 1
    residual = flat.view(3, 2, 64, 4, 4).movedim(1, 2) * DEVIATIONS.view(3, 1, 1, 1, 1) * noisy
    return exact, exact + SLOPES.view(3, 1, 1, 1, 1) * exact + BIASES.view(3, 1, 2, 1, 1) + residual


def fit(config: NoiseCorrectionConfig, noisy: bool):
    exact, quantized = predictions(noisy)
    timesteps = torch.tensor([901, 501, 101])
    (fitted,) = fit_corrections([NoiseCorrection(config)], CorrectionData(timesteps, exact, quantized))
    return exact, quantized, fitted


def test_slope_bias_and_residual_are_recovered() -> None:
    _, _, fitted = fit(NoiseCorrectionConfig(), noisy=True)
    torch.testing.assert_close(fitted.tensors["slope"], SLOPES.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(fitted.tensors["bias"], BIASES.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(fitted.tensors["residual_std"], (DEVIATIONS / (1 + SLOPES)).float(), rtol=0, atol=1e-6)


def test_exactly_linear_noise_is_taken_out() -> None:
    exact, quantized, fitted = fit(NoiseCorrectionConfig(), noisy=False)
    for index in range(3):
        restored = fitted.correction.correct(fitted.tensors, index, quantized[index])
        torch.testing.assert_close(restored, exact[index], rtol=0, atol=1e-6)
    assert (quantized - exact).abs().max() > 0.9


def test_the_released_bias_is_the_mean_of_the_whole_error() -> None:
    exact, quantized, fitted = fit(NoiseCorrectionConfig(bias=BiasOf.ERROR), noisy=True)
    expected = (quantized - exact).mean((1, 3, 4))
    torch.testing.assert_close(fitted.tensors["bias"], expected.float(), rtol=0, atol=1e-6)


def test_a_negative_slope_is_none_and_constant_predictions_have_none() -> None:
    exact, _ = predictions(noisy=False)
    timesteps = torch.tensor([901, 501, 101])
    correction = NoiseCorrection(NoiseCorrectionConfig())
    assert correction.fit(CorrectionData(timesteps, exact, 0.5 * exact))["slope"].tolist() == [0, 0, 0]
    constant = torch.ones_like(exact)
    fitted = correction.fit(CorrectionData(timesteps, constant, constant + 0.25))
    assert fitted["slope"].tolist() == [0, 0, 0] and fitted["bias"].tolist() == [[0.25, 0.25]] * 3


def test_a_second_correction_sees_what_the_first_leaves() -> None:
    exact, quantized = predictions(noisy=True)
    twice = [NoiseCorrection(NoiseCorrectionConfig())] * 2
    _, second = fit_corrections(twice, CorrectionData(torch.tensor([901, 501, 101]), exact, quantized))
    torch.testing.assert_close(second.tensors["slope"], torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(second.tensors["bias"], torch.zeros(3, 2), rtol=0, atol=1e-6)


def test_variance_has_the_formulas_limits() -> None:
    assert calibrated_variance(0.5, 0.6, 0.1, 0.0) == 0.1
    assert calibrated_variance(0.5, 0.6, 0.1, 100.0) == 0.0
    factor = math.sqrt(1 - 0.6 - 0.1) - math.sqrt(0.6 * 0.5 / 0.5)
    assert calibrated_variance(0.5, 0.6, 0.1, 0.2) == pytest.approx(0.1 - factor**2 * 0.04)
    step = CorrectionStep(1, 0.5, 0.6)
    fitted = {"residual_std": torch.tensor([0.0, 0.2])}
    kept = NoiseCorrection(NoiseCorrectionConfig(calibrate_variance=False))
    assert kept.variance(fitted, step, 0.1) == 0.1
    assert NoiseCorrection(NoiseCorrectionConfig()).variance(fitted, step, 0.1) < 0.1


def test_a_correction_belongs_to_its_method() -> None:
    loaded = load_recipe("digits/mpq-dm-w2a4", ["method=ptqd", "baselines=[mse]", "corrections=[noise-correction]"])
    from quantlab.recipe.load import for_method

    assert loaded.recipe.corrections[0].options == {"bias": "residual", "calibrate_variance": True}
    assert for_method(loaded, "mse").corrections == ()
    with pytest.raises(RecipeError, match='did you mean "noise-correction"'):
        load_recipe("digits/mpq-dm-w2a4", ["corrections=[noise-corection]"])
