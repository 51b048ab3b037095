"""SSIM, LPIPS and the CLIP score: values, and what is said when something is not at hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from quantlab.errors import ModelError
from quantlab.evaluation import weights
from quantlab.evaluation.metrics.clip_score import ClipScore, ClipScoreConfig
from quantlab.evaluation.metrics.lpips import Backbone, Lpips, LpipsConfig
from quantlab.evaluation.metrics.ssim import Ssim, SsimConfig, window_for
from quantlab.evaluation.samples import SampleSet


class Images:
    """As much of a task as ``require`` looks at."""

    def __init__(self, side: int, prompts: list[str] | None = None) -> None:
        self.side, self.texts = side, prompts

    def draw_noise(self, count: int, seed: int) -> Tensor:
        return torch.zeros(count, 1, self.side, self.side)

    def prompts(self, count: int) -> list[str] | None:
        return self.texts


def pair(images: Tensor, exact: Tensor, prompts: list[str] | None = None) -> SampleSet:
    some = torch.zeros(len(images), 3)
    return SampleSet(images, some[:, 0].long(), some, some, exact, some, some, prompts=prompts)


def uniform(count: int, side: int, seed: int) -> Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_ssim_of_flat_images_is_its_luminance_term() -> None:
    """Constant images a and b in [0, 1] have no variance: (2 a b + c1) / (a^2 + b^2 + c1), c1 = 0.01^2."""
    a, b = 0.5, 0.75
    samples = pair(torch.full((2, 1, 8, 8), 2 * a - 1), torch.full((2, 1, 8, 8), 2 * b - 1))
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert Ssim(SsimConfig()).compute(samples)["ssim"] == pytest.approx(expected, rel=1e-6)


def gaussian_ssim(x: Tensor, y: Tensor, window: int) -> float:
    """SSIM of two images [H, W] in [0, 1] pixel by pixel, mirrored at the border."""
    half, sigma = window // 2, 1.5 * window / 11
    offsets = range(-half, half + 1)
    weight = {(i, j): math.exp(-(i * i + j * j) / (2 * sigma**2)) for i in offsets for j in offsets}
    total, (height, width) = sum(weight.values()), x.shape

    def mirrored(i: int, n: int) -> int:
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i

    values = []
    for row in range(height):
        for column in range(width):
            moments = [0.0] * 5
            for (i, j), w in weight.items():
                at = mirrored(row + i, height), mirrored(column + j, width)
                p, q = float(x[at]), float(y[at])
                for index, term in enumerate((p, q, p * p, q * q, p * q)):
                    moments[index] += w / total * term
            mx, my, xx, yy, xy = moments
            c1, c2 = 0.01**2, 0.03**2
            top = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
            values.append(top / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2)))
    return sum(values) / len(values)


@pytest.mark.parametrize("window", [None, 3, 7])
def test_ssim_against_its_definition(window: int | None) -> None:
    images, exact = uniform(2, 8, 0), uniform(2, 8, 1) * 0.5
    found = Ssim(SsimConfig(window=window)).compute(pair(images, exact))["ssim"]
    size = window or window_for(8)
    pairs = zip(images.double() / 2 + 0.5, exact.double() / 2 + 0.5, strict=True)
    assert found == pytest.approx(sum(gaussian_ssim(x[0], y[0], size) for x, y in pairs) / 2, rel=1e-6)


def test_the_window_fits_small_images() -> None:
    assert [window_for(side) for side in (4, 8, 16, 20, 32, 512)] == [3, 5, 9, 11, 11, 11]
    assert Ssim(SsimConfig()).compute(pair(uniform(3, 8, 0), uniform(3, 8, 0)))["ssim"] == pytest.approx(1)
    with pytest.raises(ModelError, match="larger than the images"):
        Ssim(SsimConfig(window=11)).require(Images(5))  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="odd"):
        SsimConfig(window=4)


def test_lpips_says_which_file_is_missing_and_never_fetches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("a download"))
    metric = Lpips(LpipsConfig(resize=64))
    for ask in (lambda: metric.require(Images(8)), lambda: metric.compute(pair(uniform(2, 8, 0), uniform(2, 8, 1)))):
        with pytest.raises(ModelError) as caught:
            ask()  # type: ignore[arg-type]
        assert "alexnet-owt-7be5be79.pth" in str(caught.value) and str(tmp_path) in str(caught.value)
    file = tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"something else")
    with pytest.raises(ModelError, match="not the weights") as caught:
        metric.require(Images(8))  # type: ignore[arg-type]
    assert "7be5be79" in str(caught.value)


def test_lpips_with_weights_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights in the place of the smallest backbone's file."""
    from torchvision.models import squeezenet1_1

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / Backbone.SQUEEZE.file
    file.parent.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(squeezenet1_1().state_dict(), file)
    monkeypatch.setattr(weights, "digest_of_file", lambda path: "b8a52dc0" + "0" * 56)
    metric = Lpips(LpipsConfig(backbone=Backbone.SQUEEZE, resize=64))
    images = uniform(3, 8, 0)
    assert metric.compute(pair(images, images))["lpips"] == pytest.approx(0, abs=1e-6)
    near, far = (metric.compute(pair(images, (images + noise).clamp(-1, 1)))["lpips"] for noise in (0.05, 0.8))
    assert 0 < near < far
    with pytest.raises(ModelError, match="too small") as caught:
        Lpips(LpipsConfig(backbone=Backbone.SQUEEZE)).require(Images(16))  # type: ignore[arg-type]
    assert "resize" in str(caught.value)


def test_clip_score_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = ClipScore(ClipScoreConfig(model=str(tmp_path)))
    with pytest.raises(ModelError, match="has none"):
        metric.require(Images(8))  # type: ignore[arg-type]
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install transformers"):
        metric.require(Images(8, ["a cat"]))  # type: ignore[arg-type]
    monkeypatch.setattr(weights, "find_spec", lambda name: object())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        metric.require(Images(8, ["a cat"]))  # type: ignore[arg-type]
    assert "preprocessor_config.json" in str(caught.value) and str(tmp_path) in str(caught.value)


FAKE_TRANSFORMERS = """
import torch
from types import SimpleNamespace


class CLIPModel:
    @classmethod
    def from_pretrained(cls, folder, local_files_only):
        assert local_files_only
        return cls()

    def eval(self):
        return self

    def __call__(self, image_embeds, text_embeds):
        return SimpleNamespace(image_embeds=image_embeds, text_embeds=text_embeds)


class CLIPProcessor(CLIPModel):
    def __call__(self, text, images, **options):
        images = torch.stack(images).float()
        numbers = [[float(number) for number in line.split()] for line in text]
        return {"image_embeds": images.mean((2, 3)), "text_embeds": torch.tensor(numbers)}
"""


def test_clip_score_is_the_mean_of_clamped_cosines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformers.py").write_text(FAKE_TRANSFORMERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "transformers", raising=False)
    white = torch.ones(3, 1, 8, 8)  # embeds as (1, 1, 1), up to its length
    samples = pair(white, white, ["1 1 1", "1 0 0", "-1 -1 -1"])
    expected = (100 + 100 / math.sqrt(3) + 0) / 3
    assert ClipScore(ClipScoreConfig(model=str(tmp_path))).compute(samples)["clip-score"] == pytest.approx(expected)
