"""Folders of diffusers: pipelines and single components, on disk or fetched from the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantlab.errors import ModelError
from quantlab.store import digest_of, digest_of_file
from quantlab.torchvision_shim import ensure_torchvision_imports

INDEX = "model_index.json"
DENOISERS = ("unet", "transformer")
FIRST_STAGES = ("vae", "vqvae")
LIBRARY = "diffusers"


@dataclass(frozen=True)
class Folder:
    """A pipeline's folder, or that of a single component.

    Attributes:
        path: the folder.
        variant: of the weights' files, such as fp16.
    """

    path: Path
    variant: str | None = None

    @cached_property
    def index(self) -> Mapping[str, Any]:
        """The pipeline's components as [library, class] by name; empty for a single component."""
        file = self.path / INDEX
        return json.loads(file.read_text()) if file.is_file() else {}

    def has(self, name: str) -> bool:
        """Whether the pipeline has this component."""
        return bool((self.index.get(name) or [None])[0])

    def denoiser(self, wanted: str | None) -> str | None:
        """The denoiser's name among the components; None for a folder that is a component itself.

        Raises:
            ModelError: the folder is neither, or has no such component.
        """
        if not self.index:
            if (self.path / "config.json").is_file():
                return None
            raise ModelError(
                "this is no folder of diffusers",
                where=str(self.path),
                allowed=f"a folder with {INDEX}, or a component's with config.json",
                next_step="save one with save_pretrained",
            )
        names = [name for name in DENOISERS if self.has(name)]
        if wanted in names or (wanted is None and names):
            return wanted or names[0]
        raise ModelError(
            "the pipeline has no such denoiser" if wanted else "the pipeline has no denoiser",
            where=str(self.path / INDEX),
            got=wanted,
            allowed=", ".join(names or DENOISERS),
        )

    def load_denoiser(self, wanted: str | None, dtype: torch.dtype) -> nn.Module:
        """The denoiser in evaluation mode; raises ModelError for one that cannot be read."""
        name = self.denoiser(wanted)
        if name is not None:
            return self.load(name, dtype)
        config = json.loads((self.path / "config.json").read_text())
        return self._load(config.get("_class_name", ""), None, dtype)

    def load(self, name: str, dtype: torch.dtype) -> nn.Module:
        """One of the pipeline's components that is a module of diffusers, in evaluation mode."""
        library, cls = self.index[name]
        if library != LIBRARY:
            raise ModelError("this component is no module of diffusers", where=name, got=f"{library}.{cls}")
        return self._load(cls, name, dtype)

    def _load(self, cls: str, subfolder: str | None, dtype: torch.dtype) -> nn.Module:
        ensure_torchvision_imports()
        import diffusers

        found = getattr(diffusers, cls, None)
        if found is None:
            raise ModelError("diffusers has no such class", where=str(self.path), got=cls)
        try:
            options = {"subfolder": subfolder} if subfolder else {}
            module = found.from_pretrained(
                self.path, variant=self.variant, torch_dtype=dtype, local_files_only=True, **options
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                "the component cannot be loaded",
                where=str(self.path / (subfolder or "")),
                got=str(error).splitlines()[0],
                next_step="check its files, and model.variant",
            ) from error
        return cast(nn.Module, module).eval()

    def scheduler(self) -> Mapping[str, object]:
        """The configuration of the pipeline's scheduler.

        Raises:
            ModelError: there is none, as for a single component.
        """
        file = self.path / "scheduler" / "scheduler_config.json"
        if not file.is_file():
            raise ModelError(
                "the folder has no scheduler, so nothing can be sampled",
                where=str(self.path),
                next_step=f"give the pipeline's folder, with {INDEX} and scheduler/",
            )
        return json.loads(file.read_text())

    @property
    def first_stage(self) -> str | None:
        """The component that decodes latents; None for a model of pixels."""
        return next((name for name in FIRST_STAGES if self.has(name)), None)

    def pixels_per_latent(self, default: int) -> int:
        """How many pixels a latent stands for along each side; ``default`` without a first stage."""
        if self.first_stage is None:
            return default
        file = self.path / self.first_stage / "config.json"
        return 2 ** (len(json.loads(file.read_text())["block_out_channels"]) - 1)

    def digest(self, *components: str) -> str:
        """Hash of every file of these components; of all files of a single component."""
        roots = [self.path / name for name in components] if self.index else [self.path]
        files = sorted(file for root in roots for file in root.rglob("*") if file.is_file())
        return digest_of({str(file.relative_to(self.path)): digest_of_file(file) for file in files})


def open_folder(name: str, revision: str | None, variant: str | None) -> Folder:
    """The folder of that name, or else the hub's repository of that name at a revision.

    Raises:
        ModelError: the name is neither a folder nor a repository that can be reached.
    """
    path = Path(name)
    if path.is_dir():
        return Folder(path, variant)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", f"*.{variant}.safetensors" if variant else "*.safetensors"]
    ignored = [] if variant else ["*.fp16.safetensors", "*.non_ema.safetensors"]
    try:
        # Weights at the top level are the same model in one file; components lie in folders.
        found = snapshot_download(
            name, revision=revision, allow_patterns=[p if p == "*.json" else f"*/{p}" for p in patterns],
            ignore_patterns=ignored,
        )  # fmt: skip
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            "this is no folder here, and the hub has no such repository or cannot be reached",
            where="model.name",
            got=name,
            next_step="give a folder that save_pretrained wrote, or a hub id such as owner/name with model.revision",
        ) from error
    return Folder(Path(found), variant)


def decode(first_stage: nn.Module, latents: Tensor) -> Tensor:
    """Images [B, C, H, W] in [-1, 1] from latents [B, c, h, w], scaled as the pipelines of diffusers scale them."""
    config = cast(Mapping[str, Any], first_stage.config)
    scaled = latents / (config.get("scaling_factor") or 1.0) + (config.get("shift_factor") or 0.0)
    parameter = next(first_stage.parameters())
    return (
        cast(Any, first_stage).decode(scaled.to(parameter.device, parameter.dtype), return_dict=False)[0].clamp(-1, 1)
    )


def unpacked(latents: Tensor) -> Tensor:
    """Latents [B, C/4, H, W] from a sequence of their patches of 2x2, [B, HW/4, C]."""
    batch, patches, channels = latents.shape
    rows = round(patches**0.5)
    grid = latents.view(batch, rows, rows, channels // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 2 * rows, 2 * rows)
