"""MLflow: runs as runs of MLflow."""

from __future__ import annotations

from quantlab import Reporter, hookimpl

quantlab_api = 1


@hookimpl
def quantlab_reporters() -> list[type[Reporter]]:
    """Runs as runs of MLflow."""
    from quantlab_mlflow.reporter import MlflowReporter

    return [MlflowReporter]
