"""From a file, a method and overrides to one checked recipe.

What is given later wins: base recipes, the method's fragment, the recipe's own keys, the profile, ``--set``. Mappings
are merged key by key; lists and plain values are replaced. So a base says what an experiment is, a method what a paper
chose, and a recipe has the last word over both.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path

from quantlab.errors import RecipeError, nearest
from quantlab.plugins import Registry, load_registry
from quantlab.recipe.check import check, check_corrections, check_model, check_plugins, short_form
from quantlab.recipe.expected import check_expected
from quantlab.recipe.find import find_recipe, recipe_name
from quantlab.recipe.layers import KeyPath, Node, merge, node_of, parse_yaml, read_yaml, replace, without
from quantlab.recipe.schema import SCHEMA_VERSION, Recipe

METHOD_KEYS: Collection[KeyPath] = (
    ("passes",),
    ("allocate",),
    ("weights",),
    ("activations",),
    ("split_skip",),
    ("inputs_from",),
    ("calibrate", "sampler"),
    ("tune", "tuners"),
    ("tune", "losses"),
    ("corrections",),
)
"""What makes a method: set in a recipe, a profile or by ``--set``, these change its own method, never a baseline."""


@dataclass(frozen=True)
class Override:
    """One ``--set a.b=c``."""

    path: tuple[str, ...]
    value: Node


@dataclass(frozen=True)
class Layers:
    """The parts of a recipe before they are laid on one another."""

    base: Node
    own: Node
    profile: Node
    overrides: tuple[Override, ...]

    def shared(self) -> Layers:
        """Without what belongs to the recipe's own method."""
        own, profile = self.own, self.profile
        for path in METHOD_KEYS:
            own, profile = without(own, path), without(profile, path)
        kept = (item for item in self.overrides if not any(item.path[: len(path)] == path for path in METHOD_KEYS))
        return Layers(self.base, own, profile, tuple(kept))

    def resolve(self, fragment: Node | None = None) -> Node:
        """One tree; ``fragment`` is the method's."""
        root = merge(self.base, fragment) if fragment else self.base
        root = merge(merge(root, self.own), self.profile)
        for item in self.overrides:
            root = replace(root, item.path, item.value)
        return root


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as its files say it, read but not checked."""

    path: Path
    text: str
    layers: Layers


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe with its history.

    Attributes:
        recipe: the recipe; the options of every plugin are complete.
        origin: dotted key -> "file:line", "method mpq-dm", "--set a.b=c" or "default".
        text: the file as given.
        path: the file.
        registry: the plugins it was checked against.
        layers: what it was put together from.
        root: the layers laid on one another, every node with its origin; no default is in it.
    """

    recipe: Recipe
    origin: Mapping[str, str]
    text: str
    path: Path
    registry: Registry
    layers: Layers
    root: Node


def load_recipe(
    path_or_name: str | Path,
    overrides: Sequence[str] = (),
    registry: Registry | None = None,
    profile: str | None = None,
) -> LoadedRecipe:
    """Load a recipe from a path, or an installed one by name, and check all of it, its baselines included.

    Args:
        path_or_name: "recipes/digits/mpq-dm-w2a4.yaml", or "digits/mpq-dm-w2a4".
        overrides: "a.b=c", values as in YAML; an item of a list by its index, "keep.0.bits=4".
        registry: the plugins; those that are installed without it.
        profile: the name of a set of values under the recipe's ``profiles``.

    Raises:
        RecipeError: anything wrong with the recipe, with file and line.
    """
    return resolve_recipe(read_recipe(path_or_name, profile), overrides, registry or load_registry())


def is_bench(path: Path) -> bool:
    """Whether a file is a bench rather than a recipe; raises RecipeError for one that cannot be read."""
    return bool(read_yaml(path)[0].reach(("matrices",))[1])


def read_recipe(path_or_name: str | Path, profile: str | None = None) -> RecipeFile:
    """Read a recipe and all that it extends; raises RecipeError for what can be seen before overrides are known."""
    path = find_recipe(path_or_name)
    own, text = _read(path)
    base, profiles = _extended(own, path, ())
    base = merge(Node({"name": node_of(recipe_name(path), "the file's name")}, str(path)), base)
    own, own_profiles = _split(own)
    chosen = _choose_profile(merge(profiles, own_profiles), profile, path)
    return RecipeFile(path, text, Layers(base, own, chosen, ()))


def resolve_recipe(file: RecipeFile, overrides: Sequence[str], registry: Registry) -> LoadedRecipe:
    """The checked recipe of a file that was read once for many overrides; raises as ``load_recipe``."""
    layers = replace_fields(file.layers, overrides=tuple(map(parse_override, overrides)))
    recipe, root = _resolve(layers, registry)
    loaded = LoadedRecipe(recipe, _origins(recipe, root), file.text, file.path, registry, layers, root)
    for index, baseline in enumerate(recipe.baselines):
        registry.method(baseline, root.reach(("baselines", index))[0].origin)
        for_method(loaded, baseline)
    return loaded


def for_method(loaded: LoadedRecipe, method: str) -> Recipe:
    """The same experiment with another method.

    What METHOD_KEYS lists is left out of the recipe's own keys, its profile and ``--set``, since it was written for
    its own method; base recipes stay, and the other method's fragment takes its place. For the recipe's own method it
    is the recipe itself.
    """
    if method == loaded.recipe.method:
        return loaded.recipe
    swap = Override(("method",), Node(method, f"baseline {method}"))
    shared = loaded.layers.shared()
    layers = Layers(shared.base, shared.own, shared.profile, (*shared.overrides, swap))
    return _resolve(layers, loaded.registry)[0]


def parse_override(text: str) -> Override:
    """Read "a.b=c"; raises RecipeError when it is not of this form."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        example = "write for example --set tune.iterations=50"
        raise RecipeError("an override has the form a.b=c", where="--set", got=text, next_step=example)
    origin = f"--set {text}"
    return Override(tuple(key.split(".")), parse_yaml(value, origin, numbered=False))


def _resolve(layers: Layers, registry: Registry) -> tuple[Recipe, Node]:
    """Lay the layers on one another with the fragment of the method they name, and check the result."""
    name = layers.resolve().reach(("method",))
    fragment = None
    if name[1] and isinstance(name[0].value, str):
        method = registry.method(name[0].value, name[0].origin)
        fragment = node_of(method.fragment, f"method {method.name}")
    root = layers.resolve(fragment)
    recipe = check_plugins(check(Recipe, root), root, registry)
    if recipe.seed in recipe.evaluate.noise_seeds:
        raise RecipeError(
            "with this seed a method is calibrated on the very noise that it is evaluated with",
            where=root.reach(("seed",))[0].origin,
            got=recipe.seed,
            next_step="choose another seed, or another evaluate.noise_seed",
        )
    check_corrections(recipe, root)
    check_model(recipe, root, registry)
    check_expected(recipe, root, registry)
    return recipe, root


def _read(path: Path) -> tuple[Node, str]:
    """A recipe file; its version is looked at first, since another version has other keys."""
    node, text = read_yaml(path)
    version, found = node.reach(("version",))
    if found and (version.value != SCHEMA_VERSION or type(version.value) is not int):
        older = type(version.value) is int and 0 < version.value < SCHEMA_VERSION
        raise RecipeError(
            f"this quantlab reads recipes of version {SCHEMA_VERSION}",
            where=version.origin,
            got=repr(version.plain),
            next_step=f"quantlab migrate {path}" if older else None,
        )
    if node.reach(("matrices",))[1]:
        raise RecipeError(
            "this is a bench, not a recipe", where=str(path), next_step=f"quantlab bench {recipe_name(path)}"
        )
    return node, text


def _split(node: Node) -> tuple[Node, Node]:
    """A file's keys without ``extends`` and ``profiles``, and its profiles."""
    profiles, found = node.reach(("profiles",))
    profiles = profiles if found else Node({}, node.origin)
    sound = isinstance(profiles.value, Mapping) and all(isinstance(p.value, Mapping) for p in profiles.value.values())
    if not sound:
        raise RecipeError('"profiles" maps names to recipe keys', where=profiles.origin)
    return without(without(node, ("extends",)), ("profiles",)), profiles


def _extended(node: Node, path: Path, visited: tuple[Path, ...]) -> tuple[Node, Node]:
    """Everything a file extends as one tree, and its profiles; later names in ``extends`` win over earlier ones."""
    base, profiles = Node({}, str(path)), Node({}, str(path))
    extends, found = node.reach(("extends",))
    names = extends.plain if isinstance(extends.plain, list) else [extends.plain]
    for name in names if found else ():
        if not isinstance(name, str):
            raise RecipeError('"extends" is a name or a list of names', where=extends.origin, got=name)
        parent = _parent(name, path, extends.origin)
        if parent.resolve() in (*visited, path.resolve()):
            raise RecipeError("recipes extend one another in a circle", where=extends.origin, got=name)
        content, _ = _read(parent)
        above, above_profiles = _extended(content, parent, (*visited, path.resolve()))
        content, content_profiles = _split(content)
        base = merge(merge(base, above), content)
        profiles = merge(merge(profiles, above_profiles), content_profiles)
    return base, profiles


def _parent(name: str, path: Path, origin: str) -> Path:
    try:
        return find_recipe(name, path.parent)
    except RecipeError as error:
        raise RecipeError(error.what, where=origin, allowed=error.allowed, next_step=error.next_step) from error


def _choose_profile(profiles: Node, name: str | None, path: Path) -> Node:
    if name is None:
        return Node({}, str(path))
    node, found = profiles.reach((name,))
    if not found:
        known = list(profiles.value) if isinstance(profiles.value, Mapping) else []
        raise RecipeError(
            f'there is no profile "{name}"',
            where=str(path),
            allowed=", ".join(map(str, known)) or "the recipe has none",
            next_step=nearest(name, map(str, known)),
        )
    return node


def _origins(recipe: Recipe, root: Node) -> dict[str, str]:
    """Where each value of the recipe came from."""
    found: dict[str, str] = {}

    def visit(value: object, path: KeyPath) -> None:
        match value:
            case dict() if value:
                for key, child in value.items():
                    visit(child, (*path, key))
            case list() if value and (path in METHOD_KEYS or any(isinstance(child, dict | list) for child in value)):
                for index, child in enumerate(value):
                    visit(child, (*path, index))
            case _:
                node, reached = root.reach(path)
                found[".".join(map(str, path))] = node.origin if reached == path else "default"

    visit(short_form(recipe.model_dump(mode="json")), ())
    return found
