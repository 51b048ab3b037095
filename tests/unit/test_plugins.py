from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from quantlab import hookspecs, plugins
from quantlab.contracts.event import StageEvent, StageStatus
from quantlab.contracts.sections import Choice
from quantlab.errors import PluginError, RecipeError
from quantlab.plugins import Kind, load_registry

POLICY = """
from quantlab.contracts.config import Strict
from quantlab.hookspecs import hookimpl

class Config(Strict):
    depth: int = 1

class Policy:
    "Does nothing."
    name = "{name}"
    version = 1
    Config = Config
    def __init__(self, config):
        self.config = config

@hookimpl
def quantlab_bit_policies():
    return [Policy]
"""


@dataclass
class FakeEntry:
    """An installed entry point."""

    name: str
    load: Callable[[], object]

    @property
    def dist(self) -> SimpleNamespace:
        return SimpleNamespace(name=f"package-{self.name}", version="1.2")


@pytest.fixture(autouse=True)
def nothing_is_loaded_for_good() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make these the installed plugins: name=module, or name=exception to raise on import."""

    def install_plugins(**parts: object) -> None:
        def loader(part: object) -> Callable[[], object]:
            def load() -> object:
                if isinstance(part, BaseException):
                    raise part
                return part

            return load

        entries = [FakeEntry(name, loader(part)) for name, part in parts.items()]
        monkeypatch.setattr(plugins, "entry_points", lambda group: entries if group == "quantlab" else [])

    install_plugins()
    return install_plugins


def module(source: str, name: str = "plugin") -> ModuleType:
    made = ModuleType(name)
    exec(source, made.__dict__)
    return made


def folder(tmp_path: Path, source: str, name: str = "quantlab_own") -> Path:
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text(source)
    return package


def test_a_class_is_found_by_name_with_its_origin(install):
    install(one=module(POLICY.format(name="flat")))
    entry = load_registry().find(Kind.POLICY, "flat")
    assert (entry.name, entry.origin) == ("flat", "one (package-one 1.2)")


def test_create_checks_the_options(install):
    install(one=module(POLICY.format(name="flat")))
    registry = load_registry()
    assert registry.create(Kind.POLICY, Choice(name="flat", options={"depth": 4})).config.depth == 4
    with pytest.raises(RecipeError, match='policy "flat", option "depth"'):
        registry.create(Kind.POLICY, Choice(name="flat", options={"depth": "deep"}))
    with pytest.raises(RecipeError, match='option "dept"'):
        registry.create(Kind.POLICY, Choice(name="flat", options={"dept": 1}))


def test_an_unknown_name_has_the_nearest_and_all_of_them(install):
    install(one=module(POLICY.format(name="flat")), two=module(POLICY.format(name="round")))
    with pytest.raises(RecipeError) as caught:
        load_registry().find(Kind.POLICY, "flut", "a.yaml:3")
    assert str(caught.value).startswith('a.yaml:3: there is no policy "flut"')
    assert "flat, round" in str(caught.value)
    assert 'did you mean "flat"' in str(caught.value)


@pytest.mark.parametrize("failure", [ImportError("no module named gone"), ValueError("bad"), SystemExit(3)])
def test_a_broken_plugin_harms_no_other_and_is_told_when_its_name_is_asked_for(install, failure):
    install(bad=failure, good=module(POLICY.format(name="flat")))
    registry = load_registry()
    assert registry.find(Kind.POLICY, "flat")
    with pytest.raises(PluginError) as caught:
        registry.find(Kind.POLICY, "spiral")
    assert "bad (package-bad 1.2)" in str(caught.value)
    assert str(failure) in str(caught.value)


def test_a_hook_that_raises_sets_its_plugin_aside(install):
    source = "from quantlab.hookspecs import hookimpl\n@hookimpl\ndef quantlab_bit_policies(): raise OSError('no disk')"
    install(bad=module(source), good=module(POLICY.format(name="flat")))
    registry = load_registry()
    assert list(registry.entries(Kind.POLICY)) == ["flat"]
    assert [broken.reason for broken in registry.broken] == ["quantlab_bit_policies failed: OSError: no disk"]


@pytest.mark.parametrize(
    ("kind", "answer", "told"),
    [
        (Kind.POLICY, "[int]", "has no name"),
        (Kind.POLICY, "[type('P', (), {'name': 'p', 'version': 1})]", "has no Config"),
        (Kind.POLICY, "[type('P', (), {'name': 'p', 'Config': Strict})]", "has no version"),
        (Kind.POLICY, "[type('P', (), {'name': '../p', 'Config': Strict, 'version': 1})]", "has a name that is not"),
        (Kind.METHOD, "[type('M', (), {'name': 'm'})]", "is no quantlab.Method"),
        (Kind.POLICY, "3", "'int' object is not iterable"),
    ],
)
def test_what_breaks_its_hooks_contract_is_set_aside(install, kind, answer, told):
    hook = "quantlab_methods" if kind is Kind.METHOD else "quantlab_bit_policies"
    head = "from quantlab.contracts.config import Strict\nfrom quantlab.hookspecs import hookimpl\n"
    install(bad=module(f"{head}@hookimpl\ndef {hook}(): return {answer}"), good=module(POLICY.format(name="flat")))
    registry = load_registry()
    assert list(registry.entries(kind)) == (["flat"] if kind is Kind.POLICY else [])
    assert told in registry.broken[0].reason


def test_a_mistyped_hook_is_told_with_the_nearest(install):
    source = "from quantlab.hookspecs import hookimpl\n@hookimpl\ndef quantlab_bit_polices(): return []"
    install(bad=module(source), good=module(POLICY.format(name="flat")))
    registry = load_registry()
    assert "quantlab_bit_policies" in registry.broken[0].reason or "quantlab_bit_polices" in registry.broken[0].reason
    assert list(registry.entries(Kind.POLICY)) == ["flat"]


def test_a_hook_with_an_unknown_argument_is_set_aside(install):
    source = "from quantlab.hookspecs import hookimpl\n@hookimpl\ndef quantlab_bit_policies(speed): return []"
    install(bad=module(source))
    assert "speed" in load_registry().broken[0].reason


def test_a_plugin_without_hooks_is_told(install):
    install(empty=module("x = 1"))
    assert "implements no hook" in load_registry().broken[0].reason


def test_two_plugins_with_one_name_are_an_error_that_names_both(install):
    install(one=module(POLICY.format(name="flat")), two=module(POLICY.format(name="flat")))
    with pytest.raises(PluginError) as caught:
        load_registry().entries(Kind.POLICY)
    assert "one (package-one 1.2) and two (package-two 1.2)" in str(caught.value)


def test_two_entry_points_to_one_object_are_no_conflict(install):
    same = module(POLICY.format(name="flat"))
    install(one=same, two=same)
    registry = load_registry()
    assert list(registry.entries(Kind.POLICY)) == ["flat"]
    assert registry.broken == []


def test_a_plugin_is_loaded_from_its_folder_its_project_or_its_file(install, tmp_path):
    package = folder(tmp_path, POLICY.format(name="flat"))
    assert list(load_registry([package]).entries(Kind.POLICY)) == ["flat"]
    assert list(load_registry([tmp_path]).entries(Kind.POLICY)) == ["flat"], "the folder of the project"
    file = tmp_path / "single.py"
    file.write_text(POLICY.format(name="other"))
    assert list(load_registry([package, file, package]).entries(Kind.POLICY)) == ["flat", "other"]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import does_not_exist", "No module named 'does_not_exist'"),
        ("def (", "SyntaxError"),
        ("x = 1", "implements no hook"),
    ],
)
def test_a_plugin_that_was_asked_for_must_load(install, tmp_path, source, told):
    package = folder(tmp_path, source)
    with pytest.raises(PluginError) as caught:
        load_registry([package])
    assert told in str(caught.value)
    assert str(package) in str(caught.value)


def test_a_folder_without_a_package_is_told(install, tmp_path):
    with pytest.raises(PluginError, match="no Python package here"):
        load_registry([tmp_path / "nowhere"])


def test_a_folder_named_like_another_package_is_told(install, tmp_path):
    with pytest.raises(PluginError, match='another package named "json" is loaded'):
        load_registry([folder(tmp_path, POLICY.format(name="flat"), "json")])


def test_events_reach_every_listener_and_failures_are_told(install, tmp_path):
    heard = module(
        "from quantlab.hookspecs import hookimpl\nheard = []\n"
        "@hookimpl\ndef quantlab_event(event): heard.append(event.stage)"
    )
    bad = module("from quantlab.hookspecs import hookimpl\n@hookimpl\ndef quantlab_event(): raise ValueError('deaf')")
    install(bad=bad, good=heard)
    warnings: list[str] = []
    event = StageEvent("tune", StageStatus.COMPUTED, 1.5, tmp_path, tmp_path)
    load_registry().emit(event, warnings.append)
    assert heard.__dict__["heard"] == ["tune"]
    assert warnings == ["bad (package-bad 1.2): its listener failed: ValueError: deaf"]


def test_the_trace_switch_prints_registrations_and_calls(install, monkeypatch, capsys):
    monkeypatch.setenv("QUANTLAB_TRACE_PLUGINS", "1")
    install(one=module(POLICY.format(name="flat")))
    load_registry().entries(Kind.POLICY)
    printed = capsys.readouterr().err
    assert "one (package-one 1.2)" in printed
    assert "quantlab_bit_policies" in printed


def test_every_hook_has_a_manual():
    hooks = [value for name, value in vars(hookspecs).items() if name.startswith("quantlab_")]
    assert len(hooks) == len(Kind) + 1
    assert all(len(hook.__doc__.split()) >= 10 for hook in hooks)


def test_a_plugin_for_the_current_hooks_is_loaded(install):
    install(one=module(f"quantlab_api = {hookspecs.API_VERSION}\n{POLICY.format(name='flat')}"))
    assert list(load_registry().entries(Kind.POLICY)) == ["flat"]


@pytest.mark.parametrize(
    ("stated", "told"),
    [("99", "newer quantlab"), ("'1'", "as a whole number"), ("0", "as a whole number"), ("None", "as a whole number")],
)
def test_a_plugin_for_other_hooks_is_set_aside(install, stated, told):
    install(odd=module(f"quantlab_api = {stated}\n{POLICY.format(name='flat')}"))
    registry = load_registry()
    assert list(registry.entries(Kind.POLICY)) == []
    assert told in registry.broken[0].reason and f"quantlab_api = {stated}" in registry.broken[0].reason


def test_a_newer_core_says_what_has_changed_since_the_plugin_was_written():
    plugin = module("quantlab_api = 1")
    with pytest.raises(PluginError) as caught:
        plugins.check_api(plugin, "old (package 1.0)", 3, {2: "allocate gets a problem", 3: "losses return a tensor"})
    assert "2: allocate gets a problem; 3: losses return a tensor" in str(caught.value)
    assert "old (package 1.0)" in str(caught.value)
