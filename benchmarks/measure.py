"""Interleaved timing: every arm once a round, so that a slow minute of the machine meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

SHORTEST_SECONDS = 0.02
"""A shorter arm is repeated inside a round."""
SLOW_ROUNDS = 3
"""Rounds at most of a case with slow arms, so that all sections together take less than ten minutes."""


@dataclass(frozen=True)
class Missing:
    """An arm that cannot run here, and why."""

    reason: str


Arm = Callable[[], object] | Missing


@dataclass(frozen=True)
class Case:
    """One line of work that several arms do.

    Attributes:
        section: the section's title.
        work: what is done, shapes included.
        baseline: the arm whose time the others' are divided into.
        arms: by name; the baseline among them.
        facts: what was found out besides time, by arm: what equals what, bytes saved for backward.
        goal: what the ratio of an arm should be, by arm: "at least 20", "at most 1.2".
        slow: arms that take seconds and need no warming up.
        slower_than_baseline: the ratio is time over the baseline's, not the baseline's over time.
    """

    section: str
    work: str
    baseline: str
    arms: Mapping[str, Arm]
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    goal: Mapping[str, str] = field(default_factory=dict[str, str])
    slow: Collection[str] = ()
    slower_than_baseline: bool = False


def measured(case: Case, rounds: int) -> dict[str, object]:
    """Time a case: for each arm the median time and the median, least and largest ratio over the rounds."""
    repeats = {
        name: 1 if name in case.slow else _repeats(arm)
        for name, arm in case.arms.items()
        if not isinstance(arm, Missing)
    }
    rounds = min(rounds, SLOW_ROUNDS) if case.slow else rounds
    seconds: dict[str, list[float]] = {name: [] for name in repeats}
    for _ in range(rounds):
        for name, count in repeats.items():
            seconds[name].append(_timed(case.arms[name], count))
    arms: dict[str, object] = {}
    for name, arm in case.arms.items():
        if isinstance(arm, Missing):
            arms[name] = {"missing": arm.reason}
            continue
        ratios = [
            mine / base if case.slower_than_baseline else base / mine
            for mine, base in zip(seconds[name], seconds[case.baseline], strict=True)
        ]
        arms[name] = {
            "milliseconds": 1000 * statistics.median(seconds[name]),
            "fastest_milliseconds": 1000 * min(seconds[name]),
            "ratio": statistics.median(ratios),
            "ratio_least": min(ratios),
            "ratio_largest": max(ratios),
            "fact": case.facts.get(name, ""),
            "goal": case.goal.get(name, ""),
        }
    return {
        "section": case.section,
        "work": case.work,
        "baseline": case.baseline,
        "ratio": "time over baseline" if case.slower_than_baseline else "baseline over time",
        "rounds": rounds,
        "arms": arms,
    }


def _repeats(arm: Arm) -> int:
    """How often an arm runs in a round; it is run here first, so that nothing compiles or loads later."""
    _timed(arm, 1)
    return max(1, round(SHORTEST_SECONDS / min(_timed(arm, 1) for _ in range(2))))


def _timed(arm: Arm, count: int) -> float:
    assert not isinstance(arm, Missing)
    start = time.perf_counter()
    for _ in range(count):
        arm()
    return (time.perf_counter() - start) / count
