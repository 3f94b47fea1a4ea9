"""Makes metrics of a Sample: gauges of one moment, and counters that the pool keeps itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from mlxpool_server.domain import ModelState, ModelUse
from mlxpool_server.metrics.sample import Sample

_MODEL = ("model",)

# (name, what it says, where it is).
_GAUGES: tuple[tuple[str, str, Callable[[ModelUse], float]], ...] = (
    ("running_sequences", "Sequences in the batch.", lambda use: use.running),
    ("queued_requests", "Requests that are not in the batch yet.", lambda use: use.queued),
    ("weights_bytes", "What the weights take.", lambda use: use.weights_bytes),
    ("kv_cache_bytes", "KV caches of the running batch.", lambda use: use.kv_bytes),
    ("prompt_cache_bytes", "Kept of earlier prompts.", lambda use: use.prompt_cache_bytes),
    (
        "kv_reserved_bytes",
        "Reserved for running generations at their longest.",
        lambda use: use.reserved_bytes,
    ),
)
_COUNTERS: tuple[tuple[str, str, Callable[[ModelUse], float]], ...] = (
    (
        "prompt_tokens",
        "Prompt tokens of ended generations, cached ones included.",
        lambda use: use.activity.prompt_tokens,
    ),
    (
        "cached_prompt_tokens",
        "Prompt tokens that the prompt cache had.",
        lambda use: use.activity.cached_prompt_tokens,
    ),
    (
        "prompt_cache_hits",
        "Generations whose prompt the prompt cache had, in part at least.",
        lambda use: use.activity.prompt_cache_hits,
    ),
    (
        "completion_tokens",
        "Generated tokens, those of running generations included.",
        lambda use: use.activity.completion_tokens,
    ),
    ("loads", "Loads that succeeded.", lambda use: use.activity.loads),
    ("failed_loads", "Loads that failed.", lambda use: use.activity.failed_loads),
    ("evictions", "Unloads to make room for others.", lambda use: use.activity.evictions),
)


class SampleCollector(Collector):
    """For one scrape."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample

    def collect(self) -> Iterator[Metric]:
        sample, models = self._sample, self._sample.pool.models
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(f"mlxpool_{name}", text, labels=_MODEL)
            for use in models:
                gauge.add_metric((use.name,), value(use))
            yield gauge
        for name, text, value in _COUNTERS:
            counter = CounterMetricFamily(f"mlxpool_{name}", text, labels=_MODEL)
            for use in models:
                counter.add_metric((use.name,), value(use))
            yield counter
        steps = SummaryMetricFamily(
            "mlxpool_engine_step_duration_seconds",
            "The engine thread's steps: a chunk of prefill, or a token of each sequence.",
            labels=_MODEL,
        )
        for use in models:
            steps.add_metric((use.name,), use.steps.count, use.steps.seconds)
        yield steps
        states = GaugeMetricFamily(
            "mlxpool_model_state", "1 for the state it is in.", labels=("model", "state")
        )
        for use in models:
            for state in ModelState:
                states.add_metric((use.name, state.value), float(use.state is state))
        yield states
        yield from self._whole()
        yield _gauge("serving", "1 while health says SERVING.", sample.is_serving)
        yield _gauge(
            "engine_step_age_seconds", "Time in the step that runs; 0 between.", sample.step_age_s
        )
        yield _gauge("max_batch_size", "Sequences decoded together.", sample.max_batch_size)
        yield _gauge(
            "open_generations", "Generate calls that have not ended.", sample.open_generations
        )
        yield _gauge("asyncio_tasks", "Tasks of the event loop.", sample.asyncio_tasks)

    def _whole(self) -> Iterator[Metric]:
        pool, memory = self._sample.pool, self._sample.memory
        yield _gauge("pool_limit_bytes", "The pool's limit.", pool.limit_bytes)
        yield _gauge("pool_used_bytes", "Held or reserved, of that limit.", pool.used_bytes)
        yield _gauge("mlx_active_bytes", "MLX's own count of memory in use.", memory.active_bytes)
        yield _gauge("mlx_peak_bytes", "Its highest since the last reset.", memory.peak_bytes)
        yield _gauge("mlx_cache_bytes", "Freed, and kept by MLX for reuse.", memory.cache_bytes)
        yield _gauge("device_memory_bytes", "What the device has.", memory.device_bytes)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"mlxpool_{name}", text, value=float(value))
