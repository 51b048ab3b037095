"""Latent-diffusion checkpoints from file to image, and plans without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compvis_states import tiny_checkpoint

from quantlab.api import load_quantized
from quantlab.contracts.allocation import FLOAT_BITS
from quantlab.contracts.site import SiteKind
from quantlab.errors import ModelError
from quantlab.recipe.load import LoadedRecipe, load_recipe
from quantlab.report.console import make_console
from quantlab.run import RunOptions, load_task, run
from quantlab.stages import describe, prepare, quantize
from quantlab.stages.context import RunContext
from quantlab.store import Store, create_run

RECIPE = """
version: 1
model: {{source: compvis, config: {config}, weights: {weights}, unconditional_class: 4}}
method: min-max
budget: {{weight_bits: 4, activation_bits: 8}}
sampling: {{steps: 2, guidance: 2.0}}
calibrate: {{trajectories: 2, samples: 2}}
keep: [{{match: conv_in, bits: 8}}, {{match: conv_out, bits: 8}}]
evaluate: {{samples: 2, metrics: [paired-error]}}
"""

DRAW = """
import sys, torch
from quantlab.api import load_quantized
torch.set_num_threads(1)
loaded = load_quantized(sys.argv[1])
noise, labels = loaded.task.draw_noise(2, 1), loaded.task.labels(2)
torch.save(loaded.task.sample(loaded.student.run, noise, labels, range(2)), sys.argv[2])
"""


def quantized(loaded: LoadedRecipe, root: Path) -> tuple[Path, torch.Tensor]:
    """The run's folder after its model is finished, and two of its images."""
    recipe, console = loaded.recipe, make_console(quiet=True)
    task = load_task(loaded, "cpu", "float32")
    context = RunContext(Store(root), create_run(root, "compvis", "0" * 16), loaded.registry, console)
    describe.begin(context, loaded, "cpu", "float32")
    captured = prepare.capture(context, task)
    plan = prepare.plan(captured.sites, recipe, loaded.origin)
    calibrated = prepare.calibrate(context, captured, recipe.sampling, recipe.calibrate, recipe.seed)
    assigned = quantize.assign_bits(context, captured, calibrated, plan, recipe, recipe.method)
    tuned = quantize.tune(context, captured, calibrated, assigned, recipe, recipe.method)
    final = quantize.finalize(context, tuned, recipe.method)
    images = task.sample(final.student.run, task.draw_noise(2, 1), task.labels(2), range(2))
    return context.folder.path, images


def test_w4a8_is_the_same_image_in_a_new_process(tmp_path: Path) -> None:
    # No codebook, whose nearest entries would jump.
    weights, config = tiny_checkpoint(tmp_path, "classes", first_stage="kl")
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(config=config, weights=weights))
    folder, images = quantized(load_recipe(file), tmp_path / "runs")
    script, drawn = tmp_path / "draw.py", tmp_path / "drawn.pt"
    script.write_text(DRAW)
    subprocess.run([sys.executable, str(script), str(folder), str(drawn)], check=True)
    assert torch.equal(torch.load(drawn, weights_only=True), images)
    loaded = load_quantized(folder)
    task = loaded.task
    exact = task.sample(
        lambda inputs: task.network(**inputs, **task.static)[0], task.draw_noise(2, 1), task.labels(2), range(2)
    )
    error = (images - exact).norm() / exact.norm()
    assert 0 < error < 0.5, "quantized, and still the float model's images"


@pytest.mark.parametrize(
    ("name", "sites", "low_bit_weights"),
    [("imagenet-w2a4", 265, 385.94), ("bedrooms-w2a4", 73, 224.34), ("churches-w2a4", 109, 263.95)],
)
def test_a_plan_needs_no_weights_and_has_the_published_layers(name: str, sites: int, low_bit_weights: float) -> None:
    """As many layers as MPQ-DM's code replaces, and as many weights as their shapes give."""
    loaded = load_recipe(f"paper/{name}")
    found = prepare.capture_sites(load_task(loaded, "cpu", "float32"))[1]
    plan = prepare.plan(found, loaded.recipe, loaded.origin)
    assert len(plan.layers) == sites and not plan.products
    assert sum(entry.weight_bits == 8 for entry in plan.layers) == 4
    assert sum(site.weight_count for site in plan.budgeted) / 1e6 == pytest.approx(low_bit_weights, abs=0.005)
    left = [entry for entry in plan.sites if entry.weight_bits == FLOAT_BITS and entry.site.kind is SiteKind.CONV]
    assert all("shortcut" in entry.site.name or "downsamplers" in entry.site.name for entry in left)


def test_stable_diffusion_is_planned_through_run(tmp_path: Path) -> None:
    loaded = load_recipe("paper/stable-diffusion-w2a6")
    text = run(loaded, RunOptions(tmp_path, "cpu", "float32", True, make_console(quiet=True))).text
    assert "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k" in text and "at 265 of 314 sites" in text
    recorded = 2 * 50 * 64 * 4 * 64 * 64 * 4  # input and output, steps, trajectories, a latent's floats
    assert f"{recorded:,} bytes of disk" in text and f"{recorded + 2 * 859_520_964 * 4:,} bytes of memory" in text
    assert "bit operations" in text and not list(tmp_path.iterdir())


def test_a_run_without_weights_is_refused_before_any_work(tmp_path: Path) -> None:
    loaded = load_recipe("paper/bedrooms-w2a4", profile="smoke")
    with pytest.raises(ModelError, match="without weights"):
        run(loaded, RunOptions(tmp_path, "cpu", "float32", False, make_console(quiet=True)))
    assert not list(tmp_path.iterdir())
