"""Prompts as the text encoder inside a Stable Diffusion checkpoint encodes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.errors import ModelError
from quantlab.models.compvis.weights import COND_STAGE, Part, Source, fill
from quantlab.torchvision_shim import ensure_torchvision_imports
from quantlab.zoo.checkpoint import read_weights

TRANSFORMER = f"{COND_STAGE}transformer."
TEXT_MODEL = "text_model."
"""Before the names of the encoder's tensors, in checkpoints always, in transformers until its version 5."""
POSITION_IDS = f"{TRANSFORMER}{TEXT_MODEL}embeddings.position_ids"
"""0, 1, ..., which some checkpoints hold."""
TOKENS = 77
"""Of a prompt, as CLIP's tokenizer pads it."""
HEAD_WIDTH = 64
"""Of attention in the text encoders of CLIP, whatever their size (arXiv 2103.00020)."""
TOKENIZER_FILES = ("vocab.json", "merges.txt")
TOKENIZER = "openai/clip-vit-large-patch14"
PROMPTS_AT_ONCE = 8


def require_tokenizer(folder: Path) -> None:
    """Raise ModelError, which names the files to fetch, when a tokenizer's folder lacks one, or transformers is."""
    missing = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            "the checkpoint holds the text encoder and not its tokenizer",
            where=f"model.tokenizer: {folder}",
            got=f"without {', '.join(missing)}",
            next_step=f"fetch {' and '.join(TOKENIZER_FILES)} of {TOKENIZER} and put them there; "
            "nothing is downloaded during a run",
        )
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(
            "prompts are encoded with the package transformers, which is not installed",
            where="model.prompts",
            next_step='pip install "quantlab[text]"',
        ) from error


def encode_prompts(checkpoint: Path, tokenizer: Path, prompts: Sequence[str], device: torch.device) -> Tensor:
    """Contexts [P + 1, 77, D] of the prompts and, last, of the empty one; the encoder is loaded for this and let go.

    Raises:
        ModelError: the checkpoint holds no text encoder, or one that does not fit CLIP's.
    """
    ensure_torchvision_imports()
    from transformers import CLIPTokenizer

    encoder: Any = text_encoder(read_weights(checkpoint), str(checkpoint)).to(device)
    split: Any = CLIPTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    texts = [*prompts, ""]
    found = []
    with torch.no_grad():
        for start in range(0, len(texts), PROMPTS_AT_ONCE):
            part = texts[start : start + PROMPTS_AT_ONCE]
            tokens = split(part, truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt")
            found.append(encoder(input_ids=tokens["input_ids"].to(device)).last_hidden_state.cpu())
    return torch.cat(found)


def text_encoder(state: Mapping[str, Tensor], where: str) -> nn.Module:
    """CLIP's text encoder from a checkpoint's tensors, its sizes from their shapes.

    Raises:
        ModelError: there is none, or its tensors are not those of CLIP's; the message names them.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    own = {key: value for key, value in state.items() if key.startswith(COND_STAGE) and key != POSITION_IDS}
    embeddings = f"{TRANSFORMER}{TEXT_MODEL}embeddings."
    vocabulary = own.get(f"{embeddings}token_embedding.weight")
    positions = own.get(f"{embeddings}position_embedding.weight")
    if vocabulary is None or positions is None:
        raise ModelError(
            "the checkpoint holds no text encoder",
            where=where,
            allowed=f"tensors under {TRANSFORMER}",
            next_step="give the prompts' contexts in place of a tokenizer: model.contexts",
        )
    layers = {int(found[1]) for key in own if (found := re.search(r"encoder\.layers\.(\d+)\.", key))}
    inner = own.get(f"{TRANSFORMER}{TEXT_MODEL}encoder.layers.0.mlp.fc1.weight")
    width = vocabulary.shape[1]
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=4 * width if inner is None else len(inner),
        num_hidden_layers=max(layers, default=0) + 1,
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=len(positions),
        hidden_act="quick_gelu",
        # The ends of a text are found by the tokenizer; these are only within the vocabulary.
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
    )
    encoder = CLIPTextModel(config)
    names = {name: f"{TRANSFORMER}{TEXT_MODEL}{name.removeprefix(TEXT_MODEL)}" for name in encoder.state_dict()}
    fill([Part(encoder, {name: Source(key) for name, key in names.items()})], own, where)
    return encoder
