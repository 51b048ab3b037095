from __future__ import annotations

import errno
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from quantlab.cli import app
from quantlab.cli.new import KINDS
from quantlab.errors import ModelError
from quantlab.plugins import Kind
from quantlab.report import rows
from quantlab.store import Store, atomic_write_json, create_run

PLUGIN = """
from quantlab.contracts.config import Strict
from quantlab.contracts.method import Method
from quantlab.hookspecs import hookimpl

class Empty(Strict):
    pass

def part(part_name):
    return type(part_name, (), {"name": part_name, "Config": Empty, "version": 1, "__doc__": "Spirals inwards."})

@hookimpl
def quantlab_methods():
    return [Method("plain", "nothing special", None, True, {}, "plain.yaml")]

@hookimpl
def quantlab_bit_policies():
    return [part("spiral")]

@hookimpl
def quantlab_models():
    return [part("nowhere")]

@hookimpl
def quantlab_quantizers():
    return [part("round")]

@hookimpl
def quantlab_losses():
    return [part("none")]
"""

RECIPE = """\
version: 1
model: {source: nowhere, name: digits}
method: plain
budget: {weight_bits: 2, activation_bits: 4}
weights: {quantizer: round}
activations: {quantizer: round}
allocate: [spiral]
tune: {losses: [none]}
evaluate: {metrics: []}
"""


@dataclass(frozen=True)
class Row:
    method: str
    fid: float


@dataclass(frozen=True)
class Result:
    folder: Path
    rows: tuple[Row, ...]

    def table(self) -> str:
        return "the table"


@dataclass
class FakeRun:
    """Stands for ``quantlab.run``: records its options, or raises."""

    error: BaseException | None = None
    calls: list[tuple[object, ...]] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run, console = ModuleType("quantlab.run"), ModuleType("quantlab.report.console")
        run.__dict__.update(run=self.run, RunOptions=lambda *options: options, site_table=lambda loaded: "the sites")
        console.__dict__["make_console"] = lambda **options: options
        monkeypatch.setitem(sys.modules, "quantlab.run", run)
        monkeypatch.setitem(sys.modules, "quantlab.report", ModuleType("quantlab.report"))
        monkeypatch.setitem(sys.modules, "quantlab.report.console", console)

    def run(self, loaded: object, options: tuple[object, ...]) -> Result:
        self.calls.append((loaded, *options))
        if self.error is not None:
            raise self.error
        return Result(Path("runs/x"), (Row("plain", float("nan")),))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    run = FakeRun()
    run.install(monkeypatch)
    return run


@pytest.fixture
def given(tmp_path: Path):
    """Arguments that name a recipe and its plugin."""
    (tmp_path / "cli_plugin.py").write_text(PLUGIN)
    (tmp_path / "own.yaml").write_text(RECIPE)
    yield [str(tmp_path / "own.yaml"), "--plugin", str(tmp_path / "cli_plugin.py")]
    sys.modules.pop("cli_plugin", None)


def call(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_run_prints_the_table_and_passes_the_options_on(fake, given, tmp_path):
    result = call("run", *given, "--set", "seed=3", "--runs-dir", str(tmp_path), "--device", "cuda", "--dry-run")
    assert (result.exit_code, result.stdout) == (0, "the table\n")
    loaded, runs_dir, device, dtype, dry_run, console, reporters, processes = fake.calls[0]
    assert loaded.recipe.seed == 3 and reporters == ()
    assert (runs_dir, device, dtype, dry_run) == (tmp_path, "cuda", "float32", True)
    assert console == {"verbose": False, "quiet": False, "silent": False}
    assert processes.count == 1


def test_json_on_standard_output_is_json_alone(fake, given):
    result = call("run", *given, "--json")
    assert json.loads(result.stdout) == {"folder": "runs/x", "rows": [{"method": "plain", "fid": None}]}
    assert fake.calls[0][5]["quiet"]


@pytest.mark.parametrize("verbose", [False, True])
def test_an_error_is_a_message_with_its_exit_code_and_a_traceback_only_when_asked_for(fake, given, verbose):
    fake.error = ModelError("the weights are truncated", where="digits.safetensors")
    result = call("run", *given, *(["-v"] if verbose else []))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "error: digits.safetensors: the weights are truncated" in result.stderr
    assert ("Traceback" in result.stderr) == verbose


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(13, "Permission denied", "/data/runs"), "/data/runs: Permission denied"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "the memory is not enough"),
        (MemoryError(), "the memory is not enough"),
        (ZeroDivisionError("by zero\nand more"), "ZeroDivisionError: by zero\n"),
    ],
)
def test_what_nobody_foresaw_is_one_message_too(fake, given, error, told):
    fake.error = error
    result = call("run", *given)
    assert result.exit_code == 1
    assert told in result.stderr and "next: " in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in call("run", *given, "-v").stderr


def test_an_unforeseen_error_names_the_line_that_raised_it(fake, given):
    fake.error = ValueError("odd")
    assert f"error: {__file__}:" in call("run", *given).stderr


def test_sigterm_ends_as_ctrl_c_does_with_its_own_code(fake, given):
    fake.error = KeyboardInterrupt(143)
    result = call("run", *given)
    assert result.exit_code == 143
    assert "the same command goes on" in result.stderr


def test_a_reader_that_left_is_no_error(fake, given):
    fake.error = BrokenPipeError(errno.EPIPE, "Broken pipe")
    result = call("run", *given)
    assert (result.exit_code, result.stderr) == (1, "")


def test_ctrl_c_says_how_to_go_on(fake, given):
    fake.error = KeyboardInterrupt()
    result = call("run", *given)
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["run", "validate", "show"])
def test_a_bad_recipe_is_exit_code_2_before_anything_runs(fake, given, command):
    Path(given[0]).write_text(RECIPE.replace("budget", "bugdet"))
    result = call(command, *given)
    assert result.exit_code == 2
    assert f'{given[0]}:4: unknown key "bugdet"' in result.stderr
    assert 'did you mean "budget"' in result.stderr
    assert result.stdout == ""
    assert fake.calls == []


def test_a_plugin_that_cannot_be_loaded_is_told(fake, given, tmp_path):
    (tmp_path / "cli_plugin.py").write_text("import not_installed_anywhere")
    result = call("validate", *given)
    assert result.exit_code == 1
    assert "not_installed_anywhere" in result.stderr


def test_a_wrong_option_is_a_usage_error():
    result = call("run", "x.yaml", "--devise", "cpu")
    assert result.exit_code == 2
    assert "--devise" in result.stderr


def test_validate(given):
    result = call("validate", *given, "--set", "seed=2")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "own.yaml: valid; method plain" in result.stdout


def test_show_a_recipe_as_given_and_resolved(given):
    assert call("show", *given).stdout == RECIPE + "\n"
    lines = {line.split()[0]: line for line in call("show", *given, "--resolved").stdout.splitlines()}
    assert lines["method"].endswith(f"# {given[0]}:3")


def test_show_sites(fake, given):
    assert call("show", "sites", *given).stdout == "the sites\n"


def test_show_and_list_names(given):
    plugin = given[1:]
    assert "Spirals inwards." in call("show", "policy", "spiral", *plugin).stdout
    assert "spiral" in call("list", "policies", *plugin).stdout
    assert call("show", "policy", "spiral2", *plugin).exit_code == 2
    assert call("list", "polices").exit_code == 2
    assert "digits/mpq-dm-w2a4" in call("list", "recipes").stdout


@pytest.mark.parametrize("word", ["policies", "policy", "sites"])
def test_a_kind_alone_needs_a_name(word):
    result = call("show", word)
    assert result.exit_code == 2
    assert f'"{word}" needs a name' in result.stderr and f"quantlab show {word} NAME" in result.stderr


def test_no_runs_are_told(tmp_path):
    assert call("runs", "--runs-dir", str(tmp_path / "none")).stderr == f"no runs in {tmp_path / 'none'}\n"
    assert "nothing to delete" in call("runs", "--runs-dir", str(tmp_path), "clean").stderr


def test_an_unknown_zoo_model_has_the_known_ones(tmp_path):
    result = call("zoo", "train", "digit", "--output", str(tmp_path))
    assert result.exit_code == 2
    assert 'no zoo model "digit"' in result.stderr and 'did you mean "digits"' in result.stderr


@pytest.mark.parametrize(("failures", "code"), [({}, 0), ({"seed=1": "it broke"}, 1)])
def test_a_bench_with_a_failed_cell_ends_with_code_1(monkeypatch, failures, code):
    def bench(*arguments: object) -> SimpleNamespace:
        return SimpleNamespace(table=lambda wanted: "the table", failures=failures)

    monkeypatch.setattr("quantlab.bench.bench", bench)
    result = call("bench", "any.yaml")
    assert (result.exit_code, result.stdout) == (code, "the table\n")


def test_a_bench_has_as_many_processes_and_the_format_that_were_asked_for(monkeypatch):
    asked = []

    def bench(*arguments: object) -> SimpleNamespace:
        asked.append(arguments[-2])
        return SimpleNamespace(table=lambda wanted: f"as {wanted}", failures={})

    monkeypatch.setattr("quantlab.bench.bench", bench)
    assert call("bench", "any.yaml", "--jobs", "3", "--format", "latex").stdout == "as latex\n"
    assert asked[0].jobs == 3
    assert call("bench", "any.yaml", "--jobs", "0").exit_code == 2


def result_file(path: Path, method: str, fid: float, protocol: str, samples: int) -> str:
    row = rows.Row(method, "digits", 2, 4, 1, 8, 1.0, {"fid-to-teacher": fid}, 1.0, protocol, 1, True, True, "a")
    row = replace(row, protocol_fields={"samples": samples})
    atomic_write_json(path, {"values": {}, "rows": [rows.row_to_json(row)]})
    return str(path)


def test_what_is_not_comparable_is_ranked_apart_and_ends_with_code_1(tmp_path):
    one = result_file(tmp_path / "1.json", "mse", 2.0, "p", 10)
    two = result_file(tmp_path / "2.json", "min-max", 1.0, "p", 10)
    other = result_file(tmp_path / "3.json", "omq", 1.5, "q", 20)
    together = call("compare", one, two, "--format", "csv")
    assert together.exit_code == 0 and together.stdout.index("1,digits,min-max") < together.stdout.index("2,digits,mse")
    apart = call("compare", one, two, other)
    assert apart.exit_code == 1 and "samples: 10 (p), 20 (q)" in apart.stderr
    assert apart.stdout.count("| 1    |") == 2
    refused = call("compare", one, "--by", "accuracy")
    assert refused.exit_code == 2 and refused.stdout == "" and "not ranked by accuracy" in refused.stderr


def test_a_sweep_hands_on_what_is_varied(monkeypatch, tmp_path):
    asked = []

    def sweep(wanted: object, *others: object) -> SimpleNamespace:
        asked.append(wanted)
        bench = SimpleNamespace(failures={})
        return SimpleNamespace(table=lambda wanted: "the front", write=lambda: tmp_path, bench=bench)

    monkeypatch.setattr("quantlab.bench.sweep", sweep)
    result = call("sweep", "r", "--weight-bits", "2,3", "--budget", "extra_bit_fraction=0,0.5", "--seeds", "1,2")
    assert (result.exit_code, result.stdout) == (0, "the front\n")
    assert asked[0].budgets == {"weight_bits": [2, 3], "extra_bit_fraction": [0, 0.5]} and asked[0].seeds == [1, 2]


def test_runs_are_listed_and_cleaned(tmp_path):
    stage = Store(tmp_path).stage("a", {}, lambda folder: None)
    run = create_run(tmp_path, "digits/x", "0" * 16)
    listed = call("runs", "--runs-dir", str(tmp_path))
    assert f"{run.path}  " in listed.stdout
    assert "unfinished" in listed.stdout
    assert call("runs", "clean", "--runs-dir", str(tmp_path)).stdout == f"deleted {stage.path}\n"
    assert call("runs", "--runs-dir", str(tmp_path), "clean", "--all").stdout == f"deleted {run.path}\n"


def test_version():
    assert call("--version").stdout.startswith("quantlab ")


def test_init_writes_a_recipe_that_is_valid_and_its_schema(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("init", "first.yaml")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "first.yaml")
    assert Path("first.yaml").read_text().startswith("# yaml-language-server: $schema=quantlab.schema.json\n")
    assert json.loads(Path("quantlab.schema.json").read_text())["required"] == ["version"]
    assert "first.yaml: valid; method mse, 1 baselines" in call("validate", "first.yaml").stdout
    again = call("init", "first.yaml")
    assert again.exit_code == 2 and "the file exists" in again.stderr


def test_validate_takes_several_files_and_benches(given):
    result = call("validate", "bench/digits-budget", "digits/mpq-dm-w2a4")
    assert result.exit_code == 0
    first, second = result.stdout.splitlines()
    assert "valid; a bench of " in first and "valid; method mpq-dm" in second
    wrong = call("validate", "bench/digits-budget", "--set", "seed=1")
    assert wrong.exit_code == 2 and "a bench sets its values itself" in wrong.stderr


def test_the_schema_has_the_options_of_a_plugin(given, tmp_path):
    result = call("schema", *given[1:])
    assert "spiral" in json.loads(result.stdout)["$defs"]["PolicyChoice"]["anyOf"][0]["enum"]
    file = tmp_path / "editor" / "schema.json"
    assert call("schema", "--output", str(file)).stdout == f"{file}\n"
    assert "spiral" not in file.read_text()


def test_migrate_says_when_there_is_nothing_to_do(given):
    result = call("migrate", given[0])
    assert (result.exit_code, result.stdout) == (0, f"{given[0]}: is of the current version, nothing to do\n")


def test_new_plugin_writes_a_package_and_refuses_to_overwrite_it(tmp_path):
    arguments = ("new", "plugin", "weight-range", "--kind", "policy", "--output", str(tmp_path))
    result = call(*arguments)
    assert result.exit_code == 0 and "next: cd " in result.stdout
    assert (tmp_path / "quantlab-weight-range" / "quantlab_weight_range" / "policy_plugin.py").is_file()
    again = call(*arguments)
    assert again.exit_code == 2 and "the folder exists" in again.stderr
    assert "did you mean" in call("new", "plugin", "x", "--kind", "polcy", "--output", str(tmp_path)).stderr


def test_options_are_shown_with_type_default_and_bounds():
    text = call("show", "pass", "smooth").stdout
    assert "alpha = 0.5  (number, at least 0, at most 1)  share of the input's range" in text
    assert "paper: SmoothQuant" in text and "from: builtin (quantlab " in text


def test_the_help_of_new_plugin_names_every_kind():
    assert f"one of {', '.join(kind.value for kind in Kind)}" == KINDS


def test_a_name_without_its_kind_is_told_how_to_be_shown():
    result = call("show", "kurtosis")
    assert result.exit_code == 2
    assert '"kurtosis" is no recipe, but a method and a policy' in result.stderr
    assert "quantlab show method kurtosis or quantlab show policy kurtosis" in result.stderr
