"""Converted latent-diffusion networks against the original implementation's outputs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from compvis_states import random_state
from golden import DATA, assert_close
from torch import Tensor, nn

from quantlab.models.compvis.config import KL, VQ, UNetConfig
from quantlab.models.compvis.first_stage import build_first_stage
from quantlab.models.compvis.unet import build_unet
from quantlab.models.compvis.weights import FIRST_STAGE, UNET, Part, fill

RTOL = 1e-5
with np.load(DATA / "compvis.npz") as file:
    ARRAYS = dict(file)
CASES = json.loads(bytes(ARRAYS["cases"]))


def cases(kind: str) -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in CASES if case["kind"] == kind]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def filled(part: Part, shapes: dict[str, list[int]], prefix: str) -> nn.Module:
    fill([part], {prefix + key: value for key, value in random_state(shapes).items()}, "golden")
    return part.module


@pytest.mark.parametrize("case", cases("unet"))
def test_unet(case: dict[str, Any]) -> None:
    config = UNetConfig.model_validate(case["params"])
    network = filled(build_unet(config, 16), case["shapes"], UNET)
    context = {"encoder_hidden_states": drawn(2, 2, 3, config.context_dim)} if config.context_dim else {}
    with torch.no_grad():
        found = network(drawn(1, 2, config.in_channels, 16, 16), torch.tensor([981, 3]), **context).sample
    assert_close(found, torch.from_numpy(ARRAYS[f"unet/{case['name']}"]), rtol=RTOL)


@pytest.mark.parametrize("case", cases("first-stage"))
def test_first_stage(case: dict[str, Any]) -> None:
    kind, name = (VQ, "VQModelInterface") if "n_embed" in case["params"] else (KL, "AutoencoderKL")
    config = kind.model_validate({"target": f"ldm.models.autoencoder.{name}", "params": case["params"]})
    network: Any = filled(build_first_stage(config), case["shapes"], FIRST_STAGE)
    inner = config.params.ddconfig
    with torch.no_grad():
        encoded = network.encode(drawn(1, 1, 3, inner.resolution, inner.resolution))
        encoded = encoded.latents if kind is VQ else encoded.latent_dist.parameters
        decoded = network.decode(drawn(2, 1, config.params.embed_dim, 4, 4)).sample
    for field, found in {"encoded": encoded, "decoded": decoded}.items():
        assert_close(found, torch.from_numpy(ARRAYS[f"first-stage/{case['name']}/{field}"]), rtol=RTOL, what=field)
