"""Every code block of the tutorials and how-to pages runs as it stands there, in the smoke profile.

Blocks of a page run in their order in one empty folder: a block with a title is written to that file, ``sh`` goes to a
shell, ``python`` to a fresh interpreter, all blocks of the page in one. A block below ``<!-- skip -->`` is only read.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALLS = ROOT / "docs" / "how-to" / "write-a-plugin.md"
"""Installs a package, so ``tests/e2e/test_outside_plugin.py`` runs it in an environment of its own."""
PAGES = sorted({*ROOT.glob("docs/tutorial/*.md"), *ROOT.glob("docs/how-to/*.md")} - {INSTALLS})
BLOCK = re.compile(r"(^<!-- skip -->\n)?^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TITLE = re.compile(r'title="([^"]+)"')
SECONDS = 120


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its title or None, and its text."""

    language: str
    title: str | None
    skip: bool
    text: str


def blocks(text: str) -> list[Block]:
    found = []
    for skip, language, info, body in BLOCK.findall(text):
        title = TITLE.search(info)
        found.append(Block(language, title[1] if title else None, bool(skip), body))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT / "docs").as_posix())
def test_every_block_runs(page: Path, tmp_path: Path) -> None:
    python = []
    for block in blocks(page.read_text()):
        if block.title is not None:
            file = tmp_path / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        elif block.language == "sh" and not block.skip:
            run(["bash", "-euo", "pipefail", "-c", block.text], tmp_path, block.text)
        elif block.language == "python" and not block.skip:
            python.append(block.text)
    if python:
        run([sys.executable, "-c", "\n".join(python)], tmp_path, "\n".join(python))


def run(command: list[str], folder: Path, text: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_blocks_are_told_apart() -> None:
    text = 'a\n```yaml title="b.yaml"\nc: 1\n```\n<!-- skip -->\n```sh\nd\n```\n```sh\ne\n```\n'
    assert blocks(text) == [
        Block("yaml", "b.yaml", False, "c: 1\n"),
        Block("sh", None, True, "d\n"),
        Block("sh", None, False, "e\n"),
    ]
