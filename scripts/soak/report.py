"""The outcomes as a Markdown table and as plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from soak.promises import Outcome

_MIB = 1 << 20
_HEAD = (
    "Scenario", "Streams", "Finished", "Other end", "Lost", "Memory after", "Descriptors", "Tasks",
    "p99 between tokens, ms", "Ratio", "Promises",
)  # fmt: skip


def render(outcomes: Sequence[Outcome]) -> str:
    rows = [_HEAD, ("---",) * len(_HEAD), *map(_row, outcomes)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    details = "\n".join(_details(outcome) for outcome in outcomes)
    return f"{table}\n\n{details}"


def facts(outcome: Outcome) -> dict[str, Any]:
    """For JSON: without the single gaps."""
    found: dict[str, Any] = {
        name: getattr(outcome, name) for name in ("name", "settled_s", "peak_bytes", "figures")
    }
    for who in ("good", "bad"):
        tally = getattr(outcome, who).facts()
        tally.pop("gaps_ms")
        found[who] = tally
    for when in ("before", "after"):
        vitals = getattr(outcome, when)
        found[when] = None if vitals is None else vitals.facts()
    return found | {"promises": [asdict(promise) for promise in outcome.promises]}


def _row(outcome: Outcome) -> tuple[str, ...]:
    good, bad = outcome.good, outcome.bad
    ends = good.failed + good.refused + bad.failed + bad.refused
    others = ", ".join(f"{count:,} {name}" for name, count in sorted(ends.items()))
    return (
        outcome.name,
        f"{good.calls + bad.calls:,}",
        f"{good.finished + bad.finished:,}",
        others or "0",
        str(good.lost + bad.lost),
        *_held(outcome),
        _latency(outcome),
        "" if outcome.latency is None else f"{outcome.latency.ratio:.2f}",
        f"{len(outcome.broken)} broken" if outcome.broken else "kept",
    )


def _held(outcome: Outcome) -> tuple[str, str, str]:
    before, after = outcome.before, outcome.after
    if before is None or after is None:
        return "", "", ""
    growth = 100 * (after.rss_bytes / before.rss_bytes - 1)
    memory = f"{after.rss_bytes / _MIB:,.0f} MiB ({growth:+.1f}%)"
    return memory, f"{before.fds} → {after.fds}", f"{before.tasks} → {after.tasks}"


def _latency(outcome: Outcome) -> str:
    """Alone, beside as many good ones where that was measured, beside the bad ones."""
    if outcome.latency is None:
        return _number(outcome.figures.get("itl_p99_ms"))
    names = ("p99_alone_ms", "p99_as_many_ms", "p99_beside_ms")
    return " / ".join(_number(outcome.figures.get(name)) or "-" for name in names)


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:,.0f}"


def _details(outcome: Outcome) -> str:
    figures = ", ".join(f"{name} {value:,.2f}" for name, value in outcome.figures.items())
    broken = [f"\n  - BROKEN: {each.name} ({each.figure})" for each in outcome.broken]
    peak = f"peak {outcome.peak_bytes / _MIB:,.0f} MiB, " if outcome.peak_bytes else ""
    settled = f"quiet after {outcome.settled_s:.1f} s; " if outcome.after else ""
    return f"- {outcome.name}: {settled}{peak}{figures}{''.join(broken)}"
