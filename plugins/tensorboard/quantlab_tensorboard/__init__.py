"""TensorBoard: runs as event files of TensorBoard."""

from __future__ import annotations

from quantlab import Reporter, hookimpl

quantlab_api = 1


@hookimpl
def quantlab_reporters() -> list[type[Reporter]]:
    """Runs as event files of TensorBoard."""
    from quantlab_tensorboard.reporter import TensorboardReporter

    return [TensorboardReporter]
