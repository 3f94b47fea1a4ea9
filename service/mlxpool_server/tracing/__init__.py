"""OpenTelemetry traces: a span a call, and its phases. Needs the extra `otel`. docs/tracing.md."""

from mlxpool_server.tracing.export import Traces
from mlxpool_server.tracing.spans import CallSpans

__all__ = ["CallSpans", "Traces"]
