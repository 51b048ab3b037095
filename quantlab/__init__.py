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
    from quantlab.calibration.choose import draw_pairs
    from quantlab.contracts.allocation import FLOAT_BITS, AllocationProblem, BitMap, BitPolicy, Resource, SiteData
    from quantlab.contracts.block import TEMPORAL, Block, Grouping, Partition
    from quantlab.contracts.config import Strict
    from quantlab.contracts.correction import Correction, CorrectionData, CorrectionStep, FittedCorrection
    from quantlab.contracts.event import StageEvent, StageStatus
    from quantlab.contracts.method import Method
    from quantlab.contracts.model import (
        CalibrationBatch,
        CalibrationSet,
        ClassificationTask,
        Evidence,
        GenerativeTask,
        LabelledBatch,
        Reference,
        Task,
        TrainingBatch,
    )
    from quantlab.contracts.passes import SmoothingPass
    from quantlab.contracts.quant import Observer, PerChannel, PerTensor, QParams, QuantSpec
    from quantlab.contracts.quantizer import Quantizer
    from quantlab.contracts.reporter import Curve, MethodResult, Reporter, RunEnd, RunStart, RunStatus
    from quantlab.contracts.sampler import CalibrationPairs, CalibrationSampler, SamplerProblem
    from quantlab.contracts.schedule import LossConfig, Schedule
    from quantlab.contracts.scores import Operand, OutputFamily, Score, ScoreRequest
    from quantlab.contracts.sections import Budget, Model, Sampling, Tune
    from quantlab.contracts.site import Site, SiteKind, Slot
    from quantlab.contracts.tuning import (
        OUTPUT,
        AdapterSpec,
        AdapterStart,
        Checkpoint,
        ConvAdapter,
        Loss,
        StepContext,
        TeacherVisit,
        TuneJob,
        Tuner,
        TuneResult,
    )
    from quantlab.errors import (
        ArtefactError,
        CaptureError,
        ModelError,
        NonFiniteError,
        PackError,
        PluginError,
        QuantlabError,
        RecipeError,
    )
    from quantlab.evaluation.answers import Answers, ClassMetric
    from quantlab.evaluation.samples import ImageMetric, SampleSet
    from quantlab.execution import ExecutionQuality, IntegerModule, compare_execution, execute, execute_run
    from quantlab.export import export_compressed_tensors, export_onnx
    from quantlab.hookspecs import hookimpl
    from quantlab.losses.taps import last_block
    from quantlab.notebook import Bench, Recipe
    from quantlab.packing.backends.dispatch import SiteDispatch
    from quantlab.packing.model import PackedModel
    from quantlab.plugins import Registry, load_registry
    from quantlab.quant.accounting import zero_point_bytes
    from quantlab.quant.functional import fake_quantize, search_scale
    from quantlab.quant.grid import WeightGrid
    from quantlab.quant.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear
    from quantlab.quant.split import parts_of
    from quantlab.recipe.load import LoadedRecipe, load_recipe
    from quantlab.recipe.method import method_from_yaml
    from quantlab.run import RunOptions, RunResult
    from quantlab.run import run as run_recipe
    from quantlab.tuning.checkpoint import restore_layers, restore_training, save_layers, save_training
    from quantlab.tuning.finite import blame_non_finite, require_finite_gradients
    from quantlab.tuning.visit import visit_layers

# What each module gives; "run_recipe=run" renames, since quantlab.run is the module.
_NAMES = {
    "api": "LoadedRun QuantizedModule load_quantized quantize",
    "bench": "run_bench=bench",
    "calibration.choose": "draw_pairs",
    "contracts.allocation": "AllocationProblem BitMap BitPolicy FLOAT_BITS Resource SiteData",
    "contracts.block": "Block Grouping Partition TEMPORAL",
    "contracts.config": "Strict",
    "contracts.correction": "Correction CorrectionData CorrectionStep FittedCorrection",
    "contracts.event": "StageEvent StageStatus",
    "contracts.method": "Method",
    "contracts.model": "CalibrationBatch CalibrationSet ClassificationTask Evidence GenerativeTask LabelledBatch "
    "Reference Task TrainingBatch",
    "contracts.passes": "SmoothingPass",
    "contracts.quant": "Observer PerChannel PerTensor QParams QuantSpec",
    "contracts.quantizer": "Quantizer",
    "contracts.reporter": "Curve MethodResult Reporter RunEnd RunStart RunStatus",
    "contracts.sampler": "CalibrationPairs CalibrationSampler SamplerProblem",
    "contracts.schedule": "LossConfig Schedule",
    "contracts.scores": "Operand OutputFamily Score ScoreRequest",
    "contracts.sections": "Budget Model Sampling Tune",
    "contracts.site": "Site SiteKind Slot",
    "contracts.tuning": "AdapterSpec AdapterStart Checkpoint ConvAdapter Loss OUTPUT StepContext TeacherVisit TuneJob "
    "TuneResult Tuner",
    "errors": "ArtefactError CaptureError ModelError NonFiniteError PackError PluginError QuantlabError RecipeError",
    "evaluation.answers": "Answers ClassMetric",
    "evaluation.samples": "ImageMetric SampleSet",
    "execution": "ExecutionQuality IntegerModule compare_execution execute execute_run",
    "export": "export_compressed_tensors export_onnx",
    "hookspecs": "hookimpl",
    "losses.taps": "last_block",
    "notebook": "Bench Recipe",
    "packing.backends.dispatch": "SiteDispatch",
    "packing.model": "PackedModel",
    "plugins": "Registry load_registry",
    "quant.accounting": "zero_point_bytes",
    "quant.functional": "fake_quantize search_scale",
    "quant.grid": "WeightGrid",
    "quant.layers": "QuantizedConv2d QuantizedLayer QuantizedLinear",
    "quant.split": "parts_of",
    "recipe.load": "LoadedRecipe load_recipe",
    "recipe.method": "method_from_yaml",
    "run": "RunOptions RunResult run_recipe=run",
    "tuning.checkpoint": "restore_layers restore_training save_layers save_training",
    "tuning.finite": "blame_non_finite require_finite_gradients",
    "tuning.visit": "visit_layers",
}
_WHERE = {
    public: (f"quantlab.{module}", name or public)
    for module, names in _NAMES.items()
    for public, _, name in (entry.partition("=") for entry in names.split())
}

__all__ = [
    "FLOAT_BITS",
    "OUTPUT",
    "TEMPORAL",
    "AdapterSpec",
    "AdapterStart",
    "AllocationProblem",
    "Answers",
    "ArtefactError",
    "Bench",
    "BitMap",
    "BitPolicy",
    "Block",
    "Budget",
    "CalibrationBatch",
    "CalibrationPairs",
    "CalibrationSampler",
    "CalibrationSet",
    "CaptureError",
    "Checkpoint",
    "ClassMetric",
    "ClassificationTask",
    "ConvAdapter",
    "Correction",
    "CorrectionData",
    "CorrectionStep",
    "Curve",
    "Evidence",
    "ExecutionQuality",
    "FittedCorrection",
    "GenerativeTask",
    "Grouping",
    "ImageMetric",
    "IntegerModule",
    "LabelledBatch",
    "LoadedRecipe",
    "LoadedRun",
    "Loss",
    "LossConfig",
    "Method",
    "MethodResult",
    "Model",
    "ModelError",
    "NonFiniteError",
    "Observer",
    "Operand",
    "OutputFamily",
    "PackError",
    "PackedModel",
    "Partition",
    "PerChannel",
    "PerTensor",
    "PluginError",
    "QParams",
    "QuantSpec",
    "QuantizedConv2d",
    "QuantizedLayer",
    "QuantizedLinear",
    "QuantizedModule",
    "Quantizer",
    "QuantlabError",
    "Recipe",
    "RecipeError",
    "Reference",
    "Registry",
    "Reporter",
    "Resource",
    "RunEnd",
    "RunOptions",
    "RunResult",
    "RunStart",
    "RunStatus",
    "SampleSet",
    "SamplerProblem",
    "Sampling",
    "Schedule",
    "Score",
    "ScoreRequest",
    "Site",
    "SiteData",
    "SiteDispatch",
    "SiteKind",
    "Slot",
    "SmoothingPass",
    "StageEvent",
    "StageStatus",
    "StepContext",
    "Strict",
    "Task",
    "TeacherVisit",
    "TrainingBatch",
    "Tune",
    "TuneJob",
    "TuneResult",
    "Tuner",
    "WeightGrid",
    "blame_non_finite",
    "compare_execution",
    "draw_pairs",
    "execute",
    "execute_run",
    "export_compressed_tensors",
    "export_onnx",
    "fake_quantize",
    "hookimpl",
    "last_block",
    "load_quantized",
    "load_recipe",
    "load_registry",
    "method_from_yaml",
    "parts_of",
    "quantize",
    "require_finite_gradients",
    "restore_layers",
    "restore_training",
    "run_bench",
    "run_recipe",
    "save_layers",
    "save_training",
    "search_scale",
    "visit_layers",
    "zero_point_bytes",
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
