"""What mkdocs calls while it builds the site: pages made from the code, and links that lead out of ``docs``."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from types import ModuleType
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the home page, a page for each family of methods, and the reference."""
    written = {
        "index.md": (ROOT / "README.md", (ROOT / "README.md").read_text()),
        "changelog.md": (ROOT / "CHANGELOG.md", (ROOT / "CHANGELOG.md").read_text()),
        "contributing.md": (ROOT / "CONTRIBUTING.md", (ROOT / "CONTRIBUTING.md").read_text()),
    }
    for readme in sorted(ROOT.glob("plugins/*/README.md")):
        written[f"methods/{readme.parent.name}.md"] = (readme, readme.read_text())
    for path, (source, text) in written.items():
        files.append(File.generated(config, path, content=_moved(text, source, path)))
    for path, text in _generate().pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page of ``docs`` with its links to the README and to the plugins' pages leading to pages of the site."""
    path = page.file.src_uri
    source = ROOT / "docs" / path
    return _moved(markdown, source, path) if source.is_file() else markdown


def _generate() -> ModuleType:
    """The module beside this one; mkdocs keeps no path to it."""
    spec = importlib.util.spec_from_file_location("quantlab_docs_generate", Path(__file__).with_name("generate.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
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
    return f"methods/{family[1]}.md" if family else None
