"""A run of quantlab as a run of MLflow, with a nested run for every method that was measured in it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from quantlab import Curve, MethodResult, PluginError, Reporter, RunEnd, RunStart, RunStatus, Strict

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

METRICS_IN_A_REQUEST = 1000
PARAMETERS_IN_A_REQUEST = 100
LENGTH = 6000
"""Of a parameter's value and of a tag; MLflow takes no more."""
STATUS = {RunStatus.FINISHED: "FINISHED", RunStatus.FAILED: "FAILED", RunStatus.STOPPED: "KILLED"}
PARENT = "mlflow.parentRunId"


class MlflowConfig(Strict):
    """Options of the reporter."""

    experiment: str = Field(default="quantlab", min_length=1, description="the experiment that gets the runs")
    tracking_uri: str | None = Field(
        default=None, description="a server or a store; none: what MLFLOW_TRACKING_URI says, or MLflow's own default"
    )


class MlflowReporter(Reporter):
    """Runs in MLflow: one for the recipe with its files, and inside it one a method with curves and metrics."""

    name: ClassVar[str] = "mlflow"
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config = MlflowConfig

    def __init__(self, config: MlflowConfig) -> None:
        self.config = config
        self._runs: dict[str, str] = {}  # run id by method

    def require(self) -> None:
        """Raise PluginError when MLflow cannot be imported."""
        try:
            import mlflow.tracking  # noqa: F401
        except Exception as error:  # of a broken installation, a clash of protobuf for example, too
            raise PluginError(
                "mlflow cannot be imported",
                where='reporter "mlflow"',
                got=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                next_step="pip install 'quantlab[mlflow]'",
            ) from error

    def begin(self, start: RunStart) -> None:
        """Open a run, or the one of the same recipe that failed or was stopped last."""
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self.config.tracking_uri)
        self._experiment = _experiment(self._client, self.config.experiment)
        self._recipe = start.recipe
        self._parent = self._unfinished(start.digest) or self._open(start.recipe, {})
        tags = {**start.tags, "recipe": start.recipe, "recipe_hash": start.digest, "method": start.method}
        self._log(self._parent, {**tags, "folder": str(start.folder)}, start.parameters, [])

    def curve(self, curve: Curve) -> None:
        """The points of a loss as a metric with steps."""
        from mlflow.entities import Metric

        now = _now()
        self._log(
            self._of(curve.method), {}, {}, [Metric(curve.name, value, now, step) for step, value in curve.points]
        )

    def result(self, result: MethodResult) -> None:
        """Close the method's run with its parameters, tags and metrics."""
        from mlflow.entities import Metric

        now, run = _now(), self._of(result.method)
        metrics = [Metric(name, value, now, 0) for name, value in result.metrics.items()]
        self._log(run, {**result.tags, "method": result.method}, result.parameters, metrics)
        self._client.set_terminated(run, STATUS[RunStatus.FINISHED])
        del self._runs[result.method]

    def end(self, end: RunEnd) -> None:
        """Store the files and close the runs that are still open."""
        for file in end.files:
            self._client.log_artifact(self._parent, str(file))
        if end.reason:
            self._log(self._parent, {"reason": end.reason}, {}, [])
        for run in (*self._runs.values(), self._parent):
            self._client.set_terminated(run, STATUS[end.status])

    def _of(self, method: str) -> str:
        """The nested run of a method."""
        if method not in self._runs:
            self._runs[method] = self._open(f"{self._recipe}: {method}", {PARENT: self._parent})
        return self._runs[method]

    def _open(self, name: str, tags: Mapping[str, str]) -> str:
        return self._client.create_run(self._experiment, tags=dict(tags), run_name=name).info.run_id

    def _unfinished(self, digest: str) -> str | None:
        """The last run of the recipe if it did not finish, open again and without what it held of methods."""
        same = f"tags.`quantlab.recipe_hash` = '{digest}'"
        found = self._client.search_runs([self._experiment], same, max_results=1)
        if not found or found[0].info.status not in (STATUS[RunStatus.FAILED], STATUS[RunStatus.STOPPED]):
            return None
        run = found[0].info.run_id
        for inner in self._client.search_runs([self._experiment], f"tags.`{PARENT}` = '{run}'"):
            self._client.delete_run(inner.info.run_id)  # all stages are told again
        if "quantlab.reason" in found[0].data.tags:
            self._client.delete_tag(run, "quantlab.reason")
        self._client.update_run(run, status="RUNNING")
        return run

    def _log(
        self, run: str, tags: Mapping[str, str], parameters: Mapping[str, object], metrics: Sequence[Metric]
    ) -> None:
        from mlflow.entities import Param, RunTag

        told = [RunTag(f"quantlab.{name}", value[:LENGTH]) for name, value in tags.items() if value]
        params = [Param(name, str(value)[:LENGTH]) for name, value in parameters.items()]
        self._client.log_batch(run, tags=told)
        for first in range(0, len(params), PARAMETERS_IN_A_REQUEST):
            self._client.log_batch(run, params=params[first : first + PARAMETERS_IN_A_REQUEST])
        for first in range(0, len(metrics), METRICS_IN_A_REQUEST):
            self._client.log_batch(run, metrics=metrics[first : first + METRICS_IN_A_REQUEST])


def _experiment(client: MlflowClient, name: str) -> str:
    """The id of an experiment, which is made if there is none; another process may make it meanwhile."""
    from mlflow.exceptions import MlflowException

    known = client.get_experiment_by_name(name)
    if known:
        return known.experiment_id
    try:
        return client.create_experiment(name)
    except MlflowException:
        known = client.get_experiment_by_name(name)
        if known is None:
            raise
        return known.experiment_id


def _now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return time.time_ns() // 1_000_000
