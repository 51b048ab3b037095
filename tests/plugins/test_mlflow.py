"""Runs in a store of MLflow, read back with its own client."""

from __future__ import annotations

import sys

import pytest
from quantlab_mlflow.reporter import MlflowConfig, MlflowReporter
from toy_source import run_toy

from quantlab import Curve, PluginError, RunEnd, RunStart, RunStatus
from quantlab.store import json_text

METRICS = "evaluate.metrics=[agreement, kl-to-float, top-k]"

try:
    MlflowReporter(MlflowConfig()).require()
except PluginError as error:
    reason = str(error)
    installed = False
else:
    reason, installed = "", True
needs_mlflow = pytest.mark.skipif(not installed, reason=reason)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store of files, and what asks for it."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    return f"{(tmp_path / 'store').as_uri()}"


def runs_in(store: str):
    """The outer runs and the nested ones by method."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=store)
    found = client.search_runs([client.get_experiment_by_name("toys").experiment_id])
    outer = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    inner = {run.data.tags["quantlab.method"]: run for run in found if run not in outer}
    return client, outer, inner


@needs_mlflow
def test_a_run_is_a_run_with_one_inside_it_for_each_method(tmp_path, store):
    asked = f"mlflow: {{experiment: toys, tracking_uri: '{store}'}}"
    tuned = ("tune.tuners=[reconstruct]", "tune.iterations=3")
    plain = run_toy(tmp_path, "classifier", METRICS, *tuned)
    result = run_toy(tmp_path, "classifier", METRICS, *tuned, report_to=[asked])
    assert json_text([row.metrics for row in plain.rows]) == json_text([row.metrics for row in result.rows])
    events = (result.folder / "events.jsonl").read_text() if (result.folder / "events.jsonl").is_file() else ""
    assert "computed" not in events  # a reporter is in the key of no stage
    client, (outer,), inner = runs_in(store)
    assert outer.info.status == "FINISHED" and outer.info.run_name == "toy"
    assert outer.data.params["budget.weight_bits"] == "3" and outer.data.params["tune.iterations"] == "3"
    assert outer.data.tags["quantlab.folder"] == str(result.folder) and "quantlab.torch" in outer.data.tags
    assert {file.path for file in client.list_artifacts(outer.info.run_id)} >= {"report.html", "metrics.json"}
    assert inner.keys() == {"full precision", "mse"}
    row, mse = result.rows[1], inner["mse"]
    assert mse.data.tags["quantlab.protocol"] == row.protocol and mse.data.tags["quantlab.allocation"] == row.allocation
    assert mse.data.tags["quantlab.tuner/reconstruct"] == "1" and mse.data.params["method"] == "mse"
    assert mse.data.metrics.items() >= {**row.metrics, "size_bytes": row.size_bytes, "weight_bits": 3.0}.items()
    assert inner["full precision"].data.metrics["size_bytes"] == row.float_bytes
    curves = [name for name in mse.data.metrics if name.startswith("0-reconstruct/")]
    assert curves and all(client.get_metric_history(mse.info.run_id, name) for name in curves)


@needs_mlflow
def test_a_run_that_fails_is_marked_and_the_same_recipe_goes_on_in_it(tmp_path, store, monkeypatch):
    asked = f"mlflow: {{experiment: toys, tracking_uri: '{store}'}}"
    with monkeypatch.context() as patch:
        patch.setattr("quantlab.run.quantize.finalize", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_toy(tmp_path, "classifier", METRICS, report_to=[asked])
    (failed,) = runs_in(store)[1]
    assert failed.info.status == "FAILED" and failed.data.tags["quantlab.reason"] == "division by zero"
    run_toy(tmp_path, "classifier", METRICS, report_to=[asked])
    (again,), inner = runs_in(store)[1:]
    assert again.info.run_id == failed.info.run_id and again.info.status == "FINISHED"
    assert "quantlab.reason" not in again.data.tags
    assert {method: run.info.status for method, run in inner.items()} == dict.fromkeys(
        ("full precision", "mse"), "FINISHED"
    )
    run_toy(tmp_path, "classifier", METRICS, report_to=[asked])
    assert len(runs_in(store)[1]) == 2


@needs_mlflow
def test_a_long_curve_and_many_parameters_fit(tmp_path, store):
    reporter = MlflowReporter(MlflowConfig(experiment="toys", tracking_uri=store))
    parameters = {f"key.{index}": "x" * 10 for index in range(250)}
    reporter.begin(RunStart("toy", "mse", "d", tmp_path, parameters, {}))
    reporter.curve(Curve("mse", "0-distill/total", [(step, step / 2) for step in range(2500)]))
    reporter.end(RunEnd(RunStatus.STOPPED, "x" * 9000))
    client, (outer,), inner = runs_in_any(store)
    assert len(outer.data.params) == 250 and outer.info.status == "KILLED"
    (curved,) = inner
    history = client.get_metric_history(curved.info.run_id, "0-distill/total")
    assert [(point.step, point.value) for point in history] == [(step, step / 2) for step in range(2500)]
    assert curved.info.status == "KILLED"


def runs_in_any(store: str):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=store)
    found = client.search_runs([client.get_experiment_by_name("toys").experiment_id])
    outer = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return client, outer, [run for run in found if run not in outer]


def test_without_mlflow_nothing_is_computed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.raises(PluginError, match="mlflow cannot be imported") as caught:
        run_toy(tmp_path, "classifier", METRICS, report_to=["mlflow"])
    assert "pip install 'quantlab[mlflow]'" in str(caught.value)
    assert not (tmp_path / "runs").exists()
