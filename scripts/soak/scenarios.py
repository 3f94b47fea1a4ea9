"""The scenarios: what clients do to the server, and what is checked after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmark.measure import percentile
from soak import ghz
from soak.clients import Crowd
from soak.crowds import CrowdProcess, running_crowd
from soak.promises import P99, Latency, Outcome, check_latency, check_streams, check_vitals
from soak.server import STOP_MARGIN_S, Server, running_server
from soak.tally import Tally
from soak.vitals import MemoryPeak, Vitals, Watch

# gRPC's pings find a frozen client within 40 s, and half-open connections end before that.
SETTLE_TIMEOUT_S = 75.0
_RAMP_S = 2.0
_WARM_UP_ROUNDS = 2
_SHORT_STREAMS = 50
_ATTACKERS = 4
# These are still there, frozen or half open, when the server has to be rid of them.
_MUST_BE_DROPPED = ("vanishing", "attacking")


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything."""

    streams: int = 500
    streams_s: float = 120.0
    calls: int = 10_000
    # In the windows with and without the bad clients.
    window_streams: int = 100
    window_s: float = 6.0
    rounds: int = 4
    stop_streams: int = 100
    stop_after_s: float = 4.0
    stop_grace_s: float = 10.0
    # Each of a few rounds of load of every kind, and as long again of attacks.
    warm_up_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where scenarios run, and what the server held before the first one."""

    server: Server
    watch: Watch
    scale: Scale
    start: Vitals

    def settle(self) -> tuple[Vitals, float]:
        """Wait until the server is as it was; what it holds then, and how long it took."""
        return self.watch.settle(SETTLE_TIMEOUT_S, lambda vitals: vitals.is_back_to(self.start))


def warm_up(server: Server, watch: Watch, scale: Scale) -> Vitals:
    """Load of every kind, so that what allocators and thread pools grow to is there from the start.

    Returns what the server holds then, its caches emptied.
    """
    each_s = scale.warm_up_s / 5
    crowds = (
        (Crowd("good", scale.streams, server.address), each_s),
        (Crowd("cancelling", scale.window_streams, server.address), each_s),
        (Crowd("stalling", max(1, scale.window_streams // 10), server.address), each_s),
        (Crowd("vanishing", max(1, scale.window_streams // 10), server.address), each_s),
        (Crowd("short", _SHORT_STREAMS, server.address), each_s),
        # What it makes the server grow by once comes last, in minutes.
        (Crowd("attacking", _ATTACKERS, server.address), scale.warm_up_s),
    )
    for _ in range(_WARM_UP_ROUNDS):
        for crowd, seconds in crowds:
            with running_crowd(crowd) as clients:
                clients.begin(ramp_s=0.0, seconds=seconds)
                clients.tally()
    return watch.rest(SETTLE_TIMEOUT_S)


def many_streams(place: Place) -> Outcome:
    """Streams that decode together for two minutes, each followed by the next."""
    outcome = Outcome(f"{place.scale.streams} streams at once")
    crowd = Crowd("good", place.scale.streams, place.server.address)
    with MemoryPeak(place.watch) as peak, running_crowd(crowd) as clients:
        begin_s = time.monotonic()
        clients.begin(ramp_s=_RAMP_S, seconds=place.scale.streams_s)
        outcome.good = clients.tally()
        outcome.figures = _speed(outcome.good, time.monotonic() - begin_s)
    return _finish(outcome, place, peak)


def short_calls(place: Place) -> Outcome:
    """One after the other, four tokens each; by ghz where it is installed."""
    total = place.scale.calls
    outcome = Outcome(f"{total:,} short calls")
    before = place.watch.read().ended_calls
    begin_s = time.monotonic()
    with MemoryPeak(place.watch) as peak:
        if (tool := ghz.find()) is not None:
            outcome.name += " by ghz"
            outcome.good = ghz.run(tool, place.server.address, total, _SHORT_STREAMS)
        else:
            crowd = Crowd("short", _SHORT_STREAMS, place.server.address)
            with running_crowd(crowd) as clients:
                clients.begin_calls(total)
                outcome.good = clients.tally()
    seconds = time.monotonic() - begin_s
    outcome.figures = {"calls_per_s": outcome.good.calls / seconds}
    _finish(outcome, place, peak)
    counted = 0 if outcome.after is None else outcome.after.ended_calls - before
    outcome.promise("each call counted", counted == outcome.good.calls, counted)
    return outcome


def cancelling(place: Place) -> Outcome:
    """Beside the well-behaved ones, 30% of all clients cancel at random."""
    return _compare(place, "30% cancel at random", "cancelling", share=0.3)


def stalling(place: Place) -> Outcome:
    return _compare(place, "10% stop reading", "stalling", share=0.1)


def vanishing(place: Place) -> Outcome:
    return _compare(place, "processes vanish (kill -9)", "vanishing", share=0.1)


def attacking(place: Place) -> Outcome:
    return _compare(place, "malformed HTTP/2", "attacking", share=0.1)


def stopping(model: Path, logs: Path, scale: Scale) -> Outcome:
    """SIGTERM under load, a third of which would run for longer than the grace time."""
    outcome = Outcome("SIGTERM under load")
    grace_s = scale.stop_grace_s
    with ExitStack() as stack:
        server = stack.enter_context(
            running_server(model, logs, name="stopped", batch=scale.stop_streams, grace_s=grace_s)
        )
        watch = Watch(server.process.pid, server.address, server.metrics_url)
        crowd = Crowd("good", scale.stop_streams, server.address, endless_share=1 / 3)
        clients = stack.enter_context(running_crowd(crowd))
        clients.begin(ramp_s=0.0, seconds=scale.stop_after_s + 1.0)
        time.sleep(scale.stop_after_s)
        running = watch.read()
        code, took_s = server.stop()
        outcome.good = clients.tally()
        problems = [line for line in server.problems() if "drain_timed_out" not in line]
    outcome.figures = {"open_at_sigterm": running.open_generations, "exit_s": took_s}
    check_streams(outcome, may_be_refused=True)
    outcome.promise("exit code 0", code == 0, code)
    outcome.promise("in time", took_s <= grace_s + STOP_MARGIN_S, f"{took_s:.1f} s")
    good = outcome.good
    only = good.failed.keys() <= {"UNAVAILABLE"}
    outcome.promise("those cut off are told UNAVAILABLE", only, dict(good.failed) or "none")
    outcome.promise("some finished", good.finished > 0, good.finished)
    outcome.promise("no warnings in the log", not problems, problems[:1] or "none")
    return outcome


SCENARIOS: dict[str, Callable[[Place], Outcome]] = {
    "streams": many_streams,
    "calls": short_calls,
    "cancel": cancelling,
    "stall": stalling,
    "vanish": vanishing,
    "attack": attacking,
}


def _compare(place: Place, name: str, kind: str, *, share: float) -> Outcome:
    """Windows in turn: well-behaved clients alone, as many as all of them, and beside bad ones.

    Attackers have no streams in whose place others could be.
    """
    scale, address = place.scale, place.server.address
    num_bad = max(1, round(scale.window_streams * share))
    has_streams = kind != "attacking"
    outcome = Outcome(name)
    outcome.latency = Latency()
    with ExitStack() as stack:
        peak = stack.enter_context(MemoryPeak(place.watch))
        crowd = Crowd(kind, num_bad if has_streams else _ATTACKERS, address)
        bad = stack.enter_context(running_crowd(crowd))
        with (
            running_crowd(Crowd("good", scale.window_streams - num_bad, address)) as good,
            running_crowd(Crowd("good", num_bad, address, seed=1)) as others,
        ):
            windows = _Windows(scale, outcome.latency, outcome, good)
            turns: list[Callable[[], None]] = [windows.alone, partial(windows.beside, bad)]
            if has_streams:
                turns.insert(1, partial(windows.as_many, others))
            for number in range(scale.rounds):
                # There and back: a machine that gets slower is no kind's disadvantage.
                for turn in turns if number % 2 == 0 else reversed(turns):
                    turn()
        outcome.figures = {"bad_calls": outcome.bad.calls, **outcome.latency.figures()}
        if kind in _MUST_BE_DROPPED:
            outcome.after, outcome.settled_s = place.settle()
    _finish(outcome, place, peak)
    check_latency(outcome)
    return outcome


@dataclass(frozen=True, slots=True)
class _Windows:
    """Of a scenario: the same good clients, each time in other company."""

    scale: Scale
    latency: Latency
    outcome: Outcome
    good: CrowdProcess

    def alone(self) -> None:
        self.latency.alone.append(self._run())

    def as_many(self, others: CrowdProcess) -> None:
        self.latency.as_many.append(self._run(others))
        self.outcome.good.add(others.tally())

    def beside(self, bad: CrowdProcess) -> None:
        self.latency.beside.append(self._run(bad))
        self.outcome.bad.add(bad.tally())

    def _run(self, company: CrowdProcess | None = None) -> Tally:
        for crowd in filter(None, (company, self.good)):
            crowd.begin(ramp_s=_RAMP_S, seconds=self.scale.window_s)
        tally = self.good.tally()
        self.outcome.good.add(tally)
        return tally


def _finish(outcome: Outcome, place: Place, peak: MemoryPeak) -> Outcome:
    """Wait until the server is as it was, and check its promises."""
    after, waited_s = place.settle()
    outcome.before, outcome.after = place.start, outcome.after or after
    outcome.settled_s = outcome.settled_s or waited_s
    outcome.peak_bytes = peak.peak_bytes
    check_streams(outcome)
    check_vitals(outcome)
    problems = place.server.problems()
    outcome.promise("no warnings in the log", not problems, problems[:1] or "none")
    return outcome


def _speed(tally: Tally, seconds: float) -> dict[str, float]:
    return {
        "tokens_per_s": tally.tokens / seconds,
        "itl_p50_ms": percentile(tally.gaps_ms, 0.5),
        "itl_p99_ms": percentile(tally.gaps_ms, P99),
    }
