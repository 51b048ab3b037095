"""Finds plugins, keeps a broken one from harming the others, and looks their classes up by name."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from quantlab import hookspecs
from quantlab.errors import PluginError, RecipeError, nearest

if TYPE_CHECKING:
    from pydantic import BaseModel

    from quantlab.contracts.event import StageEvent
    from quantlab.contracts.method import Method
    from quantlab.contracts.sections import Choice

GROUP = "quantlab"
"""The entry point group of plugins."""
TRACE_VARIABLE = "QUANTLAB_TRACE_PLUGINS"
_NAME = re.compile(r"\w[\w.-]*")


class Kind(StrEnum):
    """What a plugin can give."""

    METHOD = "method"
    MODEL = "model"
    PASS = "pass"
    POLICY = "policy"
    SAMPLER = "sampler"
    QUANTIZER = "quantizer"
    TUNER = "tuner"
    LOSS = "loss"
    CORRECTION = "correction"
    METRIC = "metric"
    REPORTER = "reporter"

    @property
    def plural(self) -> str:
        """As ``quantlab list`` takes it: "policies"."""
        return {Kind.PASS: "passes", Kind.POLICY: "policies", Kind.LOSS: "losses"}.get(self, f"{self}s")


HOOKS: Mapping[Kind, str] = {
    Kind.METHOD: "quantlab_methods",
    Kind.MODEL: "quantlab_models",
    Kind.PASS: "quantlab_passes",
    Kind.POLICY: "quantlab_bit_policies",
    Kind.SAMPLER: "quantlab_samplers",
    Kind.QUANTIZER: "quantlab_quantizers",
    Kind.TUNER: "quantlab_tuners",
    Kind.LOSS: "quantlab_losses",
    Kind.CORRECTION: "quantlab_corrections",
    Kind.METRIC: "quantlab_metrics",
    Kind.REPORTER: "quantlab_reporters",
}
"""The hook of each kind."""


@dataclass(frozen=True)
class Entry:
    """One name a recipe can use.

    Attributes:
        value: the class, or the ``Method``.
        origin: the plugin and the package it came with.
    """

    kind: Kind
    name: str
    value: Any
    origin: str


@dataclass(frozen=True)
class Broken:
    """A plugin that was set aside, and why."""

    origin: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


@dataclass
class Registry:
    """The classes and methods of every plugin, by kind and name; a kind is asked for when it is first needed."""

    manager: pluggy.PluginManager
    broken: list[Broken] = field(default_factory=list[Broken])
    _entries: dict[Kind, Mapping[str, Entry]] = field(default_factory=dict[Kind, Mapping[str, Entry]])
    paths: tuple[Path, ...] = ()  # the folders of plugins that are not installed, for a process that needs the same

    def entries(self, kind: Kind) -> Mapping[str, Entry]:
        """Everything of a kind, by name, in alphabetical order.

        Raises:
            PluginError: two plugins give one name to different objects.
        """
        if kind not in self._entries:
            found: dict[str, Entry] = {}
            for origin, value in self._collect(kind):
                entry = Entry(kind, value.name, value, origin)
                known = found.setdefault(entry.name, entry)
                if known.value is not value:
                    raise PluginError(
                        f'two plugins give a {kind} named "{entry.name}"',
                        got=f"{known.origin} and {origin}",
                        next_step="uninstall one of the two packages, or leave one out of --plugin",
                    )
            self._entries[kind] = dict(sorted(found.items()))
        return self._entries[kind]

    def find(self, kind: Kind, name: str, where: str | None = None) -> Entry:
        """The entry of a name.

        Args:
            where: file and line that asked for it, for the message.

        Raises:
            RecipeError: nothing has this name; the message has the nearest name and all of them.
            PluginError: nothing has this name, and a plugin that may have given it could not be loaded.
        """
        known = self.entries(kind)
        if name in known:
            return known[name]
        close = nearest(name, known)
        failed = "".join(f"\n  note: a plugin could not be loaded and may give it: {broken}" for broken in self.broken)
        error = PluginError if self.broken and close is None else RecipeError
        raise error(
            f'there is no {kind} "{name}"',
            where=where,
            allowed=(", ".join(known) or "none is installed") + failed,
            next_step=close or f"list them: quantlab list {kind.plural}",
        )

    def method(self, name: str, where: str | None = None) -> Method:
        """A method by name; raises as ``find`` does."""
        return self.find(Kind.METHOD, name, where).value

    def config(self, kind: Kind, choice: Choice) -> BaseModel:
        """The checked options of a choice.

        Raises:
            RecipeError: the name is unknown or an option is wrong.
        """
        from pydantic import ValidationError

        cls = self.find(kind, choice.name).value
        try:
            return cls.Config.model_validate(choice.options)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            option = ".".join(map(str, first["loc"]))
            message = f'{kind} "{choice.name}", option "{option}": {first["msg"]}'
            raise RecipeError(message, got=first["input"]) from error

    def entry_of(self, cls: type) -> Entry | None:
        """The entry of a class; None for one that no plugin gives."""
        return next((entry for kind in Kind for entry in self.entries(kind).values() if entry.value is cls), None)

    def create(self, kind: Kind, choice: Choice) -> Any:
        """The chosen class, built with its checked options; raises as ``config`` does."""
        return self.find(kind, choice.name).value(self.config(kind, choice))

    def emit(self, event: StageEvent, warn: Callable[[str], None]) -> None:
        """Tell every listener that a stage has ended; ``warn`` gets the failure of a listener, which is ignored."""
        for plugin, origin in _plugins(self.manager):
            try:
                _call(self.manager, plugin, "quantlab_event", event=event)
            except Exception as error:
                warn(f"{origin}: its listener failed: {_reason(error)}")

    def _collect(self, kind: Kind) -> Iterable[tuple[str, Any]]:
        """What each plugin returns for a kind; one that fails, or returns something else, is set aside."""
        hook = HOOKS[kind]
        for plugin, origin in _plugins(self.manager):
            try:
                values = [value for returned in _call(self.manager, plugin, hook) for value in returned]
            except Exception as error:
                self.broken.append(Broken(origin, f"{hook} failed: {_reason(error)}"))
                continue
            for value in values:
                lacking = _lacking(kind, value)
                if lacking is None:
                    yield origin, value
                else:
                    self.broken.append(Broken(origin, f"{hook} returned {value!r}, which {lacking}"))


def load_registry(paths: Sequence[str | Path] = ()) -> Registry:
    """Find and register every plugin, the built-ins among them; a broken one is set aside in ``Registry.broken``.

    Args:
        paths: plugin packages to load from folders (``--plugin``), besides the installed ones.

    Raises:
        PluginError: a plugin in ``paths`` cannot be loaded; whoever names a plugin wants it.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    if os.environ.get(TRACE_VARIABLE, "0") not in ("", "0"):
        manager.trace.root.setwriter(lambda message: print(message, end="", file=sys.stderr))
        manager.enable_tracing()
    registry = Registry(manager, paths=tuple(map(Path, paths)))
    for entry in entry_points(group=GROUP):
        try:
            _register(manager, entry.load(), _origin(entry))
        except (Exception, SystemExit) as error:
            registry.broken.append(Broken(_origin(entry), _reason(error)))
    for path in paths:
        try:
            _register(manager, _load_folder(Path(path)), str(path))
        except PluginError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"the plugin cannot be loaded: {_reason(error)}", where=str(path)) from error
    return registry


def _plugins(manager: pluggy.PluginManager) -> list[tuple[Any, str]]:
    """Plugins in the order of their registration, with their origins."""
    return [(plugin, name) for name, plugin in manager.list_name_plugin() if plugin is not None]


def _call(manager: pluggy.PluginManager, plugin: object, hook: str, **arguments: object) -> list[Any]:
    """Call the hook of one plugin alone, so that its failure is known to be its own."""
    others = [other for other in manager.get_plugins() if other is not plugin]
    return manager.subset_hook_caller(hook, others)(**arguments)


def _register(manager: pluggy.PluginManager, plugin: object, origin: str) -> None:
    """Register a plugin and check its hooks; a plugin that is there already, from a second package, is left alone."""
    if manager.is_registered(plugin):
        return
    check_api(plugin, origin)
    try:
        manager.register(plugin, name=origin)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        if manager.is_registered(plugin):
            manager.unregister(plugin)
        known = [name for name in vars(hookspecs) if name.startswith("quantlab_")]
        known.append(hookspecs.API_ATTRIBUTE)
        mistyped = [name for name in vars(plugin) if name.startswith("quantlab_") and name not in known]
        hint = nearest(mistyped[0], known) if mistyped else None
        raise PluginError(f"a hook is wrong: {error}", where=origin, next_step=hint) from error
    manager.trace("registered", origin)
    if not manager.get_hookcallers(plugin):
        manager.unregister(plugin)
        raise PluginError(
            "the plugin implements no hook", where=origin, next_step="mark its functions with @quantlab.hookimpl"
        )


def check_api(
    plugin: object,
    origin: str,
    current: int = hookspecs.API_VERSION,
    changes: Mapping[int, str] = hookspecs.API_CHANGES,
) -> None:
    """Raise PluginError for a plugin that was written for another version of the hooks; it says what has changed."""
    stated = getattr(plugin, hookspecs.API_ATTRIBUTE, 1)
    if stated == current and isinstance(stated, int):
        return
    told = f"{hookspecs.API_ATTRIBUTE} = {stated!r}"
    if not isinstance(stated, int) or stated < 1:
        what = "a plugin states the version of the hooks it was written for as a whole number"
        raise PluginError(what, where=origin, got=told, next_step=f"write {hookspecs.API_ATTRIBUTE} = {current}")
    if stated > current:
        raise PluginError(
            "the plugin was written for a newer quantlab",
            where=origin,
            got=told,
            allowed=f"up to {current}",
            next_step="pip install --upgrade quantlab",
        )
    raise PluginError(
        "the plugin was written for an older quantlab",
        where=origin,
        got=f"{told}, and the hooks are at {current}",
        next_step="; ".join(f"{version}: {changes[version]}" for version in range(stated + 1, current + 1)),
    )


def _load_folder(path: Path) -> ModuleType:
    """Import a package from its folder, from the folder of its project, or a module from its file."""
    found = [path / "__init__.py", *sorted(path.glob("*/__init__.py"))] if path.is_dir() else [path]
    file = next((candidate for candidate in found if candidate.is_file() and candidate.suffix == ".py"), None)
    if file is None:
        raise PluginError("there is no Python package here", where=str(path), next_step="give the plugin's folder")
    package = file.name == "__init__.py"
    name = file.parent.name if package else file.stem
    loaded = sys.modules.get(name)
    if loaded is not None:
        if Path(loaded.__file__ or "").resolve() == file.resolve():
            return loaded
        raise PluginError(f'another package named "{name}" is loaded', where=str(path), got=str(loaded.__file__))
    folders = [str(file.parent)] if package else None
    spec = importlib.util.spec_from_file_location(name, file.resolve(), submodule_search_locations=folders)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _lacking(kind: Kind, value: object) -> str | None:
    """What keeps a hook's answer from being used, as the end of a sentence; None for nothing."""
    from pydantic import BaseModel

    from quantlab.contracts.method import Method

    name = getattr(value, "name", None)
    if not isinstance(name, str):
        return "has no name"
    if not _NAME.fullmatch(name):
        return "has a name that is not letters, digits, dots and dashes"  # a folder is named after it
    if kind is Kind.METHOD:
        return None if isinstance(value, Method) else "is no quantlab.Method"
    config = getattr(value, "Config", None)
    if not (isinstance(config, type) and issubclass(config, BaseModel)):
        return "has no Config of its options"
    return None if isinstance(getattr(value, "version", None), int) else "has no version, an integer"


def _origin(entry: EntryPoint) -> str:
    return f"{entry.name} ({entry.dist.name} {entry.dist.version})" if entry.dist else entry.name


def _reason(error: BaseException) -> str:
    """One line about what a plugin raised."""
    line = " ".join(str(error).split())
    return line if isinstance(error, PluginError) else f"{type(error).__name__}: {line}"
