"""Artefacts on disk: computed once for the same inputs, written whole or not at all, checked when read.

``<root>/.store/<stage>-<hash>/`` holds one stage's files and ``stage.json`` with their checksums. A stage is written
as ``<...>.partial`` and renamed when it is complete. ``<root>/<recipe>/<time>-<hash>/`` is a run: what was asked for,
what came out, and a link to each of its stages. This package knows bytes, JSON and hashes only.
"""

from quantlab.store.files import (
    JSON,
    append_event,
    atomic_write,
    atomic_write_json,
    atomic_write_text,
    digest_of,
    digest_of_file,
    json_text,
    read_json,
)
from quantlab.store.runs import RunFolder, RunRecord, WatchedRun, clean_runs, create_run, list_runs
from quantlab.store.stages import StageFolder, Store, check_stage

__all__ = [
    "JSON",
    "RunFolder",
    "RunRecord",
    "StageFolder",
    "Store",
    "WatchedRun",
    "append_event",
    "atomic_write",
    "atomic_write_json",
    "atomic_write_text",
    "check_stage",
    "clean_runs",
    "create_run",
    "digest_of",
    "digest_of_file",
    "json_text",
    "list_runs",
    "read_json",
]
