"""The task of a latent-diffusion checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compvis_states import tiny_checkpoint
from ruamel.yaml import YAML
from safetensors.torch import save, save_file

from quantlab.contracts.sections import Model, Sampling
from quantlab.errors import ModelError, RecipeError
from quantlab.models.compvis import convert
from quantlab.models.compvis.config import read_config
from quantlab.models.compvis.source import CompVisConfig, CompVisSource
from quantlab.models.compvis.task import CONTEXT
from quantlab.models.denoiser import DenoiserTask


def load(folder: Path, name: str = "none", *, sampling: dict[str, Any] | None = None, **options: Any) -> DenoiserTask:
    weights, config = tiny_checkpoint(folder, name, first_stage=options.pop("first_stage", "vq"))
    source = CompVisSource(CompVisConfig(config=str(config), **options))
    model = Model(source="compvis", weights=str(weights))
    return source.load(model, Sampling(**{"steps": 2, **(sampling or {})}), torch.device("cpu"), torch.float32)


def run_of(task: DenoiserTask):
    return lambda inputs: task.network(**inputs, **task.static)[0]


def test_the_noise_schedule_is_the_configs(tmp_path: Path) -> None:
    task = load(tmp_path)
    roots = [0.0015**0.5 + (0.0195**0.5 - 0.0015**0.5) * step / 999 for step in range(1000)]
    product = 1.0
    for step, root in enumerate(roots):
        product *= 1 - root**2
        if step in (0, 500, 999):
            assert float(task.sampler.alphas_cumprod[step]) == pytest.approx(product, rel=1e-9)


def test_guidance_weighs_the_class_against_none(tmp_path: Path) -> None:
    task = load(tmp_path, "classes", sampling={"guidance": 3.0}, unconditional_class=4)
    inputs = {
        "sample": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([501, 501]),
        "label": torch.tensor([0, 3]),
    }
    table = torch.cat([task.conditions.rows[CONTEXT], task.conditions.unconditional[CONTEXT]])[:, 0]
    with torch.no_grad():
        found = task.predict(run_of(task), inputs)
        told, untold = (
            task.network(inputs["sample"], inputs["timestep"], context[:, None]).sample
            for context in (table[[0, 3]], table[[4, 4]])
        )
    torch.testing.assert_close(found, untold + 3 * (told - untold), rtol=1e-4, atol=1e-5)
    assert task.labels(6).tolist() == [0, 1, 2, 3, 0, 1], "the class that stands for none is not asked for"


def test_calibration_is_the_trajectory_and_keeps_conditions_as_numbers(tmp_path: Path) -> None:
    task = load(tmp_path, "classes")
    data = task.calibrate(run_of(task), range(3), torch.Generator().manual_seed(0), lambda done, total: None)
    assert set(data.inputs) == {"sample", "timestep", "label"} and data.outputs.shape == (2, 3, 3, 8, 8)
    assert not task.protect, "as many bits as the recipe's own rules say"
    after = task.sampler.step(0, data.outputs[0], data.inputs["sample"][0])
    torch.testing.assert_close(after, data.inputs["sample"][1])


@pytest.mark.parametrize(("first_stage", "side"), [("vq", 16), ("kl", 16)])
def test_images_are_decoded_latents(tmp_path: Path, first_stage: str, side: int) -> None:
    task = load(tmp_path, first_stage=first_stage)
    noise = task.draw_noise(5, 1)
    images = task.sample(run_of(task), noise, task.labels(5), range(5))
    assert images.shape == (5, 3, side, side) and images.abs().max() <= 1
    save({"images": images})  # as a run keeps them
    with torch.no_grad():
        latents = task.sampler.sample(
            lambda inputs: run_of(task)({k: inputs[k] for k in ("sample", "timestep")}), noise, {}
        )
        model = convert.load(read_config(tmp_path / "config.yaml"), tmp_path / "model.ckpt")
        decoded: Any = model.first_stage
        expected = decoded.decode(latents[2:3] / model.scale_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(images[2:3], expected, rtol=1e-4, atol=1e-4)


def test_contexts_and_prompts_come_from_files(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    contexts, without = torch.randn(2, 77, 24, generator=rng), torch.randn(77, 24, generator=rng)
    save_file({"contexts": contexts, "unconditional": without}, tmp_path / "contexts.safetensors")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    given = {"contexts": str(tmp_path / "contexts.safetensors"), "prompts": str(tmp_path / "prompts.txt")}
    task = load(tmp_path, "text", sampling={"guidance": 7.5}, **given)
    assert task.prompts(3) == ["a cat", "a dog", "a cat"]
    inputs = {"sample": torch.zeros(1, 3, 8, 8), "timestep": torch.tensor([1]), "label": torch.tensor([1])}
    assert torch.equal(task.network_inputs(inputs)["encoder_hidden_states"], torch.stack([without, contexts[1]]))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(RecipeError, match="as many prompts as contexts"):
        load(tmp_path, "text", **given)
    with pytest.raises(RecipeError, match="needs prompts, and a tokenizer"):
        load(tmp_path, "text")
    save_file({"contexts": contexts[..., :3].contiguous(), "unconditional": without}, tmp_path / "contexts.safetensors")
    with pytest.raises(ModelError, match="no contexts of this model"):
        load(tmp_path, "text", contexts=given["contexts"])


def test_guidance_needs_something_that_stands_for_none(tmp_path: Path) -> None:
    for name in ("none", "classes"):
        with pytest.raises(RecipeError, match="cannot be guided"):
            load(tmp_path, name, sampling={"guidance": 2.0})
    with pytest.raises(RecipeError, match="the last one"):
        load(tmp_path, "classes", unconditional_class=2)


def test_what_an_outcome_depends_on_is_hashed(tmp_path: Path) -> None:
    weights, config = tiny_checkpoint(tmp_path, "classes")
    model = Model(source="compvis", weights=str(weights))
    first = CompVisSource(CompVisConfig(config=str(config))).identity(model)
    assert first != CompVisSource(CompVisConfig(config=str(config), unconditional_class=4)).identity(model)
    content = YAML(typ="safe").load(config.read_text())
    content["model"]["params"]["scale_factor"] = 0.5
    YAML().dump(content, config)
    assert first != CompVisSource(CompVisConfig(config=str(config))).identity(model)


def test_a_name_without_a_config_is_refused() -> None:
    source = CompVisSource(CompVisConfig())
    with pytest.raises(RecipeError, match="no config ships") as error:
        source.load(Model(source="compvis", name="cin256"), Sampling(), torch.device("cpu"), torch.float32)
    assert error.value.next_step == 'did you mean "cin256-v2"?'
