"""A generated package of every kind is a plugin that works as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import quantlab
from quantlab.errors import RecipeError
from quantlab.plugins import Kind, load_registry
from quantlab.scaffold import new_plugin


def install(folder: Path) -> None:
    """What pip would write beside a package that lies on the path."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    about = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    entries = "".join(f"{name} = {module}\n" for name, module in project["entry-points"]["quantlab"].items())
    (about / "entry_points.txt").write_text(f"[quantlab]\n{entries}")


def call(arguments: list[str], folders: list[Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_package_of_every_kind_passes_its_own_tests(tmp_path: Path) -> None:
    registry = load_registry()
    folders = [new_plugin(f"made-{kind}", kind, tmp_path, registry) for kind in Kind]
    for folder in folders:
        install(folder)
    tests = [str(folder / "tests") for folder in folders]
    done = call(["pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", *tests], folders, tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = int(done.stdout.strip().splitlines()[-1].split(" passed")[0])
    assert passed > 6 * len(folders)


@pytest.mark.parametrize(
    "tool", [["ruff", "check", "--select", "E,F,I,UP,B,D1", "--ignore", "D107"], ["ruff", "format", "--check"]]
)
def test_the_generated_code_has_nothing_to_mend(tmp_path: Path, tool: list[str]) -> None:
    for kind in Kind:
        new_plugin(f"made-{kind}", kind, tmp_path, load_registry())
    done = call([*tool, "--no-cache", "--line-length", "120", str(tmp_path)], [], tmp_path)
    if "No module named" in done.stderr:
        pytest.skip("ruff is not installed")
    assert done.returncode == 0, done.stdout


def test_the_generated_code_passes_a_type_checker(tmp_path: Path) -> None:
    folders = [new_plugin(f"made-{kind}", kind, tmp_path, load_registry()) for kind in Kind]
    roots = [str(Path(quantlab.__file__).parents[1]), *map(str, folders)]
    settings = {"include": ["."], "typeCheckingMode": "basic", "extraPaths": roots}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    done = call(["pyright", "--pythonpath", sys.executable], [], tmp_path)
    if "No module named" in done.stderr:
        pytest.skip("pyright is not installed")
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Weight_Range", "no name for a plugin"),
        ("../x", "no name for a plugin"),
        ("", "no name for a plugin"),
        ("uniform", 'there is a policy "uniform" already'),
        ("there", "the folder exists"),
    ],
)
def test_what_cannot_be_written_is_told(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "quantlab-there").mkdir()
    with pytest.raises(RecipeError, match=told):
        new_plugin(name, Kind.POLICY, tmp_path, load_registry())
    assert not list((tmp_path / "quantlab-there").iterdir())


def test_a_package_that_would_replace_an_installed_one_is_refused(tmp_path: Path, monkeypatch) -> None:
    install(new_plugin("made", Kind.POLICY, tmp_path, load_registry()))
    monkeypatch.syspath_prepend(tmp_path / "quantlab-made")
    with pytest.raises(RecipeError, match='"quantlab-made" is installed already') as caught:
        new_plugin("made", Kind.METHOD, tmp_path / "other", load_registry())
    assert "add the hook of a method" in str(caught.value)
