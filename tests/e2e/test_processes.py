"""A run shared by two processes, connected through gloo on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from toy_source import run_toy

from quantlab.errors import ProcessError
from quantlab.processes import ALONE, Processes, joined

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 300
WORKER = """
import sys, torch
from pathlib import Path
import toy_source
from quantlab.cli.common import told
from quantlab.processes import joined

torch.set_num_threads(1)
root, failing = Path(sys.argv[1]), sys.argv[2]
with told(), joined() as processes:
    task = toy_source.ToyGenerativeTask
    if failing and processes.rank == int(failing):
        def sample(*_, **__):
            raise ValueError("this process breaks")
        task.sample = sample
    result = toy_source.run_toy(root, "denoiser", "evaluate.samples=40", "evaluate.metrics=[paired-error]",
                                processes=processes)
    if processes.first:
        print(result.folder)
"""


def started(root: Path, failing: str = "", count: int = 2) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root.mkdir()
    (root / "worker.py").write_text(WORKER)
    found = []
    for rank in range(count):
        shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        own = {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT / "tests"}
        environment = {**os.environ, **{name: str(value) for name, value in {**shared, **own}.items()}}
        command = [sys.executable, "worker.py", str(root), failing]
        found.append(
            subprocess.Popen(
                command, cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    return found


def metrics_and_images(folder: Path):
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    images = {
        name: load_file(folder / name / "images.safetensors")
        for name in ("reference", "float/evaluate", "mse/evaluate")
    }
    return [{**row, "seconds": 0} for row in rows], images


def test_two_processes_give_what_one_gives_and_one_of_them_writes(tmp_path: Path) -> None:
    both = started(tmp_path / "two")
    (out, errors), (other_out, other_errors) = (process.communicate(timeout=PATIENCE_SECONDS) for process in both)
    assert [process.returncode for process in both] == [0, 0], errors + other_errors
    assert other_out == "" and other_errors == ""
    (tmp_path / "one").mkdir()
    alone = run_toy(tmp_path / "one", "denoiser", "evaluate.samples=40", "evaluate.metrics=[paired-error]")
    folder = Path(out.strip())
    assert alone.folder is not None
    rows, images = metrics_and_images(folder)
    own_rows, own_images = metrics_and_images(alone.folder)
    assert rows == own_rows
    for name, tensors in own_images.items():
        assert all((tensors[key] == images[name][key]).all() for key in tensors), name
    assert len(list((tmp_path / "two" / "runs" / "toy").iterdir())) == 1
    stages = [json.loads(line)["status"] for line in (folder / "events.jsonl").read_text().splitlines()]
    assert set(stages) == {"computed"}
    assert json.loads((folder / "environment.json").read_text())["processes"] == 2


def test_a_process_that_fails_ends_both_with_messages(tmp_path: Path) -> None:
    both = started(tmp_path / "two", failing="1")
    first, second = (process.communicate(timeout=PATIENCE_SECONDS)[1] for process in both)
    assert [process.returncode for process in both] == [1, 1]
    assert "process 1 of 2" in second and "this process breaks" in second
    assert "another process of this run has ended" in first


def test_the_pieces_of_a_process_are_disjoint_and_all() -> None:
    shares = [list(Processes(rank, 3).share(8)) for rank in range(3)]
    assert sorted(index for share in shares for index in share) == list(range(8))
    assert list(ALONE.share(3)) == [0, 1, 2]


def test_each_process_has_a_gpu_of_its_own_where_no_number_is_given() -> None:
    second = Processes(5, 8, local_rank=1)
    assert [second.device(asked) for asked in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
    assert ALONE.device("cuda") == "cuda"


def test_a_half_told_process_is_told_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ProcessError, match="torchrun"), joined():
        pass
