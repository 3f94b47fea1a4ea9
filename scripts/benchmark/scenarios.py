"""The loads in action: each measures one target and returns figures by phase."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from benchmark.clients import Client, WorkerPlan
from benchmark.loads import Load
from benchmark.measure import Metrics, mean_of, percentile, summarise
from benchmark.meter import ProcessMeter, gpu_used_bytes, machine_busy_s
from benchmark.workload import Answer, Request, RequestSource, SamplingKind

MIB = 1 << 20
_RSS_INTERVAL_S = 0.25
_STAGGER_S = 0.01
_PREFIX_TOKENS = 2000
_TURN_TOKENS = 32
_ANSWER_TOKENS = 8
_LONG_PROMPT_TOKENS = 4000
_MIXED_TURNS = 4
# Nobody waits for the end of these.
_ENDLESS_TOKENS = 7000
_DEADLINE_S = 240.0

Phases = dict[str, Metrics]


@dataclass(slots=True)
class Bench:
    """A client, and what is measured about its target."""

    client: Client
    plan: WorkerPlan
    source: RequestSource
    server: ProcessMeter
    itself: ProcessMeter


async def run_load(load: Load, bench: Bench) -> Phases:
    """Return the metrics of each phase. Raises: RequestError, TimeoutError, transports' errors."""
    match load.kind:
        case "closed":
            phases = {"": await closed(bench, load.streams, load.sampling)}
        case "poisson":
            phases = {"": await poisson(bench, load)}
        case "mixed":
            phases = await mixed(bench, load)
        case "prefix":
            phases = {"": await prefix(bench)}
        case "long":
            phases = {"": await long_prompt(bench, load.streams)}
        case "two-models":
            phases = await two_models(bench, load.streams)
        case "slow-reader":
            phases = await slow_reader(bench, load.streams)
    return phases


async def closed(
    bench: Bench,
    streams: int,
    sampling: SamplingKind = "greedy",
    models: str = "a",
    window: int = 0,
) -> Metrics:
    """Streams take the models in turn. Each window of a kind has prompts of its own."""
    answers: list[Answer] = []

    async def stream(number: int) -> None:
        await asyncio.sleep(number * _STAGGER_S)
        model = models[number % len(models)]
        for turn in itertools.count():
            key = f"{sampling} {number} {turn} {window}"
            await _ask(bench, bench.source.request(key, sampling=sampling, model=model), answers)

    async with _running([stream(number) for number in range(streams)]) as tasks:
        await _warm_up(bench, tasks, answers, streams)
        return await _window(bench, tasks, answers)


async def poisson(bench: Bench, load: Load) -> Metrics:
    answers: list[Answer] = []
    rate_per_s = load.share * bench.plan.capacity_per_s
    dice = random.Random("arrivals")  # noqa: S311 - nothing secret

    async def arrivals() -> None:
        due = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in itertools.count():
                due += dice.expovariate(rate_per_s)
                await asyncio.sleep(due - time.perf_counter())
                request = bench.source.request(f"poisson {number}")
                group.create_task(_ask(bench, request, answers, start_s=due))

    async with _running([arrivals()]) as tasks:
        await _warm_up(bench, tasks, answers, 1)
        metrics = await _window(bench, tasks, answers)
    return metrics | {
        "offered_per_s": rate_per_s,
        "waiting": sum(not answer.finished for answer in answers),
    }


async def mixed(bench: Bench, load: Load) -> Phases:
    """In turns, and each is first as often, so that a machine's drift falls on both alike."""
    windows: dict[SamplingKind, list[Metrics]] = {"greedy": [], "mixed": []}
    kinds = list(windows)
    for window in range(_MIXED_TURNS):
        for kind in kinds:
            windows[kind].append(await closed(bench, load.streams, kind, window=window))
        kinds.reverse()
    greedy, different = (mean_of(found) for found in windows.values())
    different["ratio"] = different["tokens_per_s"] / greedy["tokens_per_s"]
    return {"greedy": greedy, "mixed": different}


async def prefix(bench: Bench) -> Metrics:
    """The second turn has the first one's prompt, an answer and a question."""
    firsts, seconds, cached = [], [], []
    for number in range(bench.plan.conversations):
        words = bench.source.words(f"prefix {number}", _PREFIX_TOKENS + _TURN_TOKENS)
        first = await _alone(bench, Request("a", words, _ANSWER_TOKENS))
        words += bench.source.words(f"second {number}", _ANSWER_TOKENS + _TURN_TOKENS)
        second = await _alone(bench, Request("a", words, _ANSWER_TOKENS))
        firsts.append(first.times[0] - first.start_s)
        seconds.append(second.times[0] - second.start_s)
        cached.append(second.num_cached_tokens)
    return {
        "first_ttft_ms": 1e3 * statistics.median(firsts),
        "second_ttft_ms": 1e3 * statistics.median(seconds),
        "speedup": statistics.median(firsts) / statistics.median(seconds),
        "cached_tokens": statistics.median(cached),
    }


async def long_prompt(bench: Bench, streams: int) -> Metrics:
    """The longest gap of running streams while a long prompt is read."""
    chunk_tokens = bench.plan.endpoint.prefill_step_tokens
    alone = await _alone(bench, _long_request(bench, "alone"))
    chunk_s = (alone.times[0] - alone.start_s) / math.ceil(_LONG_PROMPT_TOKENS / chunk_tokens)
    answers: list[Answer] = []
    short = [
        _ask(bench, _endless_request(bench, f"short {number}"), answers)
        for number in range(streams)
    ]
    async with _running(short) as tasks:
        await _warm_up(bench, tasks, answers, streams)
        await _watch(tasks, bench.plan.window_s / 2)
        arrival_s = time.perf_counter()
        usual_s = percentile(_gaps(answers, 0.0, arrival_s), 0.5)
        late = await _alone(bench, _long_request(bench, "late"))
        # Whatever froze the streams shows in the first gap that ends after it.
        await _watch(tasks, max(1.0, 3 * usual_s))
        longest_s = max(_gaps(answers, arrival_s, time.perf_counter()))
    return {
        "usual_step_ms": 1e3 * usual_s,
        "chunk_ms": 1e3 * chunk_s,
        "longest_gap_ms": 1e3 * longest_s,
        "gap_steps": longest_s / usual_s,
        "gap_beyond_3_steps_chunks": (longest_s - 3 * usual_s) / chunk_s,
        "long_ttft_ms": 1e3 * (late.times[0] - late.start_s),
    }


async def two_models(bench: Bench, streams: int) -> Phases:
    one = await closed(bench, streams)
    two = await closed(bench, streams, models="ab", window=1)
    two["ratio"] = two["tokens_per_s"] / one["tokens_per_s"]
    return {"one": one, "two": two}


async def slow_reader(bench: Bench, streams: int) -> Phases:
    """One more stream is read in the first phase, and not in the second."""
    async with _running([_ask(bench, _endless_request(bench, "read"), [])]):
        reading = await closed(bench, streams)
    before_bytes = bench.server.rss_bytes()
    async with bench.client.stalled(_endless_request(bench, "stalled")):
        stalled = await closed(bench, streams)
        stalled["rss_growth_mib"] = (bench.server.rss_bytes() - before_bytes) / MIB
    stalled["ratio"] = stalled["tokens_per_s"] / reading["tokens_per_s"]
    return {"reading": reading, "stalled": stalled}


async def _ask(
    bench: Bench, request: Request, answers: list[Answer], start_s: float | None = None
) -> Answer:
    answer = Answer(request.max_tokens, time.perf_counter() if start_s is None else start_s)
    answers.append(answer)
    await bench.client.generate(request, answer)
    return answer


async def _alone(bench: Bench, request: Request) -> Answer:
    async with asyncio.timeout(_DEADLINE_S):
        return await _ask(bench, request, [])


def _long_request(bench: Bench, key: str) -> Request:
    return Request("a", bench.source.words(key, _LONG_PROMPT_TOKENS), _ANSWER_TOKENS)


def _endless_request(bench: Bench, key: str) -> Request:
    return replace(bench.source.request(key), max_tokens=_ENDLESS_TOKENS)


def _gaps(answers: list[Answer], begin_s: float, end_s: float) -> list[float]:
    return [
        after - before
        for answer in answers
        for before, after in pairwise(answer.times)
        if begin_s <= after < end_s
    ]


@asynccontextmanager
async def _running(
    jobs: Sequence[Coroutine[Any, Any, object]],
) -> AsyncIterator[list[asyncio.Task[object]]]:
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _warm_up(
    bench: Bench, tasks: list[asyncio.Task[object]], answers: list[Answer], streams: int
) -> None:
    """Until every stream has had a token, and for `warmup_s` at least."""
    deadline = time.monotonic() + _DEADLINE_S
    await _watch(tasks, bench.plan.warmup_s)
    while sum(bool(answer.times) for answer in answers[:streams]) < streams:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no token on every stream within {_DEADLINE_S:.0f} s")
        await _watch(tasks, _RSS_INTERVAL_S)


async def _window(
    bench: Bench, tasks: list[asyncio.Task[object]], answers: list[Answer]
) -> Metrics:
    before = _CpuTimes.read(bench)
    begin_s = time.perf_counter()
    peak_bytes = bench.server.rss_bytes()
    while (now := time.perf_counter()) < begin_s + bench.plan.window_s:
        await _watch(tasks, min(_RSS_INTERVAL_S, begin_s + bench.plan.window_s - now))
        peak_bytes = max(peak_bytes, bench.server.rss_bytes())
    end_s = time.perf_counter()
    after = _CpuTimes.read(bench)
    metrics = summarise(answers, begin_s, end_s)
    metrics["rss_peak_mib"] = peak_bytes / MIB
    metrics["cpu_ms_per_token"] = 1e3 * (after.server - before.server) / max(1, metrics["tokens"])
    metrics |= after.cores_since(before, end_s - begin_s)
    if bench.plan.gpu_idle_bytes is not None:
        used_bytes = await asyncio.to_thread(gpu_used_bytes)
        if used_bytes is not None:
            metrics["gpu_mib"] = (used_bytes - bench.plan.gpu_idle_bytes) / MIB
    return metrics


@dataclass(frozen=True, slots=True)
class _CpuTimes:
    """In seconds, until now."""

    server: float
    client: float
    machine: float | None

    @classmethod
    def read(cls, bench: Bench) -> _CpuTimes:
        is_loop = not bench.plan.endpoint.pids
        client = 0.0 if is_loop else bench.itself.cpu_s()
        return cls(bench.server.cpu_s(), client, machine_busy_s())

    def cores_since(self, before: _CpuTimes, seconds: float) -> Metrics:
        """How many were busy: with the server, the client, and all else on this machine."""
        server, client = self.server - before.server, self.client - before.client
        cores = {"server_cores": server / seconds}
        if client:
            cores["client_cores"] = client / seconds
        if self.machine is not None and before.machine is not None:
            others = self.machine - before.machine - server - client
            cores["other_cores"] = max(0.0, others) / seconds
        return cores


async def _watch(tasks: list[asyncio.Task[object]], seconds: float) -> None:
    """Wait so long. Raises: the error of a task that fails meanwhile."""
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()
