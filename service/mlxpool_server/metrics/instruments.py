"""What is timed or counted as it happens. No globals: each server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram, Info
from prometheus_client.process_collector import ProcessCollector

from mlxpool_server.domain import DeviceInfo, GenerationFinished
from mlxpool_server.rpc.observer import GENERATE, EndedCall

# Those of OpenTelemetry's GenAI conventions, and longer ones where queues and loads need them.
TIME_TO_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60,
)  # fmt: skip
TIME_PER_TOKEN_S = (
    0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5,
)  # fmt: skip
DURATION_S = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 300,
)  # fmt: skip
WAIT_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
LOAD_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)

_MODEL = ("model",)


class Instruments:
    """Implements the observers of pool/ and rpc/. Event loop only; scrapes read on a thread."""

    def __init__(
        self, version: str, device: DeviceInfo, canonical_name: Callable[[str], str]
    ) -> None:
        """`canonical_name` makes a catalogue's name of what a caller wrote; "" where there is none.

        Otherwise callers could make up as many time series as they like.
        """
        self.registry = CollectorRegistry(auto_describe=True)
        self._canonical_name = canonical_name
        ProcessCollector(registry=self.registry)
        build = Info("mlxpool_build", "Versions and device.", registry=self.registry)
        build.info(
            {
                "version": version,
                "mlx_version": device.mlx_version,
                "mlx_lm_version": device.mlx_lm_version,
                "device": device.name,
                "device_kind": device.kind,
            }
        )
        self._rpc_duration = self._histogram(
            "rpc_duration_seconds",
            "Calls of every method, streams to their end.",
            ("rpc_method", "status"),
            DURATION_S,
        )
        self._requests = Counter(
            "mlxpool_requests",
            "Generate calls by how they ended; reason is ErrorInfo's, empty for OK.",
            ("model", "status", "reason"),
            registry=self.registry,
        )
        self._request_duration = self._histogram(
            "request_duration_seconds",
            "Generate calls, from the request to the end of the stream.",
            ("model", "status"),
            DURATION_S,
        )
        self._generations = Counter(
            "mlxpool_generations",
            "Generations that the engine ended, by finish reason.",
            ("model", "finish_reason"),
            registry=self.registry,
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds",
            "From the request to its first token: queue, load and prefill included.",
            _MODEL,
            TIME_TO_FIRST_TOKEN_S,
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds",
            "Between two pieces of text of a stream, by token; as they come, none averaged away.",
            _MODEL,
            TIME_PER_TOKEN_S,
        )
        self._per_token = self._histogram(
            "time_per_output_token_seconds",
            "Decode time by token after the first one, one value a generation.",
            _MODEL,
            TIME_PER_TOKEN_S,
        )
        self._tool_calls = Counter(
            "mlxpool_tool_calls",
            "Tool calls that models wrote; malformed ones reach the caller as text.",
            ("model", "outcome"),
            registry=self.registry,
        )
        self._constrained = Counter(
            "mlxpool_constrained_generations",
            "Generations admitted whose output is constrained, by what constrains it.",
            ("model", "constraint"),
            registry=self.registry,
        )
        self._adapted = Counter(
            "mlxpool_adapter_generations",
            "Generations admitted that want an adapter, by which one.",
            ("model", "adapter"),
            registry=self.registry,
        )
        self._reasoning_tokens = Counter(
            "mlxpool_reasoning_tokens",
            "Tokens of thoughts, of generations that ended.",
            _MODEL,
            registry=self.registry,
        )
        self._logprob_tokens = Counter(
            "mlxpool_logprob_tokens",
            "Tokens whose log-probabilities were asked for, of generations that ended.",
            _MODEL,
            registry=self.registry,
        )
        self._accepted_draft_tokens = Counter(
            "mlxpool_accepted_draft_tokens",
            "Tokens that were guessed and found right, of generations that ended.",
            _MODEL,
            registry=self.registry,
        )
        self._embedded_inputs = Counter(
            "mlxpool_embedded_inputs",
            "Inputs of Embed calls that were answered.",
            _MODEL,
            registry=self.registry,
        )
        self._embedded_tokens = Counter(
            "mlxpool_embedded_tokens", "Their tokens.", _MODEL, registry=self.registry
        )
        self._queue = self._histogram(
            "queue_time_seconds", "Waiting for memory and a place in the batch.", _MODEL, WAIT_S
        )
        self._prefill = self._histogram(
            "prefill_time_seconds",
            "From the place in the batch to the first token.",
            _MODEL,
            WAIT_S,
        )
        self._load = self._histogram(
            "load_duration_seconds", "Loads that succeeded, downloads included.", _MODEL, LOAD_S
        )

    def _histogram(
        self, name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...]
    ) -> Histogram:
        return Histogram(f"mlxpool_{name}", text, labels, buckets=buckets, registry=self.registry)

    # ------------------------------------------------------------ what pool/ tells

    def first_token(self, model: str, seconds: float) -> None:
        self._first_token.labels(model).observe(seconds)

    def inter_token(self, model: str, seconds: float) -> None:
        self._inter_token.labels(model).observe(seconds)

    def generation_finished(self, model: str, finished: GenerationFinished) -> None:
        timings, num_tokens = finished.timings, finished.usage.completion_tokens
        self._generations.labels(model, finished.finish_reason.value).inc()
        self._reasoning_tokens.labels(model).inc(finished.usage.reasoning_tokens)
        self._accepted_draft_tokens.labels(model).inc(finished.usage.accepted_draft_tokens)
        self._logprob_tokens.labels(model).inc(finished.num_logprobs)
        self._queue.labels(model).observe(timings.queue_s)
        if num_tokens > 0:
            self._prefill.labels(model).observe(timings.prefill_s)
        if num_tokens > 1:
            self._per_token.labels(model).observe(timings.decode_s / (num_tokens - 1))

    def tool_call(self, model: str, num_calls: int) -> None:
        outcome = "read" if num_calls else "malformed"
        self._tool_calls.labels(model, outcome).inc(max(1, num_calls))

    def constrained(self, model: str, kind: str) -> None:
        self._constrained.labels(model, kind).inc()

    def adapted(self, model: str, adapter: str) -> None:
        self._adapted.labels(model, adapter).inc()

    def embedded(self, model: str, num_inputs: int, num_tokens: int) -> None:
        self._embedded_inputs.labels(model).inc(num_inputs)
        self._embedded_tokens.labels(model).inc(num_tokens)

    def load_finished(self, model: str, seconds: float) -> None:
        self._load.labels(model).observe(seconds)

    # ------------------------------------------------------------ what rpc/ tells

    def call_ended(self, call: EndedCall) -> None:
        self._rpc_duration.labels(call.method, call.status).observe(call.duration_s)
        if call.method not in GENERATE:
            return
        model = self._canonical_name(str(call.facts.get("model", "")))
        self._requests.labels(model, call.status, call.reason).inc()
        self._request_duration.labels(model, call.status).observe(call.duration_s)
