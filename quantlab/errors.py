"""Errors that a user sees: each says what is wrong, where, what came, what is allowed and what to do next."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from typing import ClassVar


class QuantlabError(Exception):
    """Base of every error meant for a person; printed without a traceback.

    Args:
        what: one sentence that says what is wrong.
        where: file and line, site, plugin or path.
        got: the value that was found.
        allowed: the values that would be right.
        next_step: what to do now.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        allowed: str | None = None,
        next_step: str | None = None,
    ) -> None:
        self.what: str = what
        self.where: str | None = where
        self.got: object = got
        self.allowed: str | None = allowed
        self.next_step: str | None = next_step
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The whole message, a line a part."""
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        lines += [f"  got: {self.got}"] if self.got is not None else []
        lines += [f"  allowed: {self.allowed}"] if self.allowed else []
        lines += [f"  next: {self.next_step}"] if self.next_step else []
        return "\n".join(lines)


class RecipeError(QuantlabError):
    """A recipe, or an option given on the command line, is wrong."""

    exit_code: ClassVar[int] = 2


class PluginError(QuantlabError):
    """A plugin cannot be loaded, or broke its hook's contract.

    Args:
        plugin: the class that broke it, so that whoever knows the plugins can say where it came from.
        came_from: the plugin and the package that the class came with.
        chosen_at: file and line of the recipe that chose it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        allowed: str | None = None,
        next_step: str | None = None,
        plugin: type | None = None,
        came_from: str | None = None,
        chosen_at: str | None = None,
    ) -> None:
        self.plugin: type | None = plugin
        self.came_from: str | None = came_from
        self.chosen_at: str | None = chosen_at
        super().__init__(what, where=where, got=got, allowed=allowed, next_step=next_step)

    @property
    def message(self) -> str:
        """The whole message, a line a part."""
        lines = [super().message]
        lines += [f"  plugin: {self.came_from}"] if self.came_from else []
        lines += [f"  chosen at: {self.chosen_at}"] if self.chosen_at else []
        return "\n".join(lines)

    def attributed(self, came_from: str | None, chosen_at: str | None) -> PluginError:
        """The same error that also says whose plugin it is about, and which line of the recipe chose it."""
        return PluginError(
            self.what,
            where=self.where,
            got=self.got,
            allowed=self.allowed,
            next_step=self.next_step,
            plugin=self.plugin,
            came_from=came_from,
            chosen_at=chosen_at,
        )


class ModelError(QuantlabError):
    """A model cannot be loaded or does not fit its description."""


class CaptureError(QuantlabError):
    """A model cannot be captured as one graph, or is called in a way its graph does not cover."""


class ArtefactError(QuantlabError):
    """A file of a run is missing, truncated, foreign or newer than this version reads."""


class PackError(QuantlabError):
    """A model cannot be packed, or a file format cannot hold it."""


class ProcessError(QuantlabError):
    """The processes of one run cannot work together, or one of them has ended."""


class NonFiniteError(QuantlabError):
    """A tensor holds NaN or infinity; the message names the first site where it does."""


class Stopped(BaseException):
    """A signal asks to end. No KeyboardInterrupt: when one passes through ``exec``, Python ends as if by SIGINT."""


def unforeseen(error: Exception) -> QuantlabError:
    """What an error that nobody caught means to a person: a refusal of the machine, or a defect and its place."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError):
        return QuantlabError(
            error.strerror or reason,
            where=str(error.filename) if error.filename else None,
            next_step="check the path, its permissions and the space on its disk",
        )
    if _out_of_memory(error):
        return QuantlabError(
            "the memory is not enough",
            got=reason,
            next_step="lower the recipe's batches, evaluate.samples or calibrate.trajectories",
        )
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return QuantlabError(
        f"{type(error).__name__}: {reason}",
        where=f"{frame.filename}:{frame.lineno}",
        next_step="nobody foresaw this: the same command with -v shows the whole way there",
    )


def is_refusal(error: Exception) -> bool:
    """Whether the machine refused something, so that the code which asked for it is not to blame."""
    return isinstance(error, OSError) or _out_of_memory(error)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """A next step that offers the closest of the known names, or None when nothing is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else None
