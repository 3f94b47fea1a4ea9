"""From the times of tokens to figures, and from figures of several runs to ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmark.workload import Answer

Metrics = dict[str, float]

HIGHER_IS_BETTER = frozenset({"tokens_per_s", "requests_per_s", "speedup", "ratio"})


@dataclass(frozen=True, slots=True)
class Spread:
    """Of several runs of the same thing."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises: ValueError when there is no value."""
        known = sorted(values)
        if not known:
            raise ValueError("a spread needs a value")
        return cls(known[0], statistics.median(known), known[-1])


def percentile(values: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile; NaN of no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def mean_of(windows: Sequence[Metrics]) -> Metrics:
    """Return the mean of each figure that all windows have."""
    known = set.intersection(*(set(metrics) for metrics in windows))
    return {
        name: statistics.fmean(metrics[name] for metrics in windows)
        for name in windows[0]
        if name in known
    }


def summarise(answers: Sequence[Answer], begin_s: float, end_s: float) -> Metrics:
    """Return the figures of what arrived between `begin_s` and `end_s`.

    An inter-token latency is the time between two messages of one answer, however many tokens the
    second one brings; time per output token is an answer's whole time after its first message by
    the tokens that came in it.
    """
    per_message = tokens_per_message(answers)
    tokens = 0.0
    ttfts: list[float] = []
    gaps: list[float] = []
    tpots: list[float] = []
    for answer in answers:
        scale = _scale(answer, per_message)
        tokens += scale * _count_between(answer, begin_s, end_s)
        if answer.times and begin_s <= answer.times[0] < end_s:
            ttfts.append(answer.times[0] - answer.start_s)
        gaps += [
            after - before for before, after in pairwise(answer.times) if begin_s <= after < end_s
        ]
        if answer.finished and begin_s <= answer.times[-1] < end_s:
            later = scale * (answer.counts[-1] - answer.counts[0])
            if later > 0:
                tpots.append((answer.times[-1] - answer.times[0]) / later)
    return {
        "tokens_per_s": tokens / (end_s - begin_s),
        "ttft_p50_ms": 1e3 * percentile(ttfts, 0.50),
        "ttft_p99_ms": 1e3 * percentile(ttfts, 0.99),
        "itl_p50_ms": 1e3 * percentile(gaps, 0.50),
        "itl_p99_ms": 1e3 * percentile(gaps, 0.99),
        "itl_max_ms": 1e3 * max(gaps, default=math.nan),
        "tpot_p50_ms": 1e3 * percentile(tpots, 0.50),
        "tokens": tokens,
        "first_tokens": len(ttfts),
        "tokens_per_message": tokens / max(1, len(gaps) + len(ttfts)),
    }


def tokens_per_message(answers: Iterable[Answer]) -> float:
    """Over the finished answers; 1 when none is."""
    finished = [answer for answer in answers if answer.finished and answer.counts]
    messages = sum(answer.counts[-1] for answer in finished)
    return sum(answer.total or 0 for answer in finished) / messages if messages else 1.0


def _scale(answer: Answer, per_message: float) -> float:
    if answer.total is None or not answer.counts:
        return per_message
    return answer.total / answer.counts[-1]


def _count_between(answer: Answer, begin_s: float, end_s: float) -> int:
    before = within = 0
    for time_s, count in zip(answer.times, answer.counts, strict=True):
        if time_s < begin_s:
            before = count
        elif time_s < end_s:
            within = count
    return max(0, within - before)


def ratio_spread(
    ours: Mapping[int, Metrics], theirs: Mapping[int, Metrics], metric: str
) -> Spread | None:
    """Return the spread of ours / theirs, repeat by repeat; None where they share none."""
    ratios = [
        ours[repeat][metric] / theirs[repeat][metric]
        for repeat in ours.keys() & theirs.keys()
        if _is_usable(ours[repeat].get(metric)) and _is_usable(theirs[repeat].get(metric))
    ]
    return Spread.of(ratios) if ratios else None


def best(runs: Sequence[Mapping[int, Metrics]], metric: str) -> dict[int, Metrics]:
    """Return, for each repeat, the best of these values as the only metric."""
    found: dict[int, Metrics] = {}
    for repeat in {repeat for run in runs for repeat in run}:
        values = [run[repeat].get(metric) for run in runs if repeat in run]
        known = [value for value in values if value is not None and _is_usable(value)]
        if known:
            choose = max if metric in HIGHER_IS_BETTER else min
            found[repeat] = {metric: choose(known)}
    return found


def _is_usable(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0
