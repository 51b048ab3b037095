"""The pages of the reference that are written from the code: recipe, command line, parts, hooks, methods, API."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click
import typer.main
from pydantic import BaseModel

import quantlab
from quantlab import errors, hookspecs
from quantlab.cli import INTERRUPTED, app
from quantlab.contracts.method import Method
from quantlab.plugins import Entry, Kind, Registry, load_registry
from quantlab.recipe.check import short_form
from quantlab.recipe.options import option_types
from quantlab.recipe.schema import Recipe
from quantlab.reproduce import OUTSIDE, UNDECIDED

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

EDIT_NOTE = "This page is written from the code."


def pages() -> dict[str, str]:
    """The text of every page by its path on the site."""
    registry = load_registry()
    return {
        "reference/recipe.md": recipe_page(),
        "reference/command-line.md": command_page(),
        "reference/parts.md": parts_page(registry),
        "reference/hooks.md": hooks_page(),
        "reference/api.md": api_page(),
        "reference/exit-codes.md": exit_code_page(),
        "methods/index.md": methods_page(registry),
    }


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )


def options_table(model: type[BaseModel]) -> str:
    """The keys of a pydantic model: name, type, default, meaning."""
    types = option_types(model)
    rows = [
        (f"`{name}`", types.get(name, ""), _default(field), field.description or "")
        for name, field in model.model_fields.items()
    ]
    return table(("key", "type", "default", "meaning"), rows) if rows else "No options."


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    plain = json.loads(
        json.dumps(
            value, default=lambda part: part.model_dump(mode="json") if isinstance(part, BaseModel) else str(part)
        )
    )
    return f"`{json.dumps(short_form(plain), ensure_ascii=False)}`"


def recipe_page() -> str:
    """Every key of a recipe, section by section."""
    parts = [
        "# Recipe",
        f"{EDIT_NOTE} A recipe is YAML; `quantlab show --resolved RECIPE` prints every value with where it came from, "
        "and `quantlab validate RECIPE` checks it. Unknown keys are errors.",
        "## How a recipe is put together",
        "Later wins: base recipes (`extends`), the method's fragment, the recipe's own keys, the profile "
        "(`--profile`), `--set a.b=c`. Mappings are merged key by key; lists and plain values are replaced. `extends` "
        "names one file or several; `profiles` maps names to keys that `--profile` lays on top.",
        "## Keys",
        options_table(Recipe),
    ]
    for model in _sections(Recipe):
        parts += [f"### {model.__name__}", inspect.cleandoc(model.__doc__ or ""), options_table(model)]
    return "\n\n".join(parts) + "\n"


def _sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if annotation not in found:
                found.append(annotation)
                for field in annotation.model_fields.values():
                    visit(field.annotation)
            return
        for inner in getattr(annotation, "__args__", ()):
            visit(inner)

    for field in model.model_fields.values():
        visit(field.annotation)
    return found


def command_page() -> str:
    """Every command with its arguments and options."""
    root = typer.main.get_command(app)
    parts = ["# Command line", EDIT_NOTE]
    with click.Context(root, info_name="quantlab") as context:
        for path, command in _commands(root, context, ("quantlab",)):
            parts += [f"## {' '.join(path)}", command.help or "", _parameters(command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _commands(command: Any, context: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    inner = getattr(command, "commands", {})
    if not inner or getattr(command, "invoke_without_command", False):
        yield path, command
    for name in inner:
        yield from _commands(inner[name], context, (*path, name))


def _parameters(command: Any) -> str:
    rows = []
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        names = ", ".join(f"`{name}`" for name in getattr(parameter, "opts", ()))
        if parameter.param_type_name == "argument":
            names = f"`{parameter.metavar or parameter.name.upper()}`"
        default = parameter.default
        if callable(default) or default in (None, False, [], ()) or "UNSET" in str(default):
            default = ""
        rows.append((names, str(getattr(parameter, "help", "") or ""), f"`{default}`" if default != "" else ""))
    return table(("argument", "meaning", "default"), rows) if rows else ""


def parts_page(registry: Registry) -> str:
    """Every class of every kind with its options."""
    parts = ["# Parts", f"{EDIT_NOTE} What a recipe chooses from, besides [methods](../methods/index.md)."]
    for kind in Kind:
        if kind is Kind.METHOD:
            continue
        parts.append(f"## {kind.plural.capitalize()}")
        for entry in registry.entries(kind).values():
            parts.append(part_section(entry))
    return "\n\n".join(parts) + "\n"


def part_section(entry: Entry) -> str:
    """A class of a plugin with its options."""
    return "\n\n".join([f"### {entry.name} ({entry.kind})", _documented(entry), options_table(entry.value.Config)])


def _documented(entry: Entry) -> str:
    """Docstring, paper and origin of a class, as Markdown."""
    text = inspect.cleandoc(entry.value.__doc__ or "").partition("\nArgs:")[0].partition("\nAttributes:")[0]
    text = text.partition("\nRaises:")[0].replace("``", "`").strip()
    paper = getattr(entry.value, "paper", None)
    lines = (
        [text]
        + ([f"*{paper}*"] if paper else [])
        + [f"From `{entry.origin.partition(' ')[0]}`, version {entry.value.version}."]
    )
    return "\n\n".join(lines)


def methods_page(registry: Registry) -> str:
    """Every method with its fragment and the page of its family."""
    families: dict[str, list[Entry]] = {}
    for entry in registry.entries(Kind.METHOD).values():
        families.setdefault(entry.origin.partition(" ")[0], []).append(entry)
    parts = [
        "# Methods",
        "A method is a fragment of a recipe that a plugin brings. The page of a family has its equations, the function "
        "that computes each, its options, and where paper and code differ. What ranks where is in "
        "[results](../results.md).",
    ]
    for family, entries in sorted(families.items()):
        page = family if family != "builtin" else None
        parts.append(f"## {family}" + (f"\n\n[Page of this family]({page}.md)" if page else ""))
        for entry in entries:
            method: Method = entry.value
            kind = "needs no data" if method.data_free else "trains on real data"
            source = f" *{method.paper}*" if method.paper else ""
            fragment = json.dumps(method.fragment, indent=1, ensure_ascii=False)
            parts.append(f"### {entry.name}\n\n{method.summary} ({kind}).{source}\n\n```json\n{fragment}\n```")
    return "\n\n".join(parts) + "\n"


def hooks_page() -> str:
    """The hook specifications with their docstrings."""
    intro = inspect.cleandoc(hookspecs.__doc__ or "").replace("``", "`").replace("::\n\n", ":\n\n")
    parts = ["# Hooks", EDIT_NOTE, intro]
    for name, hook in vars(hookspecs).items():
        if name.startswith("quantlab_"):
            text = inspect.cleandoc(hook.__doc__ or "").replace("``", "`")
            parts += [f"## {name}", f"```python\ndef {name}{inspect.signature(hook)}\n```", text]
    return "\n\n".join(parts) + "\n"


def api_page() -> str:
    """The public names, each with its docstring."""
    parts = [
        "# Python",
        f"{EDIT_NOTE} The names that `quantlab` exports; whatever else it holds may change at any time.",
    ]
    for name, module in sorted(_exports().items()):
        parts += [f"::: {module}.{name}"]
    return "\n\n".join(parts) + "\n"


def _exports() -> Mapping[str, str]:
    """Public name -> the module that defines it."""
    found = {}
    for name in quantlab.__all__:
        value = getattr(quantlab, name)
        module = getattr(value, "__module__", None)
        if module and module.startswith("quantlab") and getattr(value, "__name__", None) == name:
            found[name] = module
    return found


def exit_code_page() -> str:
    """What a command's exit code means."""
    rows = [("0", "done")]
    classes = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.QuantlabError)
    ]
    for cls in classes:
        rows.append(
            (str(cls.exit_code), f"`{cls.__name__}`: {inspect.cleandoc(cls.__doc__ or '').partition(chr(10))[0]}")
        )
    rows += [
        (str(OUTSIDE), "`quantlab reproduce`: a number lies outside its band"),
        (
            str(UNDECIDED),
            "`quantlab reproduce`: no number outside; some not measured, not comparable or without a band",
        ),
    ]
    rows += [(str(INTERRUPTED), "Ctrl-C; the same command goes on where it was"), ("128 + n", "stopped by signal n")]
    text = "An error is one message on standard error: where, what, what came, what is allowed, what to do next."
    return f"# Exit codes\n\n{EDIT_NOTE} {text}\n\n{table(('code', 'meaning'), rows)}\n"
