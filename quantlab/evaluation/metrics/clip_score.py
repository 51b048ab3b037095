"""How well images fit the text they were asked for."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from quantlab.contracts.config import Strict
from quantlab.contracts.model import GenerativeTask
from quantlab.errors import ModelError
from quantlab.evaluation.samples import ImageMetric, SampleSet
from quantlab.evaluation.weights import require_package

BATCH = 64
FILES = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
"""What a folder saved by transformers holds besides the weights."""


class ClipScoreConfig(Strict):
    """Options of the CLIP score."""

    model: str = Field(
        "models/clip-vit-base-patch16", description="folder of a CLIP model as transformers saves it, with processor"
    )


class ClipScore(ImageMetric):
    """Agreement of images with their prompts; for tasks that have prompts."""

    name: ClassVar[str] = "clip-score"
    paper: ClassVar[str | None] = "Hessel et al. 2021, arXiv 2104.08718"
    Config = ClipScoreConfig

    def __init__(self, config: ClipScoreConfig) -> None:
        self.config = config

    def require(self, task: GenerativeTask) -> None:
        """Prompts, transformers, and the model's folder."""
        if task.prompts(1) is None:
            raise ModelError(
                "the metric clip-score needs prompts, and this task has none",
                where="evaluate.metrics",
                next_step="leave clip-score out: a class-conditional task has accuracy",
            )
        require_package("transformers", "transformers", "the metric clip-score")
        folder = Path(self.config.model)
        weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
        missing = [name for name in FILES if not (folder / name).is_file()] + ([] if weights else ["model.safetensors"])
        if missing:
            raise ModelError(
                "the metric clip-score needs a CLIP model that is not on this machine",
                where=str(folder),
                got=f"without {', '.join(missing)}",
                next_step="save openai/clip-vit-base-patch16 there with transformers, or name its folder: "
                "clip-score: {model: PATH}; nothing is downloaded during a run",
            )

    def compute(self, samples: SampleSet) -> dict[str, float]:
        """``clip-score``: the mean of max(100 cos, 0) between image and text, 0 to 100."""
        from transformers import CLIPModel, CLIPProcessor  # pyright: ignore[reportMissingImports]

        assert samples.prompts is not None, "require() has looked"
        model = CLIPModel.from_pretrained(self.config.model, local_files_only=True).eval()
        processor = CLIPProcessor.from_pretrained(self.config.model, local_files_only=True)
        pixels = ((samples.images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
        scores = []
        for start in range(0, len(pixels), BATCH):
            part = slice(start, start + BATCH)
            inputs = processor(
                text=list(samples.prompts[part]),
                images=list(pixels[part]),
                return_tensors="pt",  # pyright: ignore[reportCallIssue]
                padding=True,  # pyright: ignore[reportCallIssue]
                truncation=True,  # pyright: ignore[reportCallIssue]
            )
            with torch.no_grad():
                output = model(**inputs)
            cosine = torch.cosine_similarity(output.image_embeds, output.text_embeds)
            scores.append((100 * cosine).clamp(min=0))
        return {"clip-score": torch.cat(scores).double().mean().item()}
