"""What a run tells a person: its environment, coverage and cost, and the files at its end."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantlab.allocation.plan import Plan
from quantlab.contracts.allocation import FLOAT_BITS
from quantlab.contracts.model import GenerativeTask, Task
from quantlab.graph.uncovered import by_reason
from quantlab.quant.accounting import Accounting, FloatModel
from quantlab.recipe.explain import resolved_yaml
from quantlab.recipe.load import LoadedRecipe
from quantlab.recipe.schema import Recipe
from quantlab.report.grid import GridRow, save_grid
from quantlab.report.html import RunReport, StageLine, save_run_html
from quantlab.report.rows import Row, row_to_json
from quantlab.report.tables import markdown_of
from quantlab.stages.context import RunContext, version_of
from quantlab.stages.prepare import PROVENANCE_FILE
from quantlab.store import JSON

COVERAGE_FILE = "coverage.txt"
PACKAGES = ("quantlab", "torch", "diffusers", "torchmetrics", "numpy", "safetensors")


def environment(device: str, dtype: str, seed: int) -> dict[str, JSON]:
    """Versions, machine and seeds: what someone needs to repeat the run."""

    return {
        "python": sys.version.split()[0],
        "packages": {package: version_of(package) for package in PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": device if not device.startswith("cuda") else f"{device}: {torch.cuda.get_device_name(device)}",
        "dtype": dtype,
        "seed": seed,
    }


def _processor() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()}, {capability}"


def coverage_text(plan: Plan, cost: Accounting) -> str:
    """How much of the computation is quantized, and what stays float and why."""
    reasons: dict[str, list[str]] = {}
    for entry in plan.sites:
        if not entry.quantized:
            reasons.setdefault(entry.reason, []).append(entry.site.name)
    left = "; ".join(f"{len(names)} {reason} ({_shortened(names)})" for reason, names in reasons.items())
    quantized = len(plan.quantized)
    text = f"{cost.coverage:.1%} of the multiply-accumulates at {quantized} of {len(plan.sites)} sites are quantized"
    text = f"{text}; float: {left}" if left else text
    outside = "; ".join(_outside(plan, cost.macs + cost.other_macs))
    return f"{text}; outside every site: {outside}" if outside else text


def _outside(plan: Plan, macs: int) -> Iterator[str]:
    """What is multiplied without a site, alike operations together, with its share of all multiply-accumulates."""
    for (operation, reason), found in by_reason(plan.uncovered).items():
        share = sum(entry.macs for entry in found) / macs
        names = _shortened(list(dict.fromkeys(entry.where or "the model's own forward" for entry in found)))
        yield f"{len(found)} {operation} with {share:.1%}, {reason} ({names})"


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(names[:2])
    return shown if len(names) <= 2 else f"{shown}, ..."


def plan_text(plan: Plan, cost: Accounting) -> str:
    """The table of a dry run: bits of every site, then size and bit operations."""
    lines = [["site", "kind", "weight", "MACs", "bits W/A", "tags"]]
    for entry in plan.sites:
        shape = "x".join(map(str, entry.site.weight_shape or ()))
        bits = f"{_bits(entry.weight_bits)}/{_bits(entry.activation_bits)}"
        bits += "".join(f", {slot} {_bits(own)}" for slot, own in entry.slot_bits.items())
        kept = "" if entry.budgeted else " (kept)"
        split = [f"split {'+'.join(map(str, entry.split))}"] if entry.split else []
        tags = ", ".join([*sorted(entry.site.tags), *split])
        lines.append([entry.site.name, str(entry.site.kind), shape, f"{entry.site.macs:,}", bits + kept, tags])
    smaller = cost.float_model_bytes / cost.total_bytes
    size = (
        f"size about {cost.total_bytes:,} bytes, {smaller:.1f} times smaller than float; "
        f"{cost.bit_operations / 1e9:.3f} G bit operations a forward at batch 1"
    )
    return f"{markdown_of(lines)}\n\n{size}\n{coverage_text(plan, cost)}"


def resources_text(task: Task, recipe: Recipe, float_model: FloatModel) -> str:
    """What a run needs at least: the recorded trajectories on disk, and in memory beside both networks' weights.

    At every step a trajectory has the noisy sample and the prediction, which is as large; a classifier has its inputs.
    """
    if isinstance(task, GenerativeTask):
        each = 2 * recipe.sampling.steps * task.draw_noise(1, 0).nbytes
    else:
        each = sum(value.nbytes for value in task.example_inputs(1).values())
    recorded = recipe.calibrate.trajectories * each
    memory = recorded + 2 * float_model.total_bytes
    return (
        f"a run needs at least {recorded:,} bytes of disk for calibration, and {memory:,} bytes of memory for it and "
        "for the float network with its quantized copy; activations, adapters and images come on top"
    )


def _bits(bits: int) -> str:
    return "float" if bits == FLOAT_BITS else str(bits)


def plan_json(plan: Plan, cost: Accounting) -> dict[str, JSON]:
    """The plan for the run folder."""
    sites: list[JSON] = [
        {
            "name": entry.site.name,
            "weight_bits": entry.weight_bits,
            "activation_bits": entry.activation_bits,
            "budgeted": entry.budgeted,
            "reason": entry.reason,
        }
        for entry in plan.sites
    ]
    return {"sites": sites, "size_bytes": cost.total_bytes, "bit_operations": cost.bit_operations}


def begin(context: RunContext, loaded: LoadedRecipe, device: str, dtype: str) -> dict[str, JSON]:
    """Write what was asked for into the run folder; returns the environment."""
    found = environment(device, dtype, loaded.recipe.seed)
    context.folder.write_text("recipe.yaml", loaded.text)
    context.folder.write_text("recipe.resolved.yaml", resolved_yaml(loaded.recipe))
    context.folder.write_json("origins.json", dict(loaded.origin))
    if context.processes.count > 1:
        found["processes"] = context.processes.count
    context.folder.write_json("environment.json", found)
    return found


def finish(
    context: RunContext,
    loaded: LoadedRecipe,
    rows: Sequence[Row],
    images: Sequence[tuple[str, Tensor | None]],
    coverage: str,
) -> None:
    """Write a grid of what is drawn, the page and, last, the metrics: a run with metrics is complete."""
    folder = context.folder.path
    count = loaded.recipe.evaluate.grid
    drawn = [GridRow(title, pixels(each[:count])) for title, each in images if each is not None]
    if count and drawn:
        save_grid(drawn, folder / "samples.png")
    context.folder.write_text(COVERAGE_FILE, coverage)
    save_page(folder, loaded.recipe, rows)
    context.folder.write_json("metrics.json", {"schema_version": 1, "rows": [row_to_json(row) for row in rows]})


def save_page(folder: Path, recipe: Recipe, rows: Sequence[Row]) -> None:
    """Write the page of a run from what its folder holds; again when something was measured later."""
    report = RunReport(
        title=f"{recipe.name}: {recipe.method}",
        rows=rows,
        folder=folder,
        grid=recipe.evaluate.grid,
        # A run of an earlier quantlab wrote none.
        coverage=found.read_text() if (found := folder / COVERAGE_FILE).is_file() else "",
        stages=_stages(folder),
        recipe=(folder / "recipe.resolved.yaml").read_text(),
        origins=json.loads((folder / "origins.json").read_text()),
        environment=(folder / "environment.json").read_text(),
        # A stage that an earlier quantlab stored has none.
        calibration=recorded.read_text() if (recorded := folder / "calibrate" / PROVENANCE_FILE).is_file() else "",
    )
    save_run_html(report, folder / "report.html")


def _stages(folder: Path) -> list[StageLine]:
    """The stages of a run from its events."""
    file = folder / "events.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [
        StageLine(event["stage"], event["seconds"], event["status"], Path(event["folder"]).name.rpartition("-")[2])
        for event in events
        if "stage" in event
    ]


def pixels(images: Tensor) -> np.ndarray:
    """Images [N, C, H, W] in [-1, 1] as uint8 [N, H, W] or [N, H, W, 3]."""
    values = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()
    return values[..., 0] if values.shape[-1] == 1 else values
