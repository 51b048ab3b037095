"""A run whose layers have low-rank branches: two tuners in turn, reused and loaded back."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from quantlab.api import load_quantized, quantize
from quantlab.recipe.load import load_recipe
from quantlab.report.console import make_console
from quantlab.run import RunOptions, run

SMALL = ["sampling.steps=2", "calibrate.trajectories=4", "calibrate.samples=2", "evaluate.samples=8", "baselines=[]"]
METRICS = [
    'evaluate.metrics=["paired-error"]',
    "evaluate.grid=0",
    "weights.observer=min_max",
    "activations.observer=min_max",
]


def go(root: Path):
    tuners = "tune.tuners=[{svdquant: {refits: 1}}, gptq]"
    loaded = load_recipe("digits/mpq-dm-w2a4", [*SMALL, *METRICS, "method=svdquant-gptq", tuners], profile="smoke")
    return run(loaded, RunOptions(root, "cpu", "float32", False, make_console(quiet=True)))


def test_branches_are_reused_counted_and_loaded_back(tmp_path: Path) -> None:
    first = go(tmp_path)
    second = go(tmp_path)
    assert second.rows == first.rows
    events = [json.loads(line) for line in (second.folder / "events.jsonl").read_text().splitlines()]
    assert {event["status"] for event in events} == {"reused"}
    loaded = load_quantized(first.folder)
    branches = [layer.branch for layer in loaded.student.trained_layers().values()]
    assert all(branch is not None and branch.rank == 8 for branch in branches)
    assert all(layer.branch is None for name, layer in loaded.student.layers().items() if name == "conv_in")
    history = json.loads((first.folder / "svdquant-gptq" / "tune-0-svdquant" / "history.json").read_text())
    assert all(total < quantized for total, quantized in zip(history["total"], history["quantized"], strict=True))
    inputs = loaded.task.example_inputs(2)
    with torch.no_grad():
        assert torch.isfinite(loaded.student.run(inputs)).all()


def test_notes_of_a_tuner_are_told(capsys) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(8, 2))
    rows = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    plain = quantize(network.eval(), [rows], "mse", weight_bits=2, samples=16)
    found = quantize(network.eval(), [rows], "bias-correction", weight_bits=2, samples=16)
    assert "1 layers have no bias to correct: 0" in capsys.readouterr().err
    before, after = plain.module(rows).mean(0), found.module(rows).mean(0)
    expected = network(rows).mean(0)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)
    assert (before - expected).abs().max() > 1e-3
