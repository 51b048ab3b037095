"""``python -m benchmarks``: measure, print the tables, write the JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    bit_search,
    fake_quant,
    gpu,
    integer_layers,
    integer_unet,
    layer_step,
    scale_search,
    training_iteration,
)
from benchmarks.machine import ENVIRONMENT, machine
from benchmarks.measure import Case, measured
from benchmarks.table import markdown, write_tables
from quantlab.torchvision_shim import ensure_torchvision_imports

SECTIONS: Mapping[str, Callable[[bool], Iterator[Case]]] = {
    "scale-search": scale_search.cases,
    "fake-quant": fake_quant.cases,
    "layer-step": layer_step.cases,
    "bit-search": bit_search.cases,
    "training-iteration": training_iteration.cases,
}
TABLES: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "integer-layers": integer_layers.main,
    "integer-unet": integer_unet.main,
    "gpu": gpu.main,
}
"""What has tables of its own: rounds -> what is kept of it."""
INTEGER_RESULTS, DOCUMENT = Path("docs/results/performance/integer-execution.json"), Path("docs/performance.md")
"""Where the sections of ``TABLES`` for a CPU go when they alone are run, all of them and in full."""


def main() -> None:
    """Run the chosen sections in a process with one thread and the environment of ``ENVIRONMENT``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one shape of each section, three rounds")
    parser.add_argument(
        "--only", choices=[*SECTIONS, *TABLES], nargs="+", default=[*SECTIONS, *TABLES], help="sections to run"
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds of a case")
    parser.add_argument("--output", type=Path, help="write the JSON there")
    parser.add_argument("--document", type=Path, help="write the tables into this document, between its markers")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], os.environ | ENVIRONMENT)
    torch.set_num_threads(1)
    ensure_torchvision_imports()
    results: dict[str, object] = {"machine": machine(), "cases": []}
    cases: list[object] = []
    rounds = 3 if arguments.quick else arguments.rounds
    if set(arguments.only) == set(TABLES) - {"gpu"} and not arguments.quick and arguments.output is None:
        arguments.output, arguments.document = INTEGER_RESULTS, DOCUMENT
    for name in arguments.only:
        if name in TABLES:
            print(name, file=sys.stderr, flush=True)
            results[name] = TABLES[name](rounds)
            continue
        for case in SECTIONS[name](arguments.quick):
            print(f"{case.section}: {case.work}", file=sys.stderr, flush=True)
            cases.append(measured(case, rounds))
    results["cases"] = cases
    print(markdown(results))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written: {arguments.output}", file=sys.stderr)
        if arguments.document:
            write_tables(arguments.document, arguments.output)


if __name__ == "__main__":
    main()
