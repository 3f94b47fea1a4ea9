"""What scripts/reliability calls a broken promise, and what its report shows of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from soak.promises import Latency, Outcome, check_latency, check_streams, check_vitals
from soak.report import facts, render
from soak.tally import Tally
from soak.vitals import Vitals

QUIET = Vitals(
    rss_bytes=100 << 20, fds=16, threads=30, children=1, tasks=31, running=0, queued=0,
    open_generations=0, kv_bytes=0, kv_reserved_bytes=0, open_calls=0, ended_calls=5,
)  # fmt: skip
SERVED = Tally(calls=10, admitted=10, finished=10)


def broken(outcome: Outcome) -> list[str]:
    return [promise.name for promise in outcome.broken]


@pytest.mark.parametrize(
    ("change", "promise"),
    [
        ({"rss_bytes": 106 << 20}, "memory back"),
        ({"fds": 17}, "descriptors back"),
        ({"tasks": 32}, "tasks back"),
        ({"queued": 1}, "nothing runs or waits"),
        ({"open_generations": 1}, "no call open"),
        ({"kv_bytes": 1}, "no KV bytes"),
        ({"kv_reserved_bytes": 1}, "no KV bytes"),
    ],
)
def test_what_stays_is_a_broken_promise(change: dict[str, int], promise: str) -> None:
    """Each figure by itself; less than at the start is no reason to complain."""
    outcome = Outcome("x", before=QUIET, after=replace(QUIET, rss_bytes=104 << 20, fds=15))
    check_vitals(outcome)
    assert broken(outcome) == []
    outcome = Outcome("x", before=QUIET, after=replace(QUIET, **change))
    check_vitals(outcome)
    assert broken(outcome) == [promise]


def test_quiet_is_more_than_idle() -> None:
    """A server is back when nobody is served and descriptors and tasks are as they were."""
    assert QUIET.is_back_to(QUIET)
    for change in ({"fds": 17}, {"tasks": 32}, {"kv_bytes": 1}, {"open_generations": 1}):
        assert not replace(QUIET, **change).is_back_to(QUIET)


@pytest.mark.parametrize(
    ("good", "names"),
    [
        (SERVED, []),
        (replace(SERVED, finished=9, lost=1), ["nothing lost", "well-behaved streams finished"]),
        (
            replace(SERVED, finished=9),
            ["each admitted stream ended", "well-behaved streams finished"],
        ),
        (
            replace(SERVED, finished=9, failed=Counter(INTERNAL=1)),
            ["well-behaved streams finished"],
        ),
        (replace(SERVED, calls=11), ["well-behaved streams finished"]),
        (Tally(), ["well-behaved streams finished"]),
    ],
)
def test_streams_without_an_end_are_broken_promises(good: Tally, names: list[str]) -> None:
    """And so is a well-behaved one that fails, or none at all."""
    outcome = Outcome("x", good=good)
    check_streams(outcome)
    assert broken(outcome) == names


@pytest.mark.parametrize(("slowest_ms", "names"), [(14.0, []), (16.0, ["latency of the others"])])
def test_latency_is_compared_over_all_windows(slowest_ms: float, names: list[str]) -> None:
    """The p99 of all gaps, not of one window's."""
    alone = [Tally(gaps_ms=[10.0] * 100)] * 2
    beside = [Tally(gaps_ms=[10.0] * 96 + [slowest_ms] * 4)] * 2
    outcome = Outcome("x", latency=Latency(alone=alone, beside=beside))
    check_latency(outcome)
    assert broken(outcome) == names
    assert outcome.latency is not None
    assert outcome.latency.ratio == pytest.approx(slowest_ms / 10)


def test_latency_is_compared_with_as_many_clients() -> None:
    """What more streams cost is their load; the ratio to fewer is reported beside it."""
    alone, as_many, beside = ([Tally(gaps_ms=[gap] * 100)] for gap in (10.0, 20.0, 24.0))
    latency = Latency(alone=alone, as_many=as_many, beside=beside)
    outcome = Outcome("x", latency=latency)
    check_latency(outcome)
    assert broken(outcome) == []
    assert (latency.ratio, latency.load_ratio) == (pytest.approx(1.2), pytest.approx(2.4))
    outcome.figures = latency.figures()
    assert "10 / 20 / 24 | 1.20" in render([outcome])
    assert "ratio_to_alone 2.40" in render([outcome])


def test_latency_without_gaps_is_broken() -> None:
    """No figure is not a good figure."""
    outcome = Outcome("x", latency=Latency(alone=[Tally()], beside=[Tally()]))
    check_latency(outcome)
    assert broken(outcome) == ["latency of the others"]


def test_report_says_what_is_broken() -> None:
    """In the row and under the table; the JSON has it all but the single gaps."""
    outcome = Outcome("a storm", good=SERVED, before=QUIET, after=replace(QUIET, fds=99))
    outcome.good.gaps_ms = [1.0]
    check_vitals(outcome)
    text = render([outcome])
    assert "| a storm | 10 | 10 |" in text
    assert "1 broken" in text
    assert "BROKEN: descriptors back (16 → 99)" in text
    content = json.loads(json.dumps(facts(outcome)))
    assert content["after"]["fds"] == 99
    assert "gaps_ms" not in content["good"]


@pytest.mark.parametrize("tally", [SERVED, Tally(failed=Counter(CANCELLED=2), gaps_ms=[1.5])])
def test_tally_survives_json(tally: Tally) -> None:
    """As it comes from a client process."""
    assert Tally.of(json.loads(json.dumps(tally.facts()))) == tally


def test_tallies_add_up() -> None:
    """Figures, ends and gaps."""
    make: Callable[[], Tally] = lambda: Tally(  # noqa: E731 - a fresh one each time
        calls=3, admitted=2, failed=Counter(A=1), refused=Counter(B=1), gaps_ms=[1.0]
    )
    total = make()
    total.add(make())
    assert (total.calls, total.admitted, total.gaps_ms) == (6, 4, [1.0, 1.0])
    assert (total.failed["A"], total.refused["B"]) == (2, 2)
