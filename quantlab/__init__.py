"""Mixed-precision quantization: one engine, every method a plugin.

The names below are the public interface. Each is imported when it is first used, so that ``import quantlab`` is
cheap and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantlab.api import LoadedRun, QuantizedModule, load_quantized, quantize
    from quantlab.bench import bench as run_bench
    from quantlab.contracts.allocation import FLOAT_BITS, AllocationProblem, BitMap, BitPolicy, SiteData
    from quantlab.contracts.config import Strict
    from quantlab.contracts.event import StageEvent, StageStatus
    from quantlab.contracts.method import Method
    from quantlab.contracts.model import CalibrationSet, Task
    from quantlab.contracts.passes import SmoothingPass
    from quantlab.contracts.quant import Observer, PerChannel, PerTensor, QParams, QuantSpec
    from quantlab.contracts.quantizer import Quantizer
    from quantlab.contracts.sections import Budget
    from quantlab.contracts.site import Site, SiteKind, Slot
    from quantlab.contracts.tuning import (
        OUTPUT,
        AdapterSpec,
        Checkpoint,
        ConvAdapter,
        Loss,
        StepContext,
        TuneJob,
        Tuner,
        TuneResult,
    )
    from quantlab.errors import (
        ArtefactError,
        CaptureError,
        ModelError,
        NonFiniteError,
        PluginError,
        QuantlabError,
        RecipeError,
    )
    from quantlab.evaluation.samples import ImageMetric, SampleSet
    from quantlab.hookspecs import hookimpl
    from quantlab.plugins import Registry, load_registry
    from quantlab.quant.functional import fake_quantize, search_scale
    from quantlab.recipe.load import LoadedRecipe, load_recipe
    from quantlab.recipe.method import method_from_yaml
    from quantlab.recipe.schema import Recipe
    from quantlab.run import RunOptions, RunResult
    from quantlab.run import run as run_recipe

# What each module gives; "run_recipe=run" renames, since quantlab.run is the module.
_NAMES = {
    "api": "LoadedRun QuantizedModule load_quantized quantize",
    "bench": "run_bench=bench",
    "contracts.allocation": "FLOAT_BITS AllocationProblem BitMap BitPolicy SiteData",
    "contracts.config": "Strict",
    "contracts.event": "StageEvent StageStatus",
    "contracts.method": "Method",
    "contracts.model": "CalibrationSet Task",
    "contracts.passes": "SmoothingPass",
    "contracts.quant": "Observer PerChannel PerTensor QParams QuantSpec",
    "contracts.quantizer": "Quantizer",
    "contracts.sections": "Budget",
    "contracts.site": "Site SiteKind Slot",
    "contracts.tuning": "OUTPUT AdapterSpec Checkpoint ConvAdapter Loss StepContext TuneJob Tuner TuneResult",
    "errors": "ArtefactError CaptureError ModelError NonFiniteError PluginError QuantlabError RecipeError",
    "evaluation.samples": "ImageMetric SampleSet",
    "hookspecs": "hookimpl",
    "plugins": "Registry load_registry",
    "quant.functional": "fake_quantize search_scale",
    "recipe.load": "LoadedRecipe load_recipe",
    "recipe.method": "method_from_yaml",
    "recipe.schema": "Recipe",
    "run": "RunOptions RunResult run_recipe=run",
}
_WHERE = {
    public: (f"quantlab.{module}", name or public)
    for module, names in _NAMES.items()
    for public, _, name in (entry.partition("=") for entry in names.split())
}

__all__ = [
    "FLOAT_BITS",
    "OUTPUT",
    "AdapterSpec",
    "AllocationProblem",
    "ArtefactError",
    "BitMap",
    "BitPolicy",
    "Budget",
    "CalibrationSet",
    "CaptureError",
    "Checkpoint",
    "ConvAdapter",
    "ImageMetric",
    "LoadedRecipe",
    "LoadedRun",
    "Loss",
    "Method",
    "ModelError",
    "NonFiniteError",
    "Observer",
    "PerChannel",
    "PerTensor",
    "PluginError",
    "QParams",
    "QuantSpec",
    "QuantizedModule",
    "Quantizer",
    "QuantlabError",
    "Recipe",
    "RecipeError",
    "Registry",
    "RunOptions",
    "RunResult",
    "SampleSet",
    "Site",
    "SiteData",
    "SiteKind",
    "Slot",
    "SmoothingPass",
    "StageEvent",
    "StageStatus",
    "StepContext",
    "Strict",
    "Task",
    "TuneJob",
    "TuneResult",
    "Tuner",
    "fake_quantize",
    "hookimpl",
    "load_quantized",
    "load_recipe",
    "load_registry",
    "method_from_yaml",
    "quantize",
    "run_bench",
    "run_recipe",
    "search_scale",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _WHERE[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
