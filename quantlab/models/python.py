"""A model that somebody's own installed package makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, cast

import torch
from pydantic import Field, field_validator
from torch import nn

from quantlab.contracts.config import Strict
from quantlab.contracts.model import Task
from quantlab.contracts.sections import Model, Sampling
from quantlab.errors import ModelError, RecipeError
from quantlab.models.module import Batch, ModuleTask
from quantlab.store import digest_of, digest_of_file


class PythonConfig(Strict):
    """Which function makes the model."""

    target: str = Field(description="package.module:function of an installed package")

    @field_validator("target")
    @classmethod
    def _names_a_function(cls, target: str) -> str:
        module, _, function = target.partition(":")
        if not (all(part.isidentifier() for part in module.split(".")) and function.isidentifier()):
            raise ValueError("a target is written package.module:function")
        return target


class PythonSource:
    """A function of an installed package that returns a task, or a module with batches of its inputs."""

    name: ClassVar[str] = "python"
    paper: ClassVar[str | None] = None
    version: ClassVar[int] = 1
    needs_name: ClassVar[bool] = False
    Config = PythonConfig

    def __init__(self, config: PythonConfig) -> None:
        self.config = config

    def load(self, model: Model, sampling: Sampling, device: torch.device, dtype: torch.dtype) -> Task:
        """What the function returns; it is called without arguments and decides on device and dtype itself.

        Raises:
            RecipeError: the function is not one of an installed package, or the recipe names weights.
            ModelError: it returns something else.
        """
        if model.weights is not None:
            raise RecipeError(
                "the function loads its own weights", where="model.weights", got=model.weights, next_step="leave it out"
            )
        made = self._function()()
        if isinstance(made, Task):
            return made
        if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
            module, batches = cast(tuple[nn.Module, Iterable[Batch]], made)
            return ModuleTask(module.to(device=device, dtype=dtype), batches)
        raise ModelError(
            "the function must return a quantlab.Task, or a module and a list of batches",
            where=self.config.target,
            got=type(made).__name__,
        )

    def identity(self, model: Model) -> str:
        """Hash of the module's file and of its distribution's version; what the function reads is not seen."""
        module, distribution = self._installed()
        origin = getattr(find_spec(module), "origin", None)
        return digest_of(
            [self.config.target, metadata.version(distribution), digest_of_file(Path(origin)) if origin else ""]
        )

    def _installed(self) -> tuple[str, str]:
        """The module, and the distribution that its package belongs to; no module is imported to find out."""
        module = self.config.target.partition(":")[0]
        package = module.partition(".")[0]
        distributions = metadata.packages_distributions().get(package)
        if not distributions:
            raise RecipeError(
                "the function must come from an installed package",
                where="model.target",
                got=f"{package}, which no installed distribution holds",
                next_step="write a pyproject.toml beside it and install it: pip install -e FOLDER",
            )
        return module, distributions[0]

    def _function(self) -> Callable[[], object]:
        module, _ = self._installed()
        name = self.config.target.partition(":")[2]
        try:
            found = getattr(import_module(module), name, None)
        except ImportError as error:
            raise RecipeError(
                "the module cannot be imported", where="model.target", got=f"{module}: {error}"
            ) from error
        if not callable(found):
            raise RecipeError("the module has no such function", where="model.target", got=self.config.target)
        return found
