"""What the server promises after each scenario, and whether it kept it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmark.measure import percentile
from soak.tally import Tally
from soak.vitals import Vitals

# Resident memory against the start's.
MEMORY_SHARE = 0.05
# Inter-token latency of well-behaved clients, beside the others and without them.
LATENCY_RATIO = 1.5
P99 = 0.99


@dataclass(frozen=True, slots=True)
class Promise:
    name: str
    is_kept: bool
    figure: str


@dataclass(slots=True)
class Latency:
    """Windows of well-behaved clients: how long they wait from one message to the next."""

    alone: list[Tally] = field(default_factory=list)
    # With well-behaved clients in the place of the bad ones; empty where those have no streams.
    as_many: list[Tally] = field(default_factory=list)
    beside: list[Tally] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """What the others' bad behaviour costs: the p99 beside them by that beside good ones."""
        return _p99_ms(self.beside) / _p99_ms(self.as_many or self.alone)

    @property
    def load_ratio(self) -> float:
        """The p99 beside them by that with nobody in their place."""
        return _p99_ms(self.beside) / _p99_ms(self.alone)

    def figures(self) -> dict[str, float]:
        """By name, ms and ratios."""
        kinds = {"alone": self.alone, "as_many": self.as_many, "beside": self.beside}
        p99s = {f"p99_{name}_ms": _p99_ms(tallies) for name, tallies in kinds.items() if tallies}
        return p99s | {"ratio": self.ratio, "ratio_to_alone": self.load_ratio}


def _p99_ms(tallies: Sequence[Tally]) -> float:
    """Over all gaps of all windows."""
    return percentile([gap for tally in tallies for gap in tally.gaps_ms], P99)


@dataclass(slots=True)
class Outcome:
    """Of one scenario."""

    name: str
    good: Tally = field(default_factory=Tally)
    bad: Tally = field(default_factory=Tally)
    # None where the server has ended.
    before: Vitals | None = None
    after: Vitals | None = None
    settled_s: float = 0.0
    peak_bytes: int = 0
    # None where there are no windows with and without bad clients.
    latency: Latency | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    promises: list[Promise] = field(default_factory=list)

    def promise(self, name: str, is_kept: bool, figure: object = "") -> None:
        self.promises.append(Promise(name, is_kept, str(figure)))

    @property
    def broken(self) -> list[Promise]:
        return [each for each in self.promises if not each.is_kept]


def check_streams(outcome: Outcome, *, may_be_refused: bool = False) -> None:
    """Nothing is lost, and whoever behaves is served to the end."""
    good, bad = outcome.good, outcome.bad
    outcome.promise("nothing lost", good.lost + bad.lost == 0, f"{good.lost + bad.lost} lost")
    ended = good.finished + good.failed.total() + good.lost
    outcome.promise(
        "each admitted stream ended", ended == good.admitted, f"{good.admitted} of them"
    )
    if not may_be_refused:
        served = good.finished == good.calls > 0
        outcome.promise(
            "well-behaved streams finished",
            served,
            f"{good.finished} of {good.calls}, {dict(good.failed + good.refused) or 'no errors'}",
        )


def check_vitals(outcome: Outcome) -> None:
    """Everything is given back."""
    start, after = outcome.before, outcome.after
    if start is None or after is None:
        raise ValueError(outcome.name)
    growth = after.rss_bytes / start.rss_bytes - 1
    outcome.promise("memory back", growth <= MEMORY_SHARE, f"{100 * growth:+.1f}%")
    outcome.promise("descriptors back", after.fds <= start.fds, f"{start.fds} → {after.fds}")
    outcome.promise("tasks back", after.tasks <= start.tasks, f"{start.tasks} → {after.tasks}")
    served = after.running + after.queued
    outcome.promise("nothing runs or waits", served == 0, f"{served} leases")
    outcome.promise("no call open", after.open_generations == 0, after.open_generations)
    kept_bytes = after.kv_bytes + after.kv_reserved_bytes
    outcome.promise("no KV bytes", kept_bytes == 0, kept_bytes)


def check_latency(outcome: Outcome) -> None:
    """The load of a bad client is anybody's load; what it does beyond that is its own."""
    if outcome.latency is None:
        raise ValueError(outcome.name)
    ratio = outcome.latency.ratio
    outcome.promise("latency of the others", ratio <= LATENCY_RATIO, f"{ratio:.2f}")
