"""A package that the repository knows nothing of adds a plugin of each kind, and a recipe uses them all."""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from quantlab.plugins import Kind

PACKAGE = Path(__file__).parents[1] / "outside" / "quantlab-outside"


GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "write-a-plugin.md"
BLOCK = re.compile(r'(^<!-- skip -->\n)?^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
needs_pip = pytest.mark.skipif(find_spec("pip") is None, reason="this environment has no pip to install packages with")


def call(*command: str | Path, cwd: Path, path: str = os.environ["PATH"]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the package installed; everything else comes from this one."""
    folder = tmp_path_factory.mktemp("outside")
    shutil.copytree(PACKAGE, folder / "source")  # building writes beside the sources
    call(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    packages = Path(call(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip())
    outer = [path for path in dict.fromkeys([*site.getsitepackages(), *sys.path]) if path.endswith("site-packages")]
    (packages / "outer.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in outer))
    commands = {
        "pip": f'{sys.executable} -m pip --python {python} --disable-pip-version-check "$@"'
        " -q --no-build-isolation --no-deps",
        "quantlab": f'{python} -m quantlab "$@"',
        "pytest": f'{python} -m pytest -q -p no:cacheprovider "$@"',
    }
    for name, command in commands.items():
        file = python.with_name(name)
        file.write_text(f"#!/bin/sh\nexec {command}\n")
        file.chmod(0o755)
    call(python.with_name("pip"), "install", folder / "source", cwd=folder)
    return folder


@needs_pip
def test_one_of_each_kind_is_used_by_a_recipe(environment: Path) -> None:
    quantlab = (environment / "venv" / "bin" / "python", "-m", "quantlab")
    listed = call(*quantlab, "list", cwd=environment)
    for kind in Kind:
        line = next(line for line in listed.splitlines() if f"outside-{kind}" in line)
        assert line.endswith("[outside (quantlab-outside 3.2.1)]")
    asked = ("--json", "--report-to", "outside-reporter")
    text = call(*quantlab, "run", PACKAGE / "recipe.yaml", *asked, cwd=environment)
    rows = json.loads(text)["rows"]
    assert [row["method"] for row in rows] == ["full precision", "outside-method"]
    assert rows[1]["weight_bits"] == 4.0 and rows[1]["metrics"]["outside-metric"] > 0
    assert rows[0]["metrics"].keys() == rows[1]["metrics"].keys()
    run = environment / Path(json.loads(text)["folder"])
    reported = (run / "reported.txt").read_text().splitlines()
    assert reported[:2] == ["begin recipe", "result full precision"]
    assert reported[-2:] == ["result outside-method", "end finished"]
    heard = (run / "heard.txt").read_text().split()
    assert "outside-method/tune-0-outside-tuner" in heard and "outside-method/correct" in heard


@needs_pip
def test_the_guide_for_plugins_runs_as_it_stands(environment: Path) -> None:
    """Its blocks in one shell, in their order; one with a title is that file, and a diff changes it."""
    package, path = (
        environment / "quantlab-weight-range",
        f"{environment / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
    )
    folder, told = environment, ""
    for skip, language, title, text in BLOCK.findall(GUIDE.read_text()):
        if language == "diff":
            change(folder / title, text)
        elif title:
            (folder / title).parent.mkdir(exist_ok=True)
            (folder / title).write_text(text)
        elif language == "sh" and not skip:
            told += call("bash", "-euo", "pipefail", "-c", text, cwd=folder, path=path)
            folder = package  # where the first block leads
    assert "policy weight-range" in told
    assert "example.yaml: valid" in told and "a bench of 9 cells" in told and "run folder: runs/example/" in told


def change(file: Path, difference: str) -> None:
    """Put the lines after + in the place of those after -."""
    parts = {sign: [line[1:] for line in difference.splitlines() if line[0] == sign] for sign in "-+"}
    before, text = "\n".join(parts["-"]), file.read_text()
    assert text.count(before) == 1, before
    file.write_text(text.replace(before, "\n".join(parts["+"])))
