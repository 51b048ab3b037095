"""Checkpoints: averages, what does not fit, and what is never run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from compvis_states import checkpoint_state, tiny_config
from safetensors.torch import save_file

from quantlab.errors import ModelError
from quantlab.models.compvis.config import LatentDiffusionParams
from quantlab.models.compvis.convert import build, load
from quantlab.models.compvis.weights import EMA, UNET, average_key


def config_of(name: str = "none", **unet: Any) -> LatentDiffusionParams:
    return LatentDiffusionParams.model_validate(tiny_config(name, **unet)["model"]["params"])


def saved(state: Any, folder: Path, name: str = "model.ckpt") -> Path:
    torch.save(state, folder / name)
    return folder / name


def test_both_kinds_of_file_give_the_same_weights(tmp_path: Path) -> None:
    config = config_of("classes")
    state = checkpoint_state(config)
    save_file(state, tmp_path / "model.safetensors")
    one = load(config, saved({"state_dict": state, "global_step": 7}, tmp_path))
    other = load(config, tmp_path / "model.safetensors")
    for name, value in one.unet.state_dict().items():
        assert torch.equal(value, other.unet.state_dict()[name]), name
    assert one.class_embedder is not None and one.class_embedder.weight.shape == (5, 24)


def test_the_moving_average_counts(tmp_path: Path) -> None:
    config = config_of()
    state = checkpoint_state(config)
    averages = {average_key(key): value + 1 for key, value in state.items() if key.startswith(UNET)}
    counters = {f"{EMA}decay": torch.tensor(0.9999), f"{EMA}num_updates": torch.tensor(3)}
    plain, averaged = load(config, saved(state, tmp_path)), load(config, saved(state | averages | counters, tmp_path))
    for name, value in plain.unet.state_dict().items():
        assert torch.equal(value + 1, averaged.unet.state_dict()[name]), name
    for name, value in plain.first_stage.state_dict().items():
        assert torch.equal(value, averaged.first_stage.state_dict()[name]), name
    missing = average_key(f"{UNET}out.2.weight")
    with pytest.raises(ModelError, match=missing):
        load(config, saved(state | {k: v for k, v in averages.items() if k != missing}, tmp_path))


def test_all_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    config = config_of()
    state = checkpoint_state(config)
    del state[f"{UNET}time_embed.0.bias"]
    state[f"{UNET}input_blocks.9.0.weight"] = torch.zeros(1)
    state[f"{UNET}out.2.weight"] = torch.zeros(3, 64, 3, 3)
    state["first_stage_model.quant_conv.bias"] = torch.full((3,), torch.nan)
    with pytest.raises(ModelError) as error:
        load(config, saved(state, tmp_path))
    assert error.value.got == (
        f"missing: {UNET}time_embed.0.bias; not known: {UNET}input_blocks.9.0.weight; "
        f"of the wrong shape: {UNET}out.2.weight [3, 64, 3, 3] instead of [3, 32, 3, 3]; "
        "not finite: first_stage_model.quant_conv.bias"
    )


def test_another_models_checkpoint_is_told_in_few_words(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"and \d+ more") as error:
        load(config_of("classes"), saved(checkpoint_state(config_of(first_stage="kl")), tmp_path))
    assert len(error.value.message) < 4000


def test_the_schedule_must_be_the_checkpoints(tmp_path: Path) -> None:
    config = config_of()
    other = config.model_copy(update={"linear_end": 0.0155})
    with pytest.raises(ModelError, match="another noise schedule"):
        load(other, saved(checkpoint_state(config), tmp_path))


def test_the_scale_of_latents_comes_from_the_checkpoint(tmp_path: Path) -> None:
    config = config_of(first_stage="kl").model_copy(update={"scale_by_std": True})
    state = checkpoint_state(config)
    assert load(config, saved(state | {"scale_factor": torch.tensor(0.22)}, tmp_path)).scale_factor == pytest.approx(
        0.22
    )
    with pytest.raises(ModelError, match="no scale_factor"):
        load(config, saved(state, tmp_path))


def test_a_text_encoders_weights_are_passed_over(tmp_path: Path) -> None:
    config = config_of("text", first_stage="kl")
    state = checkpoint_state(config) | {"cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.zeros(3)}
    assert load(config, saved(state, tmp_path)).class_embedder is None


def test_transformers_of_linear_layers(tmp_path: Path) -> None:
    by_convolution, by_linear = config_of("classes"), config_of("classes", use_linear_in_transformer=True)
    state = checkpoint_state(by_convolution)
    inputs = {
        "sample": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(1)),
    }
    first = load(by_convolution, saved(state, tmp_path)).unet(**inputs).sample
    flat = {k: v.flatten(1) if ".proj_in.w" in k or ".proj_out.w" in k else v for k, v in state.items()}
    torch.testing.assert_close(load(by_linear, saved(flat, tmp_path)).unet(**inputs).sample, first)


class Planted:
    """What a hostile checkpoint holds."""

    ran = False

    def __reduce__(self) -> Any:
        return (_run, ())


def _run() -> None:
    Planted.ran = True


def test_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing else is unpickled"):
        load(config_of(), saved({"state_dict": checkpoint_state(config_of()), "callbacks": Planted()}, tmp_path))
    assert not Planted.ran


def test_what_training_leaves_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.__dict__["ModelCheckpoint"] = callback
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    left = {"callbacks": {callback: {"best": np.float64(0.25)}}, "epoch": 3}
    assert load(config, saved({"state_dict": checkpoint_state(config), **left}, tmp_path)).scale_factor == 1.0


def test_without_a_checkpoint_there_are_shapes_alone() -> None:
    model = build(config_of("classes"))
    tensors = [*model.unet.state_dict().values(), *model.first_stage.state_dict().values()]
    assert all(tensor.is_meta for tensor in tensors)
