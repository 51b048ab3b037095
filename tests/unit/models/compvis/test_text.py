"""The text encoder inside a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compvis_states import random_state, tiny_checkpoint

from quantlab.contracts.sections import Model, Sampling
from quantlab.errors import ModelError
from quantlab.models.compvis.source import CompVisConfig, CompVisSource
from quantlab.models.compvis.text import POSITION_IDS, TRANSFORMER, text_encoder
from quantlab.models.denoiser import DenoiserTask

transformers = pytest.importorskip("transformers")
WIDTH, VOCABULARY = 24, 9
WORDS = ["a</w>", "cat</w>", "a", "c", "t", "t</w>", "ca", "<|startoftext|>", "<|endoftext|>"]


def shapes(layers: int = 2, inner: int = 96) -> dict[str, list[int]]:
    """Of an encoder's tensors, by the names that checkpoints give them."""
    found = {
        "embeddings.token_embedding.weight": [VOCABULARY, WIDTH],
        "embeddings.position_embedding.weight": [77, WIDTH],
    }
    norms = ["final_layer_norm"]
    for layer in range(layers):
        place = f"encoder.layers.{layer}"
        norms += [f"{place}.layer_norm1", f"{place}.layer_norm2"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= {f"{place}.self_attn.{name}.weight": [WIDTH, WIDTH], f"{place}.self_attn.{name}.bias": [WIDTH]}
        found |= {f"{place}.mlp.fc1.weight": [inner, WIDTH], f"{place}.mlp.fc1.bias": [inner]}
        found |= {f"{place}.mlp.fc2.weight": [WIDTH, inner], f"{place}.mlp.fc2.bias": [WIDTH]}
    for name in norms:
        found |= {f"{name}.weight": [WIDTH], f"{name}.bias": [WIDTH]}
    return {f"{TRANSFORMER}text_model.{name}": shape for name, shape in found.items()}


def encoded(state: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Contexts [B, L, D] of tokens [B, L] in float64, written out: pre-norm blocks with causal attention, one head."""
    own = {name.removeprefix(f"{TRANSFORMER}text_model."): value.double() for name, value in state.items()}

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ own[f"{name}.weight"].T + own[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * own[f"{name}.weight"] + own[f"{name}.bias"]

    length = tokens.shape[1]
    x = own["embeddings.token_embedding.weight"][tokens] + own["embeddings.position_embedding.weight"][:length]
    future = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)
    for layer in range(2):
        place = f"encoder.layers.{layer}"
        given = norm(x, f"{place}.layer_norm1")
        q, k, v = (linear(given, f"{place}.self_attn.{name}_proj") for name in "qkv")
        attended = (q @ k.mT / WIDTH**0.5 + future).softmax(-1) @ v
        x = x + linear(attended, f"{place}.self_attn.out_proj")
        hidden = linear(norm(x, f"{place}.layer_norm2"), f"{place}.mlp.fc1")
        x = x + linear(hidden * torch.sigmoid(1.702 * hidden), f"{place}.mlp.fc2")
    return norm(x, "final_layer_norm")


def load(folder: Path) -> tuple[DenoiserTask, dict[str, torch.Tensor]]:
    weights, config = tiny_checkpoint(folder, "text", first_stage="kl")
    state = random_state(shapes())
    whole = torch.load(weights, weights_only=True)["state_dict"] | state | {POSITION_IDS: torch.arange(77)[None]}
    torch.save({"state_dict": whole}, weights)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    (folder / "prompts.txt").write_text("a cat\ncat\n")
    options = CompVisConfig(config=str(config), prompts=str(folder / "prompts.txt"), tokenizer=str(folder))
    model = Model(source="compvis", weights=str(weights))
    source = CompVisSource(options)
    return source.load(model, Sampling(steps=1, guidance=2.0), torch.device("cpu"), torch.float32), state


def test_prompts_are_encoded_by_the_checkpoints_own_encoder(tmp_path: Path) -> None:
    task, state = load(tmp_path)
    tokens = torch.full((3, 77), 8)
    tokens[:, 0] = 7
    tokens[0, 1], tokens[0, 2], tokens[1, 1] = 0, 1, 1
    rows, without = (given["encoder_hidden_states"] for given in (task.conditions.rows, task.conditions.unconditional))
    torch.testing.assert_close(torch.cat([rows, without]).double(), encoded(state, tokens), rtol=1e-4, atol=1e-4)
    assert task.prompts(3) == ["a cat", "cat", "a cat"] and task.labels(3).tolist() == [0, 1, 0]


def test_what_was_encoded_is_not_encoded_again(tmp_path: Path) -> None:
    first, again = load(tmp_path)[0], load(tmp_path)[0]
    (tmp_path / "model.ckpt").unlink()
    with pytest.raises(ModelError):
        first.encode()
    (tmp_path / "kept").mkdir()
    again.use_encoded(load(tmp_path / "kept")[0].encode())
    assert again.conditions.count == 2


def test_a_missing_tokenizer_names_the_files_to_fetch(tmp_path: Path) -> None:
    load(tmp_path)
    (tmp_path / "merges.txt").unlink()
    options = CompVisConfig(
        config=str(tmp_path / "config.yaml"), prompts=str(tmp_path / "prompts.txt"), tokenizer=str(tmp_path)
    )
    model = Model(source="compvis", weights=str(tmp_path / "model.ckpt"))
    with pytest.raises(ModelError, match="not its tokenizer") as error:
        CompVisSource(options).load(model, Sampling(steps=1), torch.device("cpu"), torch.float32)
    assert error.value.got == "without merges.txt"
    assert "vocab.json and merges.txt of openai/clip-vit-large-patch14" in str(error.value)


def test_a_checkpoint_that_holds_another_encoder_or_none_is_refused() -> None:
    state = random_state(shapes())
    with pytest.raises(ModelError, match="no text encoder"):
        text_encoder({}, "model.ckpt")
    del state[f"{TRANSFORMER}text_model.encoder.layers.1.mlp.fc2.bias"]
    with pytest.raises(ModelError, match=r"missing: .*layers.1.mlp.fc2.bias"):
        text_encoder({**state, f"{TRANSFORMER}visual.weight": torch.zeros(1)}, "model.ckpt")
