"""A run of quantlab as event files of TensorBoard, a folder of them for every method that was measured in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from quantlab import Curve, MethodResult, PluginError, Reporter, RunEnd, RunStart, Strict

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


class TensorboardConfig(Strict):
    """Options of the reporter."""

    folder: str | None = Field(
        default=None,
        description="gets a folder for each run, from the working folder; none: tensorboard in the run's own folder",
    )


class TensorboardReporter(Reporter):
    """Event files of TensorBoard: curves and metrics of each method, and for the run its tags and its picture."""

    name: ClassVar[str] = "tensorboard"
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    Config = TensorboardConfig

    def __init__(self, config: TensorboardConfig) -> None:
        self.config = config
        self._writers: dict[str, SummaryWriter] = {}

    def require(self) -> None:
        """Raise PluginError when tensorboard cannot be imported."""
        try:
            import torch.utils.tensorboard  # noqa: F401
        except Exception as error:  # of a broken installation, a clash of protobuf for example, too
            raise PluginError(
                "tensorboard cannot be imported",
                where='reporter "tensorboard"',
                got=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                next_step="pip install 'quantlab[tensorboard]'",
            ) from error

    def begin(self, start: RunStart) -> None:
        """Choose the folder, and write what the run is."""
        own = start.folder / "tensorboard"
        self._folder = Path(self.config.folder, start.recipe, start.folder.name) if self.config.folder else own
        tags = {**start.tags, "recipe": start.recipe, "recipe_hash": start.digest, "folder": str(start.folder)}
        self._writer("run").add_text("run", _table(tags))

    def curve(self, curve: Curve) -> None:
        """The points of a loss as a scalar with steps."""
        writer = self._writer(curve.method)
        for step, value in curve.points:
            writer.add_scalar(curve.name, value, step)

    def result(self, result: MethodResult) -> None:
        """The parameters beside the metrics, for the page of hyperparameters, and the tags as text."""
        writer = self._writer(result.method)
        writer.add_text("tags", _table(result.tags))
        parameters = {name: "none" if value is None else value for name, value in result.parameters.items()}
        writer.add_hparams(parameters, dict(result.metrics), run_name=".")
        writer.flush()

    def end(self, end: RunEnd) -> None:
        """Write how the run ended with its picture, and close the files."""
        writer = self._writer("run")
        writer.add_text("status", f"{end.status}: {end.reason}" if end.reason else str(end.status))
        for file in end.files:
            if file.suffix == ".png":
                writer.add_image(file.stem, _pixels(file), dataformats="HWC")
            else:
                writer.add_text("files", str(file))
        for each in self._writers.values():
            each.close()

    def _writer(self, name: str) -> SummaryWriter:
        from torch.utils.tensorboard.writer import SummaryWriter

        if name not in self._writers:
            self._writers[name] = SummaryWriter(str(self._folder / name.replace(" ", "-")))
        return self._writers[name]


def _table(values: Mapping[str, str]) -> str:
    """Names and values as a Markdown table."""
    return "\n".join(["| name | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items())])


def _pixels(file: Path) -> object:
    """A picture as uint8 [H, W, 3]."""
    import numpy as np
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))
