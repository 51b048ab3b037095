from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantlab.errors import ArtefactError
from quantlab.store import (
    Store,
    append_event,
    atomic_write,
    atomic_write_json,
    atomic_write_text,
    clean_runs,
    create_run,
    digest_of,
    list_runs,
    read_json,
)


def write(text: str):
    def compute(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "data.txt").write_text(text)

    return compute


def never(folder: Path) -> None:
    raise AssertionError("the stage is there already")


def fail_with(error: BaseException):
    def compute(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise error

    return compute


def left(root: Path) -> list[str]:
    return sorted(path.name for path in (root / ".store").iterdir() if path.suffix != ".lock")


def test_a_stage_is_computed_once(tmp_path):
    store = Store(tmp_path)
    first = store.stage("calibrate", {"seed": 1}, write("a"))
    again = store.stage("calibrate", {"seed": 1}, never)
    assert (first.reused, again.reused) == (False, True)
    assert first.path == again.path == tmp_path / ".store" / f"calibrate-{first.digest}"
    assert again.file("deep/data.txt").read_text() == "a"
    assert again.seconds == first.seconds


@pytest.mark.parametrize("key", [{"seed": 2}, {"seed": 1, "version": 2}, {}])
def test_another_key_is_another_stage(tmp_path, key):
    store = Store(tmp_path)
    assert store.stage("a", {"seed": 1}, write("a")).digest != store.stage("a", key, write("b")).digest


def test_the_digest_knows_no_order_of_keys_but_the_order_of_lists():
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert digest_of([1, 2]) != digest_of([2, 1])
    assert digest_of({"a": 1}) == "015abd7f5cc57a2d", "stored results stay valid from one version to the next"


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_an_interrupted_stage_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        Store(tmp_path).stage("tune", {}, fail_with(error))
    assert left(tmp_path) == []
    assert not Store(tmp_path).stage("tune", {}, write("a")).reused


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "x"), RuntimeError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")]
)
def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path, error):
    with pytest.raises(ArtefactError, match="the disk is full") as caught:
        Store(tmp_path).stage("tune", {}, fail_with(error))
    assert "runs clean" in str(caught.value)
    assert left(tmp_path) == []


def test_a_resumable_stage_goes_on_from_what_it_kept(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.stage("tune", {}, fail_with(KeyboardInterrupt()), resumable=True)
    assert [name.partition(".")[2] for name in left(tmp_path)] == ["partial"]
    found = []
    done = store.stage("tune", {}, lambda folder: found.append((folder / "half.txt").read_text()), resumable=True)
    assert found == ["half"]
    assert left(tmp_path) == [done.path.name]


def test_what_a_killed_process_left_is_not_mixed_into_a_stage_that_cannot_resume(tmp_path):
    store = Store(tmp_path)
    path = store.stage("a", {}, write("a")).path
    path.rename(path.with_name(f"{path.name}.partial"))
    (path.with_name(f"{path.name}.partial") / "old.txt").write_text("old")
    assert not (store.stage("a", {}, write("b")).path / "old.txt").exists()


def test_a_killed_process_leaves_no_complete_stage_and_no_lock(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from quantlab.store import Store
def compute(folder):
    (folder / "half.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
Store(Path({str(tmp_path)!r})).stage("a", {{}}, compute)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    stage = Store(tmp_path).stage("a", {}, write("whole"))
    assert not stage.reused
    assert not (stage.path / "half.txt").exists()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:1]), "not the one that was written"),
        (lambda file: file.write_text("foreign"), "not the one that was written"),
        (lambda file: file.unlink(), "missing"),
        (lambda file: (file.parents[1] / "stage.json").write_text("{"), "not a complete stage"),
        (lambda file: (file.parents[1] / "stage.json").unlink(), "not a complete stage"),
        (
            lambda file: (file.parents[1] / "stage.json").write_text(
                '{"schema_version": 9, "files": {}, "seconds": 1}'
            ),
            "another version",
        ),
    ],
)
def test_a_damaged_stage_is_told_and_cleaned(tmp_path, damage, told):
    store = Store(tmp_path)
    stage = store.stage("a", {}, write("whole"))
    create_run(tmp_path, "r", "0" * 16).link(stage)
    damage(stage.file("deep/data.txt"))
    with pytest.raises(ArtefactError, match=told) as caught:
        store.stage("a", {}, never)
    assert f"quantlab runs clean --runs-dir {tmp_path}" in str(caught.value)
    assert clean_runs(tmp_path) == [stage.path]
    assert not store.stage("a", {}, write("whole")).reused


def test_one_process_writes_a_stage_at_a_time(tmp_path):
    store = Store(tmp_path)

    def compute(folder: Path) -> None:
        with pytest.raises(ArtefactError, match="another process is writing") as caught:
            store.stage("a", {}, never)
        assert f"process {os.getpid()}" in str(caught.value)
        assert clean_runs(tmp_path) == [], "a stage being written is left alone"
        (folder / "x").write_text("x")

    store.stage("a", {}, compute)


def test_a_store_that_waits_takes_what_another_process_computes(tmp_path):
    """The other one holds the lock while it computes; the first thing that is said here lets it go on."""
    script = f"""
import sys
from pathlib import Path
from quantlab.store import Store
def compute(folder):
    print("computing", flush=True)
    sys.stdin.readline()
    (folder / "x").write_text("theirs")
Store(Path({str(tmp_path)!r})).stage("a", {{}}, compute)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None and other.stdout.readline() == b"computing\n"
        told = []

        def waiting(message: str) -> None:
            told.append(message)
            other.stdin.write(b"\n")
            other.stdin.flush()

        stage = Store(tmp_path, waiting).stage("a", {}, never)
    assert stage.reused and stage.file("x").read_text() == "theirs"
    assert told == [f'waiting for process {other.pid}, which is writing the stage "a"']


def test_a_store_that_waits_does_not_wait_for_the_dead(tmp_path):
    """Killed while it computes: the one that waits computes anew."""
    script = f"""
import time
from pathlib import Path
from quantlab.store import Store
def compute(folder):
    (folder / "half").write_text("")
    print("computing", flush=True)
    time.sleep(600)
Store(Path({str(tmp_path)!r})).stage("a", {{}}, compute)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"computing\n"
        stage = Store(tmp_path, lambda message: other.kill()).stage("a", {}, write("mine"))
    assert not stage.reused and not (stage.path / "half").exists()


def test_a_store_that_waits_does_not_wait_for_itself(tmp_path):
    store = Store(tmp_path, lambda message: None)

    def compute(folder: Path) -> None:
        with pytest.raises(ArtefactError, match="another process is writing"):
            store.stage("a", {}, never)
        (folder / "x").write_text("x")

    store.stage("a", {}, compute)


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")

    def fail(partial: Path) -> None:
        partial.write_text("new")
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="No space left") as caught:
        atomic_write(path, fail)
    assert caught.value.filename == str(path), "a full disk's own error names no file"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_json_has_no_nan(tmp_path):
    atomic_write_json(tmp_path / "a.json", {"fid": float("nan"), "all": [1.5, float("-inf")], "n": 3})
    assert read_json(tmp_path / "a.json") == {"fid": None, "all": [1.5, None], "n": 3}


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_foreign_json_file_is_told(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ArtefactError, match="JSON"):
        read_json(tmp_path / "a.json")


def test_events_are_lines_with_a_time(tmp_path):
    append_event(tmp_path, {"stage": "load"})
    append_event(tmp_path, {"stage": "tune"})
    records = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [record["stage"] for record in records] == ["load", "tune"]
    assert records[0]["time"] <= records[1]["time"]


def test_a_run_links_its_stages_relatively(tmp_path):
    root = tmp_path / "runs"
    stage = Store(root).stage("a", {}, write("a"))
    run = create_run(root, "digits/mpq", "0123456789abcdef")
    run.link(stage)
    run.link(stage, "methods/mpq/a")
    run.link(stage)
    root.rename(tmp_path / "moved")
    moved = tmp_path / "moved" / run.path.relative_to(root)
    assert (moved / "a" / "deep" / "data.txt").read_text() == "a"
    assert (moved / "methods" / "mpq" / "a" / "deep" / "data.txt").read_text() == "a"
    assert moved.name.endswith("-01234567")


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path):
    assert len({create_run(tmp_path, "r", "0" * 16).path for _ in range(3)}) == 3


def test_runs_are_listed_with_state_and_size(tmp_path):
    stage = Store(tmp_path).stage("a", {}, write("a" * 1000))
    run, other = create_run(tmp_path, "digits/x", "0" * 16), create_run(tmp_path, "y", "0" * 16)
    run.link(stage)
    run.write_json("metrics.json", {})
    records = {record.path: record for record in list_runs(tmp_path)}
    assert records[run.path].recipe == "digits/x"
    assert (records[run.path].complete, records[other.path].complete) == (True, False)
    assert records[run.path].stages == (stage.path,)
    assert 1000 < records[run.path].size_bytes < 3000
    assert records[other.path].size_bytes < 500


def test_clean_deletes_what_no_run_links_to(tmp_path):
    store = Store(tmp_path)
    linked, loose = store.stage("a", {}, write("a")), store.stage("b", {}, write("b"))
    run = create_run(tmp_path, "r", "0" * 16)
    run.link(linked)
    assert clean_runs(tmp_path) == [loose.path]
    assert linked.path.exists()
    assert set(clean_runs(tmp_path, everything=True)) == {linked.path, run.path}
    assert list_runs(tmp_path) == []


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"recipe": "theirs", "created": "2020"}'])
def test_what_another_program_made_is_neither_listed_nor_deleted(tmp_path, text):
    theirs, stage = tmp_path / "theirs", Store(tmp_path).stage("a", {}, write("a"))
    theirs.mkdir()
    (theirs / "run.json").write_text(text)
    (theirs / "precious.txt").write_text("x")
    stray = tmp_path / ".store" / "notes.txt"
    stray.write_text("x")
    (tmp_path / ".store" / "folder").mkdir()
    assert list_runs(tmp_path) == []
    assert clean_runs(tmp_path, everything=True) == [stage.path]
    assert (theirs / "precious.txt").is_file() and stray.is_file() and (tmp_path / ".store" / "folder").is_dir()


def test_a_run_with_a_damaged_record_keeps_its_stages(tmp_path):
    stage, run = Store(tmp_path).stage("a", {}, write("a")), create_run(tmp_path, "r", "0" * 16)
    run.link(stage)
    (run.path / "run.json").write_text("{")
    assert clean_runs(tmp_path) == []


def test_a_file_is_no_folder_of_runs(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtefactError, match="not a folder of runs"):
        list_runs(tmp_path / "file")


def test_clean_without_any_run_does_nothing(tmp_path):
    assert clean_runs(tmp_path / "nowhere") == []
    assert list_runs(tmp_path / "nowhere") == []
