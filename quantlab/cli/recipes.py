"""Commands about recipes and what they choose from: list, show, validate, schema, init, migrate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantlab.cli.common import PluginOption, ProfileOption, SetOption, VerboseOption, load, told
from quantlab.errors import RecipeError

if TYPE_CHECKING:
    from quantlab.plugins import Registry
    from quantlab.recipe.load import LoadedRecipe


def list_names(
    kind: Annotated[str | None, typer.Argument(help="methods, policies, ..., recipes; everything without it")] = None,
    plugins: PluginOption = [],  # noqa: B006
    verbose: VerboseOption = False,
) -> None:
    """List what a recipe can choose from."""
    with told(verbose):
        from quantlab.plugins import load_registry
        from quantlab.recipe.catalogue import catalogue

        print(catalogue(load_registry(plugins), kind))


def show(
    what: Annotated[str, typer.Argument(metavar="RECIPE|KIND|sites", help="a recipe, a kind, or the word sites")],
    name: Annotated[str | None, typer.Argument(help="of that kind; after the word sites, a recipe")] = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="every value with where it came from")] = False,
    overrides: SetOption = [],  # noqa: B006
    profile: ProfileOption = None,
    plugins: PluginOption = [],  # noqa: B006
    verbose: VerboseOption = False,
) -> None:
    """Show a recipe, the sites of its model, or one name of a kind: show policy uniform."""
    with told(verbose):
        if name is None:
            _needs_no_name(what, plugins)
            loaded = load(what, overrides, plugins, profile)
            print(_resolved(loaded) if resolved else loaded.text)
        elif what == "sites":
            print(_sites(load(name, overrides, plugins, profile)))
        else:
            print(_described(what, name, plugins))


def _needs_no_name(what: str, plugins: list[Path]) -> None:
    """Raise RecipeError for a kind without a name, and for a name without its kind."""
    from quantlab.plugins import Kind, load_registry
    from quantlab.recipe.find import is_recipe

    kind = next((kind for kind in Kind if what in (kind.value, kind.plural)), None)
    if kind or what == "sites":
        known = f"the names: quantlab list {kind.plural if kind else 'recipes'}"
        raise RecipeError(f'"{what}" needs a name after it', next_step=f"quantlab show {what} NAME; {known}")
    if not is_recipe(what):
        registry = load_registry(plugins)
        kinds = [kind for kind in Kind if what in registry.entries(kind)]
        if kinds:
            ways = " or ".join(f"quantlab show {kind} {what}" for kind in kinds)
            raise RecipeError(f'"{what}" is no recipe, but a {" and a ".join(kinds)}', next_step=ways)


def _resolved(loaded: LoadedRecipe) -> str:
    from quantlab.recipe.explain import explain

    return explain(loaded)


def _sites(loaded: LoadedRecipe) -> str:
    from quantlab.run import site_table

    return site_table(loaded)


def _described(kind: str, name: str, plugins: list[Path]) -> str:
    from quantlab.plugins import load_registry
    from quantlab.recipe.catalogue import describe, kind_of

    return describe(load_registry(plugins).find(kind_of(kind), name))


def validate(
    recipes: Annotated[list[str], typer.Argument(metavar="FILE...", help="recipes and benches, as files or by name")],
    overrides: SetOption = [],  # noqa: B006
    profile: ProfileOption = None,
    plugins: PluginOption = [],  # noqa: B006
    verbose: VerboseOption = False,
) -> None:
    """Check keys, types, values, names and options of recipes and benches; site patterns need --dry-run."""
    with told(verbose):
        from quantlab.plugins import load_registry

        registry = load_registry(plugins)
        for recipe in recipes:
            print(_validated(recipe, overrides, registry, profile))


def _validated(name: str, overrides: list[str], registry: Registry, profile: str | None) -> str:
    from quantlab.recipe.find import find_recipe
    from quantlab.recipe.load import is_bench, load_recipe

    path = find_recipe(name)
    if not is_bench(path):
        loaded = load_recipe(name, overrides, registry, profile)
        return f"{loaded.path}: valid; method {loaded.recipe.method}, {len(loaded.recipe.baselines)} baselines"
    if overrides or profile:
        raise RecipeError("a bench sets its values itself", where=str(path), got="--set or --profile")
    from quantlab.bench import cells

    return f"{path}: valid; a bench of {len(cells(path, registry))} cells"


def schema(
    output: Annotated[Path | None, typer.Option("--output", help="a file; standard output without it")] = None,
    plugins: PluginOption = [],  # noqa: B006
    verbose: VerboseOption = False,
) -> None:
    """Write the JSON schema of recipes, with the options of the plugins that are installed, for editors."""
    with told(verbose):
        from quantlab.plugins import load_registry
        from quantlab.recipe.json_schema import recipe_schema
        from quantlab.recipe.starter import write_schema
        from quantlab.store import json_text

        registry = load_registry(plugins)
        print(write_schema(output, registry) if output else json_text(recipe_schema(registry)))


def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="the recipe to write")] = Path("recipe.yaml"),
    plugins: PluginOption = [],  # noqa: B006
    verbose: VerboseOption = False,
) -> None:
    """Write a recipe to begin with, and the schema that an editor checks it with."""
    with told(verbose):
        from quantlab.plugins import load_registry
        from quantlab.recipe.starter import write_starter

        written = write_starter(path, load_registry(plugins))
        print(f"{written}\nnext: quantlab run {written} --profile smoke")


def migrate(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="a recipe of an older version")],
    write: Annotated[bool, typer.Option("--write", help="replace the file; print without it")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Bring a recipe of an older version forward; comments but the first are lost."""
    with told(verbose):
        from quantlab.recipe.migrate import migrated
        from quantlab.store import atomic_write_text

        text = migrated(path)
        if text is not None and write:
            atomic_write_text(path, text)
        print(f"{path}: is of the current version, nothing to do" if text is None else path if write else text)
