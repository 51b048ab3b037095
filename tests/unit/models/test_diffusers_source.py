"""Denoisers of diffusers as tasks: what they draw is what the unmodified pipelines draw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers_models import MODELS, save_dit, save_stable_diffusion, seeded
from torch import Tensor

from quantlab.contracts.sections import Model, Sampling
from quantlab.errors import ModelError, RecipeError
from quantlab.models.denoiser import DenoiserTask
from quantlab.models.diffusers_folder import open_folder
from quantlab.models.diffusers_source import DiffusersConfig, DiffusersSource, read_prompts

PROMPTS = ("a cat", "the dog on the moon")


def load(folder: Path, sampling: dict[str, object] | None = None, dtype=torch.float32, **config) -> DenoiserTask:
    source = DiffusersSource(DiffusersConfig(**config))
    settings = Sampling(**{"steps": 3, **(sampling or {})})
    return source.load(Model(name=str(folder)), settings, torch.device("cpu"), dtype)


def drawn(task: DenoiserTask, count: int = 2) -> Tensor:
    noise = task.draw_noise(count, 0)

    def run(inputs):
        nested = {name: value for name, value in inputs.items() if "__" not in name}
        added = {n.removeprefix("added_cond_kwargs__"): v for n, v in inputs.items() if "__" in n}
        return task.network(**nested, **({"added_cond_kwargs": added} if added else {}), **task.static)[0]

    return task.sample(run, noise, task.labels(count), range(count))


def pipeline_of(folder: Path):
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    pytest.importorskip("transformers")
    folder = save_stable_diffusion(tmp_path_factory.mktemp("sd"))
    (folder / "prompts.txt").write_text("a cat\n\nthe dog on the moon\n")
    return folder


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> Path:
    return save_dit(tmp_path_factory.mktemp("dit"))


def test_stable_diffusion_with_guidance_draws_the_pipelines_images(sd):
    task = load(sd, {"guidance": 3.0}, prompts=str(sd / "prompts.txt"))
    images = pipeline_of(sd)(
        list(PROMPTS), num_inference_steps=3, guidance_scale=3.0, latents=task.draw_noise(2, 0), output_type="pt",
        height=16, width=16,
    ).images  # fmt: skip
    torch.testing.assert_close(drawn(task), images * 2 - 1, rtol=0, atol=1e-6)
    assert task.prompts(3) == [*PROMPTS, PROMPTS[0]]


def test_dit_with_guidance_draws_the_pipelines_images(dit, monkeypatch):
    task = load(dit, {"guidance": 3.0})
    from diffusers.pipelines.dit import pipeline_dit

    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda **_: task.draw_noise(2, 0))
    images = pipeline_of(dit)([0, 1], num_inference_steps=3, guidance_scale=3.0, output_type="pt").images
    torch.testing.assert_close(drawn(task), images * 2 - 1, rtol=0, atol=1e-6)


def test_ddim_on_pixels_draws_the_pipelines_images(tmp_path, monkeypatch):
    import diffusers

    diffusers.DDIMPipeline(seeded(MODELS["ddpm"]), diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    task = load(tmp_path)
    from diffusers.pipelines.ddim import pipeline_ddim

    monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *_, **__: task.draw_noise(2, 0))
    images = torch.tensor(pipeline_of(tmp_path)(batch_size=2, num_inference_steps=3, output_type="np").images)
    torch.testing.assert_close(drawn(task), images.movedim(-1, 1) * 2 - 1, rtol=0, atol=1e-6)


def test_flux_draws_the_pipelines_latents(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"))
    pipeline = diffusers.FluxPipeline(transformer=seeded(MODELS["flux"]), scheduler=scheduler, **parts)
    pipeline.transformer.save_pretrained(tmp_path / "transformer")
    scheduler.save_pretrained(tmp_path / "scheduler")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    task = load(tmp_path, {"guidance": 3.5, "scheduler": "flow-euler"}, sample_size=8)
    text = task.denoiser.example(2)
    conditions = {name: value for name, value in text.items() if name != "img_ids"}
    from quantlab.models.conditions import Conditions

    task.conditions = Conditions(conditions, fixed={"img_ids": text["img_ids"][:1]})
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        prompt_embeds=text["encoder_hidden_states"], pooled_prompt_embeds=text["pooled_projections"], height=64,
        width=64, num_inference_steps=3, guidance_scale=3.5, latents=task.draw_noise(2, 0), output_type="latent",
    ).images  # fmt: skip
    from quantlab.models.diffusers_folder import unpacked

    torch.testing.assert_close(drawn(task), unpacked(latents).clamp(-1, 1), rtol=0, atol=1e-6)


def test_trajectories_record_the_condition_not_its_tensors(sd):
    task = load(sd, {"guidance": 3.0}, prompts=str(sd / "prompts.txt"))
    run = lambda inputs: task.network(**inputs, **task.static)[0]  # noqa: E731
    ticks = []
    recorded = task.calibrate(
        run, range(18), torch.Generator().manual_seed(0), lambda done, of: ticks.append((done, of))
    )
    assert {name: tuple(value.shape) for name, value in recorded.inputs.items()} == {
        "sample": (3, 18, 4, 8, 8), "timestep": (3, 18), "label": (3, 18),
    }  # fmt: skip
    assert recorded.inputs["label"][0, :3].tolist() == [0, 1, 0]
    assert [done for done, _ in ticks] == [16, 32, 48, 50, 52, 54] and ticks[-1][1] == 54
    inputs = task.network_inputs(recorded.step(1, slice(0, 3)))
    assert inputs["encoder_hidden_states"].shape == (6, 77, 32)
    assert torch.equal(inputs["encoder_hidden_states"][0], inputs["encoder_hidden_states"][2])
    with torch.no_grad():
        output = task.combine(run(inputs), recorded.step(1, slice(0, 3)))
    torch.testing.assert_close(output, recorded.outputs[1, :3], rtol=1e-5, atol=1e-5)


def test_encoded_prompts_need_no_encoder_later(sd, monkeypatch):
    first = load(sd, {"guidance": 3.0}, prompts=str(sd / "prompts.txt"))
    tensors, expected = first.encode(), drawn(first)
    later = load(sd, {"guidance": 3.0}, prompts=str(sd / "prompts.txt"))
    monkeypatch.setattr("quantlab.models.diffusers_source.encode_prompts", None)
    later.use_encoded(tensors)
    assert torch.equal(drawn(later), expected)


def test_the_digest_knows_prompts_and_sizes(sd, tmp_path):
    other = tmp_path / "prompts.txt"
    other.write_text("a dog\n")
    digests = [load(sd, prompts=str(file)).conditions_digest for file in (sd / "prompts.txt", other)]
    digests += [load(sd, prompts=str(other), decode=False).conditions_digest]
    assert len(set(digests)) == 3
    assert DiffusersSource(DiffusersConfig()).identity(Model(name=str(sd)))


def test_a_component_folder_is_enough_for_capture(sd):
    task = load(sd / "unet")
    assert task.example_inputs(2)["sample"].shape == (2, 4, 8, 8)
    with pytest.raises(ModelError, match="no scheduler"):
        _ = task.sampler


def test_weights_in_half_precision(sd):
    task = load(sd, {"guidance": 3.0}, torch.bfloat16, prompts=str(sd / "prompts.txt"))
    assert task.network.dtype == torch.bfloat16
    images = drawn(task)
    assert images.dtype == torch.float32 and images.isfinite().all()


def test_a_sampler_of_another_kind_is_refused(sd):
    with pytest.raises(RecipeError, match="another kind of sampler") as caught:
        _ = load(sd, {"scheduler": "flow-euler"}).sampler
    assert caught.value.allowed == "ddim"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"last_class": 3}, "knows no classes"), ({"component": "transformer"}, "no such denoiser")],
)
def test_options_that_do_not_fit_are_told(sd, options, message):
    with pytest.raises((RecipeError, ModelError), match=message):
        load(sd, **options)


def test_prompts_are_missing_or_out_of_place(sd, dit, tmp_path):
    with pytest.raises(ModelError, match="no prompts"):
        _ = load(sd).conditions
    with pytest.raises(RecipeError, match="not conditioned on text"):
        load(dit, prompts=str(sd / "prompts.txt"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ModelError, match="no prompt"):
        read_prompts(str(tmp_path / "empty.txt"))
    with pytest.raises(ModelError, match="cannot be read"):
        read_prompts(str(tmp_path / "missing.txt"))


def test_classes_of_a_dit(dit):
    task = load(dit, first_class=5, last_class=7)
    conditions = task.network_inputs(
        {"sample": task.draw_noise(4, 0), "timestep": torch.ones(4), "label": task.labels(4)}
    )
    assert conditions["class_labels"].tolist() == [5, 6, 7, 5]
    with pytest.raises(RecipeError, match="no such classes"):
        load(dit, first_class=5, last_class=1000)


def test_guidance_without_a_null_class_is_refused(tmp_path):
    import diffusers

    diffusers.DDIMPipeline(seeded(MODELS["ddpm"]), diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="cannot be guided"):
        load(tmp_path, {"guidance": 2.0})


def test_a_name_that_leads_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="no folder here"):
        open_folder(str(tmp_path / "missing" / "model"), None, None)
    with pytest.raises(ModelError, match="no folder of diffusers"):
        load(tmp_path)
