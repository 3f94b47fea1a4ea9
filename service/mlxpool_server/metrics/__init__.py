"""Prometheus metrics: what is measured, and the port where it is read. See docs/metrics.md."""

from mlxpool_server.metrics.endpoint import MetricsEndpoint
from mlxpool_server.metrics.instruments import Instruments
from mlxpool_server.metrics.sample import Sample

__all__ = ["Instruments", "MetricsEndpoint", "Sample"]
