"""Whole runs of the digits recipe in its smoke profile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys import silent

from quantlab.api import load_quantized, pack, quantize
from quantlab.api import sample as sample_run
from quantlab.errors import ArtefactError, ModelError, PackError, QuantlabError, RecipeError
from quantlab.execution import compare_execution
from quantlab.export import Target, export, target_of
from quantlab.recipe.load import load_recipe
from quantlab.report.console import make_console
from quantlab.run import RunOptions, run
from quantlab.stages.evaluate import draw

RECIPE = "digits/mpq-dm-w2a4"


def go(root: Path, *overrides: str, dry_run: bool = False):
    loaded = load_recipe(RECIPE, overrides, profile="smoke")
    return run(loaded, RunOptions(root, "cpu", "float32", dry_run, make_console(quiet=True)))


def statuses(folder: Path) -> dict[str, str]:
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return {event["stage"]: event["status"] for event in events}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("runs")
    return root, go(root)


def test_rows_and_files(finished) -> None:
    _, result = finished
    assert [row.method for row in result.rows] == ["full precision", "min-max", "mse", "mpq-dm"]
    assert len({row.protocol for row in result.rows}) == 1
    for row in result.rows[1:]:
        assert row.weight_bits == 2 and row.size_bytes < row.float_bytes / 5 and row.simulated
    names = {path.name for path in result.folder.iterdir()}
    assert names >= {"recipe.yaml", "recipe.resolved.yaml", "environment.json", "plan.json", "events.jsonl"}
    assert names >= {"metrics.json", "samples.png", "report.html", "capture", "calibrate", "reference", "mpq-dm"}
    assert (result.folder / "report.html").stat().st_size < 5e6
    page = (result.folder / "report.html").read_text()
    for part in ('id="samples"', 'id="bits"', 'id="errors"', 'id="scales"', 'id="tuning"', "mid_block.resnets.0.conv1"):
        assert part in page, part


def test_the_second_run_reuses_every_stage(finished) -> None:
    root, first = finished
    second = go(root)
    assert set(statuses(second.folder).values()) == {"reused"}
    assert second.rows == first.rows


def test_changing_the_evaluation_runs_nothing_before_it(finished) -> None:
    root, _ = finished
    found = statuses(go(root, "evaluate.metrics=[fid]").folder)
    again = {stage for stage, status in found.items() if status == "computed"}
    assert again == {stage for stage in found if stage.endswith(("/evaluate", "/pack"))}  # a file holds its metrics


def test_the_artefact_is_the_model_that_was_measured(finished, tmp_path) -> None:
    _, result = finished
    loaded = load_quantized(result.folder)
    again = load_quantized(result.folder, "min-max")
    inputs = loaded.task.example_inputs(4)
    with torch.no_grad():
        one, other = loaded.student.run(inputs), again.student.run(inputs)
        exact = loaded.task.network(**inputs, **loaded.task.static)[0]
    assert not torch.equal(one, other) and not torch.equal(one, exact)
    line = sample_run(result.folder, 5, 0, tmp_path / "s.png", "cpu")
    assert "5 images of mpq-dm" in line and (tmp_path / "s.png").is_file()


@pytest.mark.parametrize("steps", [2, 10])
def test_calibrated_scales_serve_other_numbers_of_steps(finished, steps: int) -> None:
    _, result = finished
    loaded = load_quantized(result.folder, steps=steps)
    task, student = loaded.task, loaded.student
    assert len(task.schedule.timesteps) == steps != 4
    noise, labels = task.draw_noise(20, 2), task.labels(20)
    images = task.sample(student.run, noise, labels, range(20))
    exact = task.sample(lambda inputs: task.network(**inputs, **task.static)[0], noise, labels, range(20))
    assert torch.isfinite(images).all()
    # Two-bit weights after four iterations: far from float, and nearer to it than nothing at all.
    assert (images - exact).square().mean() < exact.square().mean()


def test_a_folder_that_is_no_run(tmp_path) -> None:
    with pytest.raises(ArtefactError, match="no run folder"):
        load_quantized(tmp_path)


def test_a_damaged_artefact_is_found(tmp_path) -> None:
    result = go(tmp_path, "baselines=[]", "method=min-max")
    file = (result.folder / "min-max" / "finalize" / "final.safetensors").resolve()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ArtefactError, match="safetensors"):
        load_quantized(result.folder)
    with pytest.raises(ArtefactError, match="not the one that was written"):
        go(tmp_path, "baselines=[]", "method=min-max")


def test_dry_run_measures_nothing(tmp_path) -> None:
    result = go(tmp_path, dry_run=True)
    assert "bit operations" in result.table() and "multiply-accumulates" in result.table()
    assert not list(tmp_path.iterdir())


def test_a_pattern_without_site_names_its_line(tmp_path) -> None:
    with pytest.raises(RecipeError, match="matches no site"):
        go(tmp_path, "keep.0.match=conv_inn")


def test_each_method_runs_once_and_the_recipes_own_comes_last(tmp_path) -> None:
    result = go(tmp_path, "method=min-max", "baselines=[min-max, mse, mse]")
    assert [row.method for row in result.rows] == ["full precision", "mse", "min-max"]


def test_guidance_and_other_steps(tmp_path) -> None:
    result = go(tmp_path, "baselines=[]", "sampling.guidance=1.5")
    assert all(value is not None for value in [result.rows[-1].metrics["fid"]])


@pytest.mark.parametrize(
    "option", [("cuda:9", "float32"), ("cpu", "float8"), ("nonsense", "float32"), ("meta", "float32")]
)
def test_devices_and_dtypes_that_are_not_there(option: tuple[str, str], tmp_path) -> None:
    loaded = load_recipe(RECIPE, profile="smoke")
    with pytest.raises(RecipeError):
        run(loaded, RunOptions(tmp_path, *option, True, make_console(quiet=True)))


def test_half_precision_runs_and_comes_back(tmp_path) -> None:
    loaded = load_recipe(RECIPE, ["baselines=[]", "method=mpq-dm"], profile="smoke")
    result = run(loaded, RunOptions(tmp_path, "cpu", "bfloat16", False, make_console(quiet=True)))
    full, quantized = result.rows
    assert quantized.metrics["accuracy"] is not None
    # What stays float has two bytes; scales and codes are what they are in float32.
    assert full.size_bytes == 2_228_418
    assert quantized.smaller > 3
    assert result.folder is not None
    again = load_quantized(result.folder)
    assert next(again.task.network.parameters()).dtype == torch.bfloat16


def test_a_killed_run_goes_on_to_the_same_result(tmp_path) -> None:
    """kill -9 in the middle of tuning; the same command goes on from the last epoch."""
    settings = ["baselines=[]", "tune.iterations=40"]
    options = [part for setting in settings for part in ("--set", setting)]

    def command(root: str) -> list[str]:
        start = [sys.executable, "-m", "quantlab", "run", RECIPE, "--profile", "smoke"]
        return [*start, "--runs-dir", str(tmp_path / root), *options]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command("a"), env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "a" / ".store").glob("tune-*.partial/checkpoint.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline, "tuning never saved a checkpoint"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "a" / ".store").glob("tune-*[!l]/tuned.safetensors"))
    results = []
    for root in ("a", "b"):
        subprocess.run(command(root), env=environment, check=True, capture_output=True)
        (file,) = (tmp_path / root / ".store").glob("finalize-*/final.safetensors")
        results.append(file.read_bytes())
    assert results[0] == results[1]


def test_sigterm_leaves_nothing_half_written(tmp_path) -> None:
    command = [sys.executable, "-m", "quantlab", "run", RECIPE, "--set", "baselines=[]", "--runs-dir", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / ".store").glob("reference-*.partial")):
        assert process.poll() is None and time.monotonic() < deadline, "the stage never began"
        time.sleep(0.01)
    process.terminate()
    _, told = process.communicate()
    assert process.returncode == 143 and "the same command goes on" in told and "Traceback" not in told
    assert not list((tmp_path / ".store").glob("*.partial"))


def test_quantize_a_module_in_memory() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3)).eval()
    batches = [torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    exact = module(batches[0])
    errors = []
    for bits in (8, 2):
        quantized = quantize(module, batches, method="mse", weight_bits=bits, activation_bits=8)
        errors.append((quantized.module(batches[0]) - exact).square().mean().item())
        assert quantized.bit_map.weight_bits["0"].tolist() == [bits] * 16
    assert errors[0] < 1e-3 < errors[1]
    assert torch.equal(module(batches[0]), exact), "the module itself is not changed"
    tuned = quantize(
        module,
        batches,
        method="efficientdm",
        weight_bits=2,
        iterations=60,
        settings={"activations": {"per_timestep": False}, "tune": {"rank": 4, "adapter_learning_rate": 3e-3}},
    )
    assert (tuned.module(batches[0]) - exact).square().mean().item() < 0.8 * errors[1]


def test_per_timestep_needs_a_timestep() -> None:
    with pytest.raises(QuantlabError, match="need a timestep"):
        quantize(torch.nn.Sequential(torch.nn.Linear(3, 4)), [torch.randn(8, 3)], method="efficientdm")


def test_a_single_layer_says_what_to_do() -> None:
    with pytest.raises(ModelError, match="Sequential"):
        quantize(torch.nn.Linear(3, 4), [torch.randn(8, 3)])


def test_a_correction_is_stored_counted_and_applied_again(finished, tmp_path) -> None:
    root, _ = finished
    settings = ("method=ptqd-ptq", "baselines=[mse]", "evaluate.metrics=[paired-error]", "sampling.eta=1.0")
    result = go(root, *settings)
    _, plain, corrected = result.rows
    assert corrected.allocation == plain.allocation and corrected.metrics != plain.metrics
    assert corrected.size_bytes - plain.size_bytes == 4 * (4 + 1 * 4 + 4) + 2 * 4, "slope, bias, deviation, timesteps"
    loaded = load_quantized(result.folder)
    assert len(loaded.corrections) == 1 and load_quantized(result.folder, "mse").corrections == ()
    recipe = load_recipe(RECIPE, settings, profile="smoke").recipe
    images = draw(
        loaded.task, loaded.student.run, recipe.evaluate, recipe.evaluate.noise_seed, silent, loaded.corrections
    )
    stored = load_file(result.folder / "ptqd-ptq" / "evaluate" / "images.safetensors")["images"]
    assert torch.equal(images, stored)
    assert "3 images of ptqd-ptq" in sample_run(result.folder, 3, 0, tmp_path / "s.png", "cpu")


def test_a_module_in_memory_has_no_sampler_to_correct() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3)).eval()
    with pytest.raises(RecipeError, match="cannot be corrected"):
        quantize(module, [torch.randn(4, 3)], "ptqd")


def test_every_method_of_a_run_is_packed(finished, tmp_path: Path) -> None:
    """The file alone gives the images that were measured; its tensors have the size that the row says."""
    _, result = finished
    for row in result.rows[1:]:
        file = result.folder / row.method / "pack" / "model.safetensors"
        packed, loaded = load_quantized(file), load_quantized(result.folder, row.method)
        inputs = loaded.task.example_inputs(4)
        with torch.no_grad():
            assert torch.equal(packed.run(inputs), loaded.run(inputs))
        assert sum(value.nbytes for value in load_file(file).values()) == row.size_bytes
        evaluation = packed.manifest.origin.evaluation
        assert evaluation["metrics"] == row.metrics and evaluation["protocol"] == row.protocol
        assert all(
            torch.equal(packed.bit_map.weight_bits[site], bits)
            for site, bits in loaded.bit_map.weight_bits.items()
            if site in packed.bit_map.weight_bits
        )
    again = tmp_path / "again.safetensors"
    command = [sys.executable, "-m", "quantlab", "pack", str(result.folder), "--method", "mse", "--output", str(again)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"{again.stat().st_size:,} bytes" in told
    tensors = load_file(result.folder / "mse" / "pack" / "model.safetensors")
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(again).items())
    assert "3 images of mse" in sample_run(again, 3, 0, tmp_path / "s.png", "cpu")
    for options in ({"method": "mse"}, {"steps": 3}):
        with pytest.raises(RecipeError, match="of a run folder"):
            load_quantized(again, **options)
    with pytest.raises(RecipeError, match="of a packed file"):
        load_quantized(result.folder, keep_packed=True)


def test_a_run_and_its_packed_file_export_the_same(finished, tmp_path: Path) -> None:
    _, result = finished
    file, to = result.folder / "mse" / "pack" / "model.safetensors", Target.COMPRESSED_TENSORS
    told = export(result.folder, to, tmp_path / "run", "mse", weights_only=True)
    assert "linear layers packed" in told and "convolutions as floats" in told
    export(file, to, tmp_path / "file", weights_only=True)
    of_run, of_file = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "file"))
    assert of_run.keys() == of_file.keys() and all(torch.equal(of_run[name], of_file[name]) for name in of_run)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["_class_name"] == "UNet2DModel" and config["quantization_config"]["format"] == "pack-quantized"
    with pytest.raises(PackError, match="has no place for"):
        export(file, to, tmp_path / "none")
    with pytest.raises(RecipeError, match="one of a run folder"):
        export(file, to, tmp_path / "none", "mse")
    with pytest.raises(RecipeError, match="nothing is to be left out"):
        export(file, Target.ONNX, tmp_path / "none", weights_only=True)
    with pytest.raises(RecipeError, match=r'there is no format "onx"[\s\S]*did you mean "onnx"'):
        target_of("onx")
    assert not (tmp_path / "none").exists()


def test_an_execution_is_kept_in_the_page(finished) -> None:
    _, result = finished
    page = result.folder / "report.html"
    before = page.read_text()
    assert "not measured" in before
    found = compare_execution(result.folder, "mse", samples=4)
    after = page.read_text()
    assert f"{found.latency}" in after and "Kernel of each site: mse" in after and "Kernel of each site" not in before
    assert [line for line in before.splitlines() if line not in after.splitlines()] == [
        line for line in before.splitlines() if "not measured" in line and "<td" in line and ">mse<" in line
    ]


def test_a_format_of_its_own_and_free_zero_points_are_not_packed_and_the_run_goes_on(tmp_path: Path) -> None:
    settings = ("baselines=[]", "evaluate.metrics=[paired-error]", "weights.observer=min_max")
    for extra, reason in (("weights.quantizer=residual", "format"), ("weights.round_zero_point=false", "free floats")):
        result = go(tmp_path, *settings, "method=mse", extra)
        assert None not in result.rows[-1].metrics.values() and result.rows[-1].metrics
        assert not (result.folder / "mse" / "pack").exists()
        with pytest.raises(PackError, match=reason):
            pack(result.folder)
    free = result.rows[-1]
    rounded = go(tmp_path, *settings, "method=mse", extra, "pack.free_zero_points=round")
    assert (rounded.folder / "mse" / "pack" / "model.safetensors").is_file()
    # The scale search's zero points are integers already, so that rounding them saves bytes alone.
    assert rounded.rows[-1].metrics == free.metrics and rounded.rows[-1].size_bytes < free.size_bytes
