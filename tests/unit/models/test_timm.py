"""timm's networks: graphs equal to them, weights from files alone, and runs on a folder of images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from quantlab.contracts.sections import Model, Sampling
from quantlab.errors import ModelError, RecipeError
from quantlab.graph.capture import capture
from quantlab.graph.captured import CaptureMethod
from quantlab.graph.compare import largest_difference
from quantlab.graph.passes.insert_quantizers import insert_quantizers
from quantlab.graph.run import runner
from quantlab.graph.sites import find_sites
from quantlab.graph.uncovered import find_uncovered
from quantlab.graph.verify import capture_verified
from quantlab.models.classifier import ClassifierTask
from quantlab.models.timm import TimmConfig, TimmSource, create
from quantlab.quant.layers import QuantizedLinear
from quantlab.recipe.load import load_recipe
from quantlab.report.console import make_console
from quantlab.run import RunOptions, RunResult, run

SMALL: Mapping[str, Mapping[str, object]] = {
    "resnet18": {},
    "mobilenetv3_small_050": {},
    "efficientnet_lite0": {},
    "regnety_002": {},
    "convnext_atto": {},
    "test_vit": {"img_size": 32},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 2, "embed_dim": 24, "depths": (2, 2)},
    "mixer_s32_224": {"img_size": 32},
    "cait_xxs24_224": {"img_size": 32, "depth": 2},
    "xcit_nano_12_p16_224": {"img_size": 32, "depth": 2},
    "edgenext_xx_small": {},
    "poolformer_s12": {},
}
NET = "test_vit"
ARGUMENTS = "{img_size: 32, num_classes: 3}"


@pytest.mark.parametrize("name", SMALL)
def test_the_graph_is_the_network(name: str) -> None:
    network = create(Model(name=name), TimmConfig(arguments=dict(SMALL[name])))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def inputs(batch: int) -> dict[str, Tensor]:
        return {"x": images[:batch].clone()}

    captured = capture_verified(network, inputs, {})
    assert captured.method is CaptureMethod.VALUE_TRACE
    assert [largest_difference(network, captured, inputs(batch)) for batch in (1, 2, 3)] == [0.0, 0.0, 0.0]
    layers = {path for path, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert {site.name for site in find_sites(network, captured) if site.weight_shape} == layers


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_a_weight_that_is_used_with_a_bias_put_together_beside_it_is_a_site(name: str) -> None:
    size = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 1, "num_heads": 2}
    network = create(Model(name=name), TimmConfig(arguments=size)).double().requires_grad_(False)
    images = {"x": torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1)).double()}
    captured = capture(network, images, {})
    layers = [path for path, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert "blocks.0.attn.qkv" in layers
    assert {site.name for site in find_sites(network, captured) if site.weight_shape} == set(layers)
    assert not list(find_uncovered(network, captured))
    expected = network(**images)
    graph = insert_quantizers(network, captured, layers, None)
    assert isinstance(network.get_submodule("blocks.0.attn.qkv"), QuantizedLinear)
    torch.testing.assert_close(runner(network, graph)(images), expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red, green and blue images with noise in two splits, and a network's random weights."""
    root = tmp_path_factory.mktemp("data")
    rng = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 5)):
        for label, name in enumerate(("blue", "green", "red")):
            place = root / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 120, (40, 48, 3), generator=rng, dtype=torch.uint8)
                pixels[..., 2 - label] += 120
                Image.fromarray(pixels.numpy()).save(place / f"{index}.png")
    network = create(Model(name=NET), TimmConfig(arguments={"img_size": 32, "num_classes": 3}))
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, root / "weights.safetensors")
    return root


def load(folder: Path | None, **options: object) -> ClassifierTask:
    config = TimmConfig.model_validate(
        {"arguments": {"img_size": 32, "num_classes": 3}, "data": str(folder) if folder else None, **options}
    )
    return TimmSource(config).load(Model(name=NET), Sampling(), torch.device("cpu"), torch.float32)


def run_timm(folder: Path, root: Path, *overrides: str, data: str = "", dry_run: bool = False) -> RunResult:
    recipe = root / "timm.yaml"
    recipe.write_text(
        f"version: 1\nname: timm\nmodel: {{source: timm, name: {NET}, arguments: {ARGUMENTS}, "
        f"weights: {folder / 'weights.safetensors'}{data}}}\nmethod: mse\n"
        "budget: {weight_bits: 8, activation_bits: 8}\n"
        "calibrate: {trajectories: 12, samples: 12}\n"
        "evaluate: {samples: 15, batch: 4, metrics: [{top-k: {k: [1]}}]}\n"
    )
    loaded = load_recipe(str(recipe), overrides)
    return run(loaded, RunOptions(root / "runs", "cpu", "float32", dry_run, make_console(quiet=True)))


def test_images_are_prepared_as_timm_says_and_labelled_by_folder(folder: Path) -> None:
    from timm.data import create_transform, resolve_data_config

    task = load(folder)
    (batch,) = task.labelled(15, 3, 100)
    assert batch.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    preparation = resolve_data_config({"img_size": 32}, model=task.network)
    with Image.open(folder / "val" / "green" / "2.png") as image:
        expected = create_transform(**preparation, is_training=False)(image.convert("RGB"))
    assert preparation["input_size"] == (3, 32, 32) and torch.equal(batch.inputs["x"][7], expected)


def test_the_draw_depends_on_the_seed_alone(folder: Path) -> None:
    task = load(folder)
    whole = torch.cat([batch.inputs["x"] for batch in task.labelled(9, 3, 100)])
    parts = torch.cat([batch.inputs["x"] for batch in load(folder).labelled(9, 3, 2)])
    other = torch.cat([batch.inputs["x"] for batch in task.labelled(9, 4, 100)])
    assert torch.equal(whole, parts) and not torch.equal(whole, other)


def test_calibration_draws_from_its_own_split(folder: Path) -> None:
    task = load(folder)
    data = task.calibrate(
        lambda inputs: task.network(**inputs), range(24), torch.Generator().manual_seed(0), lambda done, total: None
    )
    assert data.inputs["x"].shape == (1, 24, 3, 32, 32) and data.outputs.shape == (1, 24, 3)
    assert task.calibration_digest() != task.data_digest()
    with pytest.raises(ModelError, match="fewer images"):
        task.calibrate(lambda inputs: task.network(**inputs), range(25), torch.Generator(), lambda done, total: None)


def test_a_run_on_a_folder(folder: Path, tmp_path: Path) -> None:
    result = run_timm(folder, tmp_path, data=f", data: {folder}")
    full, quantized = result.rows
    assert set(full.metrics) == {"top-1"} and set(quantized.intervals) == {"top-1"}
    again = run_timm(folder, tmp_path, data=f", data: {folder}")
    assert again.rows[1].metrics == quantized.metrics and again.rows[0].protocol == full.protocol


def test_more_data_are_another_run(folder: Path, tmp_path: Path) -> None:
    before = load(folder).calibration_digest()
    added = folder / "train" / "red" / "another.png"
    Image.new("RGB", (40, 48)).save(added)
    try:
        assert load(folder).calibration_digest() != before
    finally:
        added.unlink()


def test_without_data_only_a_dry_run_works(folder: Path, tmp_path: Path) -> None:
    assert "multiply-accumulates" in run_timm(folder, tmp_path, dry_run=True).table()
    with pytest.raises(ModelError, match="fewer labelled inputs") as error:
        run_timm(folder, tmp_path)
    assert "model.data" in str(error.value.next_step)
    with pytest.raises(ModelError, match="no folder of images"):
        run_timm(folder, tmp_path, data=f", data: {folder / 'nowhere'}")


def test_damaged_images_and_empty_classes_are_named(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "val" / "a"
    place.mkdir(parents=True)
    with pytest.raises(ModelError, match="a class has no images"):
        list(load(tmp_path).labelled(1, 0, 1))
    (place / "broken.png").write_bytes(b"no image")
    with pytest.raises(ModelError, match="half of one") as error:
        list(load(tmp_path).labelled(1, 0, 1))
    assert str(error.value.where).endswith("broken.png")


def test_more_classes_than_the_network_has(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in "abcd":
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / split / name / "0.png")
    with pytest.raises(ModelError, match="more classes"):
        load(tmp_path).num_labelled()


def test_nothing_is_fetched_unless_a_recipe_says_so() -> None:
    with pytest.raises(RecipeError, match="only when the recipe says so"):
        create(Model(name="hf-hub:someone/something"), TimmConfig())
    with pytest.raises(RecipeError, match="two sources of weights"):
        create(Model(name=NET, weights="a.safetensors"), TimmConfig(pretrained=True))


def test_unknown_networks_and_arguments_are_refused() -> None:
    with pytest.raises(RecipeError, match="timm cannot make") as error:
        create(Model(name="resnet_of_mine"), TimmConfig())
    assert "resnet" in str(error.value.next_step)
    with pytest.raises(RecipeError, match="timm cannot make"):
        create(Model(name=NET), TimmConfig(arguments={"no_such_argument": 1}))
    with pytest.raises(ModelError, match="no classes"):
        load(None, arguments={"num_classes": 0})


def test_weights_of_another_network_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="another model"):
        create(Model(name=NET, weights=str(folder / "weights.safetensors")), TimmConfig())
