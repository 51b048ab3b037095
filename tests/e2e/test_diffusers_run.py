"""A W4A8 run of diffusers pipelines: saved, loaded in a new process, and put into the unmodified pipeline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers_models import save_dit, save_stable_diffusion
from safetensors.torch import load_file
from torch import Tensor, nn

from quantlab.api import LoadedRun, load_quantized
from quantlab.errors import ModelError
from quantlab.plugins import load_registry
from quantlab.recipe.load import load_recipe
from quantlab.report.console import make_console
from quantlab.run import RunOptions, run

RECIPE = """version: 1
model: {{source: diffusers, name: {folder}, {options}}}
method: min-max
budget: {{weight_bits: 4, activation_bits: 8}}
sampling: {{steps: 3, guidance: 3.0}}
calibrate: {{trajectories: 4, samples: 2}}
evaluate: {{samples: 4, batch: 4, metrics: [paired-error], grid: 0}}
"""
REDRAW = """
import sys
import torch
from quantlab import load_quantized
from quantlab.stages.evaluate import draw
from safetensors.torch import save_file
torch.set_num_threads(1)
for folder, file in zip(sys.argv[1::2], sys.argv[2::2]):
    run = load_quantized(folder)
    images = draw(run.task, run.student.run, run.recipe.evaluate, 5, lambda done, total: None)
    save_file({"images": images}, file)
"""
PROMPTS = ["a cat", "the dog on the moon"]


def run_of(base: Path, name: str, options: str) -> Path:
    recipe = base / f"{name}.yaml"
    recipe.write_text(RECIPE.format(folder=base / name, options=options))
    loaded = load_recipe(recipe, [], load_registry())
    result = run(loaded, RunOptions(base / "runs", "cpu", "float32", False, make_console(quiet=True)))
    assert result.folder is not None
    return result.folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    pytest.importorskip("transformers")
    base = tmp_path_factory.mktemp("diffusers")
    save_stable_diffusion(base / "sd")
    save_dit(base / "dit")
    (base / "prompts.txt").write_text("\n".join(PROMPTS))
    return {"sd": run_of(base, "sd", f"prompts: {base}/prompts.txt"), "dit": run_of(base, "dit", "last_class: 9")}


@pytest.fixture
def loaded(runs) -> LoadedRun:
    return load_quantized(runs["sd"])


def stored_images(folder: Path) -> Tensor:
    return load_file(folder / "min-max" / "evaluate" / "images.safetensors")["images"]


def stable_diffusion(folder: Path, unet: nn.Module):
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, unet=unet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def folder_of(run: LoadedRun) -> Path:
    return Path(run.recipe.model.name)


def images(pipeline, noise: Tensor) -> Tensor:
    count = len(noise)
    return pipeline(
        (PROMPTS * count)[:count], num_inference_steps=3, guidance_scale=3.0, latents=noise, output_type="pt",
        height=16, width=16,
    ).images  # fmt: skip


def test_a_new_process_draws_the_same_images(runs, tmp_path):
    pairs = [str(path) for name, folder in runs.items() for path in (folder, tmp_path / f"{name}.safetensors")]
    subprocess.run([sys.executable, "-c", REDRAW, *pairs], check=True, capture_output=True)
    for name, folder in runs.items():
        assert torch.equal(load_file(tmp_path / f"{name}.safetensors")["images"], stored_images(folder))


def test_the_unmodified_pipeline_draws_the_runs_images(runs, loaded):
    pipeline = stable_diffusion(folder_of(loaded), loaded.bound())
    found = images(pipeline, loaded.task.draw_noise(4, 5))
    torch.testing.assert_close(found * 2 - 1, stored_images(runs["sd"]), rtol=0, atol=1e-5)


def test_any_scheduler_batch_and_dtype(loaded):
    import diffusers

    pipeline = stable_diffusion(folder_of(loaded), loaded.bound())
    for scheduler in (diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler):
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        assert images(pipeline, torch.randn(3, 4, 8, 8)).isfinite().all()
    for dtype in (torch.bfloat16, torch.float16):
        pipeline.to(dtype)
        assert pipeline.unet.dtype == dtype
        assert images(pipeline, torch.randn(1, 4, 8, 8).to(dtype)).isfinite().all()


def test_hooks_of_accelerate_after_binding(loaded):
    accelerate = pytest.importorskip("accelerate")
    network, noise = loaded.bound(), torch.randn(2, 4, 8, 8)
    before = images(stable_diffusion(folder_of(loaded), network), noise)
    accelerate.cpu_offload_with_hook(network, "cpu")  # what enable_model_cpu_offload does, without an accelerator
    assert "forward" in network.__dict__
    assert torch.equal(images(stable_diffusion(folder_of(loaded), network), noise), before)
    with pytest.raises(ModelError):
        network.load_lora_adapter({})


def test_saving_keeps_class_and_names(loaded, tmp_path):
    network = loaded.bound()
    network.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert set(loaded.task.network.state_dict()) <= set(saved)
    assert '"_class_name": "UNet2DConditionModel"' in (tmp_path / "config.json").read_text()


def test_a_lora_is_refused_with_the_reason(loaded):
    pytest.importorskip("peft")
    pipeline = stable_diffusion(folder_of(loaded), loaded.bound())
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    rank = {f"{name}.lora_A.weight": torch.zeros(2, 16), f"{name}.lora_B.weight": torch.zeros(16, 2)}
    with pytest.raises(ModelError, match="load_lora_adapter cannot work here") as caught:
        pipeline.load_lora_weights(rank)
    assert "float model" in (caught.value.next_step or "")
