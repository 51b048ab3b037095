"""Event files of TensorBoard, read back with its own reader."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from quantlab_tensorboard.reporter import TensorboardConfig, TensorboardReporter
from toy_source import run_toy

from quantlab import PluginError

METRICS = "evaluate.metrics=[agreement, kl-to-float, top-k]"

try:
    TensorboardReporter(TensorboardConfig()).require()
except PluginError as error:
    reason = str(error)
    installed = False
else:
    reason, installed = "", True
needs_tensorboard = pytest.mark.skipif(not installed, reason=reason)


def read(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    found.Reload()
    return found


def text_of(events, tag: str) -> str:
    return events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()


@needs_tensorboard
def test_curves_metrics_and_pictures_are_in_the_event_files(tmp_path):
    tuned = ("tune.tuners=[reconstruct]", "tune.iterations=3")
    result = run_toy(tmp_path, "classifier", METRICS, *tuned, report_to=["tensorboard"])
    folder = result.folder / "tensorboard"
    assert {path.name for path in folder.iterdir()} == {"run", "full-precision", "mse"}
    events, row = read(folder / "mse"), result.rows[1]
    scalars = events.Tags()["scalars"]
    curves = [name for name in scalars if name.startswith("0-reconstruct/")]
    assert curves and all(len(events.Scalars(name)) >= 1 for name in curves)
    for name, value in row.metrics.items():
        assert events.Scalars(name)[0].value == pytest.approx(value)
    assert row.protocol in text_of(events, "tags") and row.allocation in text_of(events, "tags")
    run = read(folder / "run")
    assert text_of(run, "status") == "finished" and str(result.folder) in text_of(run, "run")
    plain = run_toy(tmp_path, "classifier", METRICS, *tuned)
    assert [row.metrics for row in plain.rows] == [row.metrics for row in result.rows]


@needs_tensorboard
def test_a_run_that_fails_says_so_in_the_folder_that_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("quantlab.run.quantize.finalize", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_toy(tmp_path, "classifier", METRICS, report_to=[f"tensorboard: {{folder: '{tmp_path / 'board'}'}}"])
    (run,) = (tmp_path / "board" / "toy").iterdir()
    assert text_of(read(run / "run"), "status") == "failed: division by zero"


def test_without_tensorboard_nothing_is_computed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(PluginError, match="tensorboard cannot be imported") as caught:
        run_toy(tmp_path, "classifier", METRICS, report_to=["tensorboard"])
    assert "pip install 'quantlab[tensorboard]'" in str(caught.value)
    assert not (tmp_path / "runs").exists()
