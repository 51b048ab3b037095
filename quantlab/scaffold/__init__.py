"""A new plugin package from templates: ``quantlab new plugin``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from quantlab.errors import RecipeError
from quantlab.hookspecs import API_VERSION
from quantlab.plugins import HOOKS, Kind, Registry

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Example:
    """How a recipe uses a plugin of a kind, as YAML with $name in it.

    Attributes:
        uses: the keys that name it.
        method: of the recipe around them.
        base: what the recipe extends, or the keys that stand in its place.
    """

    uses: str = ""
    method: str = "min-max"
    base: str = "extends: base/digits"


_OWN_MODEL = """model: {source: $name, name: tiny}
keep: [{match: first, bits: 8}, {match: last, bits: 8}]
sampling: {steps: 4}
calibrate: {trajectories: 8, samples: 4}
evaluate: {samples: 32, batch: 32, grid: 8}
profiles: {smoke: {}}"""

EXAMPLES: Mapping[Kind, Example] = {
    Kind.METHOD: Example(method="$name"),
    Kind.MODEL: Example(base=_OWN_MODEL),
    Kind.PASS: Example("passes: [$name]"),
    Kind.POLICY: Example("allocate: [uniform, $name]"),
    Kind.SAMPLER: Example("calibrate: {sampler: $name}"),
    Kind.QUANTIZER: Example("weights: {quantizer: $name}"),
    Kind.TUNER: Example("tune: {tuners: [$name]}"),
    Kind.LOSS: Example("tune: {losses: [mse, $name]}", "efficientdm"),
    Kind.CORRECTION: Example("corrections: [$name]"),
    Kind.METRIC: Example("evaluate: {metrics: [fid, $name]}"),
    Kind.REPORTER: Example("# no recipe names a reporter: quantlab run example.yaml --profile smoke --report-to $name"),
}


def new_plugin(name: str, kind: Kind, parent: Path, registry: Registry) -> Path:
    """Write a package with one working plugin, its tests and an example recipe; returns its folder.

    Args:
        name: what recipes will call it, such as "weight-range".
        kind: of the plugin.
        parent: the folder that gets the package's folder, "quantlab-NAME".
        registry: the plugins whose names are taken.

    Raises:
        RecipeError: the name is no word in lower case, is taken, the folder exists, or another plugin's package of
            this name is installed, which this one would replace.
    """
    if not _NAME.fullmatch(name):
        allowed = "lower-case letters and digits with dashes between them, such as weight-range"
        raise RecipeError("this is no name for a plugin", where="NAME", got=repr(name), allowed=allowed)
    if name in registry.entries(kind):
        taken = registry.entries(kind)[name].origin
        raise RecipeError(f'there is a {kind} "{name}" already', got=taken, next_step="choose another name")
    folder = parent / f"quantlab-{name}"
    if _is_installed(folder.name):
        raise RecipeError(
            f'a package "{folder.name}" is installed already, and this one would replace it',
            next_step=f"choose another name, or add the hook of a {kind} to that package",
        )
    if folder.exists():
        raise RecipeError("the folder exists", where=str(folder), next_step="choose another name, or remove it")
    for path, text in _rendered(name, kind).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return folder


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _rendered(name: str, kind: Kind) -> dict[str, str]:
    """Every file of the package: its path and its text."""
    package, example = f"quantlab_{name.replace('-', '_')}", EXAMPLES[kind]
    is_method = kind is Kind.METHOD
    words = {
        "name": name,
        "kind": kind.value,
        "plural": kind.plural,
        "package": package,
        "hook": HOOKS[kind],
        "object": "METHOD" if is_method else "".join(map(str.capitalize, [*name.split("-"), kind.value])),
        "returned": "Method" if is_method else "type",
        "imported": "Method, hookimpl" if is_method else "hookimpl",
        "api": str(API_VERSION),
        "where": f"The method is `{package}/methods/{name}.yaml`"
        if is_method
        else f"The class is in `{package}/{kind.value}_plugin.py`",
        "changed": "What it chooses is part of every stored result's name: a change computes anew."
        if is_method
        else "Raise `version` of the class whenever its numbers change, so that stored results are not reused.",
        "arguments": ', model="tiny"' if kind is Kind.MODEL else "",
    }
    words["base"] = Template(example.base).substitute(words)
    words["method"] = Template(example.method).substitute(words)
    uses = Template(example.uses).substitute(words)
    words["uses"] = f"{uses}\n" if uses else ""
    templates = files("quantlab.scaffold") / "templates"
    places = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        "example.yaml": "example.yaml",
        "package.py": f"{package}/__init__.py",
        "tests.py": "tests/test_plugin.py",
    }
    rendered = {place: _render(templates / "shared" / f"{file}.txt", words) for file, place in places.items()}
    rendered[f"{package}/{kind.value}_plugin.py"] = _render(templates / "kinds" / f"{kind.value}.py.txt", words)
    if is_method:
        rendered[f"{package}/methods/{name}.yaml"] = _render(templates / "kinds" / "method.yaml.txt", words)
    return rendered


def _render(template: Traversable, words: Mapping[str, str]) -> str:
    return Template(template.read_text(encoding="utf-8")).substitute(words)
