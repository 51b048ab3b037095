"""A matrix of recipes: its file, its cells, who runs them, what came out."""

from quantlab.bench.cells import Cell, cells
from quantlab.bench.file import BenchFile, read_bench
from quantlab.bench.launch import InProcess, Launcher, LocalLauncher, Outcome, launcher_for
from quantlab.bench.matrix import bench
from quantlab.bench.result import BenchResult
from quantlab.bench.sweep import Sweep, SweepResult, budgets_from, seeds_from, sweep

__all__ = [
    "BenchFile",
    "BenchResult",
    "Cell",
    "InProcess",
    "Launcher",
    "LocalLauncher",
    "Outcome",
    "Sweep",
    "SweepResult",
    "bench",
    "budgets_from",
    "cells",
    "launcher_for",
    "read_bench",
    "seeds_from",
    "sweep",
]
