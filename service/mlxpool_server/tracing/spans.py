"""A span for each call, written when it has ended, out of what is known of it then."""

from __future__ import annotations

from collections.abc import Iterator

from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.util.types import AttributeValue

from mlxpool_server.domain import GenerationFinished, GenerationTimings
from mlxpool_server.rpc.observer import GENERATE, EndedCall

# What is the server's fault, by OpenTelemetry's rules for gRPC servers; the others are callers'.
_SERVER_ERRORS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
_NS = 1_000_000_000


class CallSpans:
    """Implements rpc's observer. A caller's W3C trace context makes its span the parent.

    Nothing of a prompt, an answer or a key becomes an attribute.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def call_ended(self, call: EndedCall) -> None:
        span = self._tracer.start_span(
            call.method,
            context=_parent_of(call),
            kind=SpanKind.SERVER,
            attributes=dict(_attributes(call)),
            start_time=_ns(call.start_time),
        )
        if call.status in _SERVER_ERRORS:
            span.set_status(Status(StatusCode.ERROR))
        if call.finished is not None and span.is_recording():
            self._phases(call, call.finished.timings, set_span_in_context(span))
        span.end(_ns(call.start_time + call.duration_s))

    def _phases(self, call: EndedCall, timings: GenerationTimings, parent: Context) -> None:
        """They follow each other, and the last one ends when the generation did.

        Before the first one the prompt was rendered; after the last one the reader was slow.
        """
        phases = {
            "load": timings.load_s,
            "queue": timings.queue_s,
            "prefill": timings.prefill_s,
            "decode": timings.decode_s,
        }
        start = call.start_time + timings.total_s - sum(phases.values())
        for name, seconds in phases.items():
            if seconds > 0:
                span = self._tracer.start_span(name, context=parent, start_time=_ns(start))
                span.end(_ns(start + seconds))
            start += seconds


def _parent_of(call: EndedCall) -> Context:
    texts = {name: value for name, value in call.metadata if isinstance(value, str)}
    return propagate.extract(texts)


def _attributes(call: EndedCall) -> Iterator[tuple[str, AttributeValue]]:
    yield "rpc.system.name", "grpc"
    yield "rpc.method", call.method
    yield "rpc.response.status_code", call.status
    if call.reason:
        yield "error.type", call.reason
    if call.method not in GENERATE:
        return
    yield "gen_ai.operation.name", "text_completion"
    yield "gen_ai.provider.name", "mlxpool"
    for attribute, fact in (
        ("gen_ai.request.model", "model"),
        ("gen_ai.response.id", "generation_id"),
    ):
        if value := call.facts.get(fact):
            yield attribute, str(value)
    if call.finished is not None:
        yield from _outcome(call.finished)


def _outcome(finished: GenerationFinished) -> Iterator[tuple[str, AttributeValue]]:
    usage, first = finished.usage, finished.timings.time_to_first_token_s
    yield "gen_ai.usage.input_tokens", usage.prompt_tokens
    yield "gen_ai.usage.cache_read.input_tokens", usage.cached_prompt_tokens
    yield "gen_ai.usage.output_tokens", usage.completion_tokens
    yield "gen_ai.response.finish_reasons", (finished.finish_reason.value,)
    if first is not None:
        yield "gen_ai.response.time_to_first_chunk", first


def _ns(seconds: float) -> int:
    return round(seconds * _NS)
