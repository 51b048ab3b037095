"""A package that the repository knows nothing of adds a plugin of each kind, and a recipe uses them all."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from quantlab.plugins import Kind

PACKAGE = Path(__file__).parents[1] / "outside" / "quantlab-outside"


def call(*command: str | Path, cwd: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
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
    pip = (sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check")
    call(*pip, "install", "-q", "--no-build-isolation", "--no-deps", folder / "source", cwd=folder)
    return folder


@pytest.mark.skipif(find_spec("pip") is None, reason="this environment has no pip to install the package with")
def test_one_of_each_kind_is_used_by_a_recipe(environment: Path) -> None:
    quantlab = (environment / "venv" / "bin" / "python", "-m", "quantlab")
    listed = call(*quantlab, "list", cwd=environment)
    for kind in Kind:
        line = next(line for line in listed.splitlines() if f"outside-{kind}" in line)
        assert line.endswith("[outside (quantlab-outside 3.2.1)]")
    text = call(*quantlab, "run", PACKAGE / "recipe.yaml", "--json", cwd=environment)
    rows = json.loads(text)["rows"]
    assert [row["method"] for row in rows] == ["full precision", "outside-method"]
    assert rows[1]["weight_bits"] == 4.0 and rows[1]["metrics"]["outside-metric"] > 0
    assert rows[0]["metrics"].keys() == rows[1]["metrics"].keys()
    heard = (environment / Path(json.loads(text)["folder"]) / "heard.txt").read_text().split()
    assert "outside-method/tune-0-outside-tuner" in heard and "outside-method/correct" in heard
