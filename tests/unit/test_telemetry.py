"""What the settings switch on, and what they need for it."""

from __future__ import annotations

import builtins
from concurrent import futures
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc

from fakes import FakeMemory
from mlxpool_server.errors import SettingsError
from mlxpool_server.rpc.observer import EndedCall
from mlxpool_server.settings import Settings, load_settings
from mlxpool_server.telemetry import Telemetry
from mlxpool_server.tracing import Traces

DEVICE = FakeMemory().device()


class Collector(otlp_grpc.TraceServiceServicer):
    """Takes spans as a collector does."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the service's name for it
        self.requests.append(request)
        return otlp.ExportTraceServiceResponse()


def test_traces_without_their_packages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start fails with the extra to install, not with a traceback."""
    import_module = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "mlxpool_server.tracing":
            raise ModuleNotFoundError("no", name="opentelemetry")
        return import_module(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    settings = Settings(otlp_endpoint="http://127.0.0.1:4317")
    with pytest.raises(SettingsError, match=r"pip install 'mlxpool\[otel\]'"):
        Telemetry(settings, DEVICE)


def test_a_collector_gets_the_spans() -> None:
    """Over OTLP, with the service's name and version; what is left is sent at the end."""
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    otlp_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        traces = Traces(f"http://127.0.0.1:{port}", "1.2.3")
        traces.spans.call_ended(EndedCall("a.B/C", "OK", start_time=1.0, duration_s=2.0))
        traces.close()
    finally:
        server.stop(None).wait()
    (spans,) = (each for request in collector.requests for each in request.resource_spans)
    resource = {each.key: each.value.string_value for each in spans.resource.attributes}
    assert (resource["service.name"], resource["service.version"]) == ("mlxpool", "1.2.3")
    (span,) = spans.scope_spans[0].spans
    assert (span.name, span.start_time_unix_nano, span.end_time_unix_nano) == (
        "a.B/C",
        1_000_000_000,
        3_000_000_000,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metrics_listen", "unix:/run/metrics"),
        ("metrics_listen", "9464"),
        ("otlp_endpoint", "127.0.0.1:4317"),
        ("otlp_endpoint", "http://a/v1/traces"),
        ("engine_stuck_s", "0"),
    ],
)
def test_wrong_values_are_refused(name: str, value: str) -> None:
    """With the setting's name and what to write."""
    with pytest.raises(SettingsError, match=name):
        load_settings(None, {name: value}, {})
