"""What mkdocs calls while it builds the site: pages made from the code, and links that lead out of ``docs``."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from types import ModuleType
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

from quantlab.plugins import load_registry

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the home page, a page for each family of methods, and the reference."""
    appendices: dict[str, str] = {}
    written = {
        "index.md": (ROOT / "README.md", (ROOT / "README.md").read_text()),
        "changelog.md": (ROOT / "CHANGELOG.md", (ROOT / "CHANGELOG.md").read_text()),
        "contributing.md": (ROOT / "CONTRIBUTING.md", (ROOT / "CONTRIBUTING.md").read_text()),
    }
    generate, families, registry = _module("generate"), _module("families"), load_registry()
    for readme in sorted(ROOT.glob("plugins/*/README.md")):
        family = readme.parent.name
        page = _family_page(family)
        written[page] = (readme, readme.read_text())
        appendices[page] = families.appendix(registry, family, ROOT / "docs" / "results", generate.part_section)
    for path, (source, text) in written.items():
        page = f"{_moved(text, source, path)}\n{appendices.get(path, '')}\n"
        files.append(File.generated(config, path, content=page))
    for path, text in generate.pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page of ``docs`` with its links to the README and to the plugins' pages leading to pages of the site."""
    path = page.file.src_uri
    source = ROOT / "docs" / path
    return _moved(markdown, source, path) if source.is_file() else markdown


def _module(name: str) -> ModuleType:
    """A module beside this one; mkdocs keeps no path to it."""
    full_name = f"quantlab_docs_{name}"
    spec = importlib.util.spec_from_file_location(full_name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[full_name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _moved(text: str, source: Path, path: str) -> str:
    """Markdown of a file of the repository as a page of the site: relative links find their new places."""

    def replace(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target:
            return match[0]
        place = _place((source.parent / target).resolve())
        if place is None:
            return match[0]
        return f"{match[1]}{normpath(relpath(place, PurePosixPath(path).parent))}{match[3]}"

    return LINK.sub(replace, text)


def _place(target: Path) -> str | None:
    """Where a file of the repository stands on the site; None for one that does not."""
    relative = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
    home = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
    if relative in home:
        return home[relative]
    if relative.startswith("docs/"):
        return relative.removeprefix("docs/")
    family = re.fullmatch(r"plugins/(\w+)(?:/README\.md)?/?", relative)
    return _family_page(family[1]) if family else None


def _family_page(family: str) -> str:
    """Where the page of a plugin's folder stands: among the methods, unless it brings none."""
    package = ROOT / "plugins" / family / f"quantlab_{family}"
    return f"{'methods' if (package / 'methods').is_dir() else 'reporters'}/{family}.md"
