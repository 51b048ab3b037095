"""What the documents point at is there: links, files, tests, recipes, public names and measured intervals."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantlab

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("plugins/**/README.md"),
    ]
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`]+)`")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
TOP = r"(?:quantlab|plugins|tests|docs|recipes|quantlab_\w+)"
FILE = re.compile(rf"(?<![\w/.-]){TOP}/[\w./-]+\.(?:py|yaml|md|json|png)(?:::\w+)?")
FOLDER = re.compile(rf"{TOP}(?:/[\w.-]+)*/?")
TITLE = re.compile(r'title="[^"]+"')
TEST = re.compile(r"(?:[\w/]+\.py::)?test_\w+")
DOTTED = re.compile(r"quantlab(\.[A-Za-z_]\w*)+")
INTERVAL = re.compile(r"[\d.,]+ ± [\d.]+")
RECIPE = re.compile(r"quantlab (?:run|show|validate|show sites)\s+(digits/[\w-]+)")

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return FENCE.sub("", document.read_text())


def generated_pages() -> set[Path]:
    """The pages of the site that are written from the code."""
    text = (ROOT / "docs" / "site" / "generate.py").read_text()
    return {ROOT / "docs" / page for page in re.findall(r'"((?:reference|methods)/[\w-]+\.md)":', text)}


def found(path: str, document: Path) -> bool:
    """Whether a cited path exists from the root, or beside the document, as in a plugin's README."""
    return (ROOT / path).exists() or (path.startswith("quantlab_") and (document.parent / path).exists())


def names_of_tests() -> set[str]:
    """The name of every test."""
    names = set()
    for file in ROOT.glob("tests/**/test_*.py"):
        names |= {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}
    return names


def cited_paths(document: Path) -> Iterator[str]:
    yield from (match.partition("::")[0] for match in FILE.findall(TITLE.sub("", document.read_text())))
    yield from (span for span in SPAN.findall(prose(document)) if "/" in span and FOLDER.fullmatch(span))


def there(target: Path) -> bool:
    """Whether a link leads to a file, or to a page that the site makes."""
    return target.exists() or target in generated_pages()


@documents
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    targets = [target.partition("#")[0] for target in LINK.findall(prose(document)) if "://" not in target]
    missing = [target for target in targets if target and not there((document.parent / target).resolve())]
    assert not missing


@documents
def test_every_cited_path_exists(document: Path) -> None:
    assert not [path for path in cited_paths(document) if not found(path, document)]


@documents
def test_every_cited_test_exists(document: Path) -> None:
    known = names_of_tests()
    for span in SPAN.findall(prose(document)):
        if TEST.fullmatch(span):
            file, separator, name = span.rpartition("::")
            assert name in known, span
            assert not separator or f"def {name}(" in (ROOT / file).read_text(), span


@documents
def test_every_cited_public_name_and_recipe_exists(document: Path) -> None:
    for span in SPAN.findall(prose(document)):
        if DOTTED.fullmatch(span):
            path = ROOT / span.replace(".", "/")
            is_module = path.with_suffix(".py").exists() or (path / "__init__.py").exists()
            assert span.split(".")[1] in quantlab.__all__ or is_module, span
    for name in RECIPE.findall(document.read_text()):
        assert (ROOT / "recipes" / f"{name}.yaml").exists(), name


@documents
def test_every_interval_is_in_a_committed_result(document: Path) -> None:
    results = "".join(file.read_text() for file in ROOT.glob("docs/results/*/summary.md"))
    assert not set(INTERVAL.findall(document.read_text())) - set(INTERVAL.findall(results))


def test_the_patterns_see_what_they_are_for() -> None:
    assert FILE.findall("in `quantlab/run.py`, and (docs/results.md) or recipes/bench/x.yaml") == [
        "quantlab/run.py",
        "docs/results.md",
        "recipes/bench/x.yaml",
    ]
    assert LINK.findall("![a](docs/a.png) [b](../b.md#part)") == ["docs/a.png", "../b.md#part"]
    assert len(DOCUMENTS) > 8
