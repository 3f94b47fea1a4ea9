"""Spans of real calls, in memory: a server span each, the phases below it, and no text."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
import pytest_asyncio
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from fakes import FakeFiles, FakeModel
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_server import telemetry
from mlxpool_server.tracing import CallSpans
from rpc.harness import Server, failure_of, release, running_server, text_request, until

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
SAMPLED = ("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01")
UNSAMPLED = ("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-00")
GENERATE = "mlxpool.v1.ModelService/Generate"
PROMPT = "my secret prompt"


class Traced:
    """A server whose spans stay in memory."""

    def __init__(self, server: Server, exporter: InMemorySpanExporter) -> None:
        self.server = server
        self.exporter = exporter

    async def spans(self, method: str = GENERATE) -> Mapping[str, ReadableSpan]:
        """By name, once the call's own, which comes last, is there."""
        await until(lambda: method in self._by_name())
        return self._by_name()

    def _by_name(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}


class InMemory:
    """In the place of what sends spans away."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._provider = TracerProvider(shutdown_on_exit=False)
        self._provider.add_span_processor(SimpleSpanProcessor(exporter))
        self.spans = CallSpans(self._provider.get_tracer("test"))
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


@pytest_asyncio.fixture
async def traced(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Traced]:
    exporter = InMemorySpanExporter()
    traces = InMemory(exporter)
    monkeypatch.setattr(telemetry, "_traces", lambda _: traces)
    files = {"m": FakeFiles(), "slow": FakeFiles(model=FakeModel(is_stepped=True))}
    async with running_server(files, otlp_endpoint="http://127.0.0.1:4317") as server:
        yield Traced(server, exporter)
    assert traces.is_closed


async def generate(traced: Traced, *metadata: tuple[str, str]) -> Mapping[str, ReadableSpan]:
    call = traced.server.models.Generate(text_request(PROMPT), metadata=metadata)
    assert [event async for event in call]
    return await traced.spans()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_off_by_default(server: Server) -> None:
    """Nobody observes calls unless a setting says so."""
    assert server.app._telemetry.call_observers == ()


async def test_a_generation_has_a_span(traced: Traced) -> None:
    """A server span named after the method, with the conventions' attributes."""
    span = (await generate(traced))[GENERATE]
    assert span.kind is SpanKind.SERVER
    assert span.status.status_code is StatusCode.UNSET
    found = attributes(span)
    assert found["rpc.system.name"] == "grpc"
    assert found["rpc.response.status_code"] == "OK"
    assert found["gen_ai.request.model"] == "m"
    assert found["gen_ai.usage.input_tokens"] == len(PROMPT)
    assert found["gen_ai.usage.output_tokens"] == len(PROMPT) + 1
    assert found["gen_ai.response.finish_reasons"] == ("stop",)
    assert found["gen_ai.response.id"]


async def test_its_phases_are_below_it(traced: Traced) -> None:
    """Load, queue, prefill and decode follow each other inside the call's own span."""
    spans = await generate(traced)
    whole = spans[GENERATE]
    assert whole.context is not None
    phases = [spans[name] for name in ("load", "queue", "prefill", "decode")]
    for phase in phases:
        assert phase.parent is not None
        assert phase.parent.span_id == whole.context.span_id
    times = [(phase.start_time or 0, phase.end_time or 0) for phase in phases]
    for (_, end), (start, _) in itertools.pairwise(times):
        # Rounded to nanoseconds one by one.
        assert abs(start - end) < 1000
    slack_ns = 10_000_000
    assert times[0][0] >= (whole.start_time or 0) - slack_ns
    assert times[-1][1] <= (whole.end_time or 0) + slack_ns


async def test_the_callers_trace_goes_on(traced: Traced) -> None:
    """W3C traceparent in the metadata makes the caller's span the parent."""
    span = (await generate(traced, SAMPLED))[GENERATE]
    assert span.context is not None
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == PARENT_ID


async def test_a_caller_that_does_not_sample_is_not_traced(traced: Traced) -> None:
    """Its decision holds here too."""
    call = traced.server.models.Generate(text_request(), metadata=(UNSAMPLED,))
    assert [event async for event in call]
    await traced.server.models.GetServerInfo(pb.GetServerInfoRequest())
    spans = await traced.spans("mlxpool.v1.ModelService/GetServerInfo")
    assert GENERATE not in spans


async def test_a_bad_trace_context_is_ignored(traced: Traced) -> None:
    """The call is answered, and starts a trace of its own."""
    span = (await generate(traced, ("traceparent", "00-zz-zz-zz")))[GENERATE]
    assert span.parent is None


async def test_nothing_that_was_said_is_in_a_span(traced: Traced) -> None:
    """Neither the prompt, nor the answer (which repeats it), nor a key."""
    spans = await generate(traced, ("authorization", "Bearer mlxpool_secret-key"))
    everything = " ".join(span.to_json() for span in spans.values())
    assert PROMPT not in everything
    assert "secret-key" not in everything


async def test_a_refused_call_says_why(traced: Traced) -> None:
    """The caller's fault is no error of the server's; the reason is there."""
    await failure_of(traced.server.models.Generate(text_request(model="nobody")))
    span = (await traced.spans())[GENERATE]
    assert span.status.status_code is StatusCode.UNSET
    assert attributes(span)["rpc.response.status_code"] == "NOT_FOUND"
    assert attributes(span)["error.type"] == "MODEL_NOT_FOUND"


async def test_a_failed_call_is_an_error(traced: Traced) -> None:
    """INTERNAL is."""
    traced.server.files["m"].model.step_errors.append(RuntimeError("broken"))
    await failure_of(traced.server.models.Generate(text_request()))
    span = (await traced.spans())[GENERATE]
    assert span.status.status_code is StatusCode.ERROR
    assert "broken" not in span.to_json()


async def test_a_cancelled_call_has_a_span(traced: Traced) -> None:
    """Without phases: nobody knows how long they would have been."""
    reader = traced.server.reader(text_request(model="slow"))
    await reader.next()
    await reader.hang_up()
    release(traced.server.files["slow"].model, 100)
    spans = await traced.spans()
    assert attributes(spans[GENERATE])["rpc.response.status_code"] == "CANCELLED"
    assert set(spans) == {GENERATE}
