"""Sends spans by OTLP, from a thread of OpenTelemetry's own."""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from mlxpool_server.tracing.spans import CallSpans

# A collector that does not answer must not hold up the server's end.
EXPORT_TIMEOUT_S = 3.0


class Traces:
    """No globals: the provider is this server's own. OTEL_* variables hold as everywhere."""

    def __init__(self, endpoint: str, version: str) -> None:
        """`endpoint`: http://HOST:PORT, or https:// for TLS."""
        resource = Resource.create({"service.name": "mlxpool", "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(
            endpoint, insecure=endpoint.startswith("http://"), timeout=EXPORT_TIMEOUT_S
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self.spans = CallSpans(self._provider.get_tracer("mlxpool", version))

    def close(self) -> None:
        """Send what is left. Blocks."""
        self._provider.shutdown()
