"""The gRPC server: our services, the standard ones, and the channel's settings."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

from google.rpc import error_details_pb2
from grpc import aio
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health as standard_health
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from mlxpool.v1 import (
    memory_service_pb2,
    memory_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)
from mlxpool_server.errors import AddressUnavailableError
from mlxpool_server.rpc.access.gate import Gate
from mlxpool_server.rpc.descriptors import ReflectedDescriptors
from mlxpool_server.rpc.health import Health
from mlxpool_server.rpc.interceptors.errors import errors_to_status
from mlxpool_server.rpc.interceptors.logging import logged
from mlxpool_server.rpc.interceptors.wrap import AroundInterceptor
from mlxpool_server.rpc.memory_service import MemoryService
from mlxpool_server.rpc.model_service import ModelService
from mlxpool_server.rpc.observer import CallObserver
from mlxpool_server.rpc.tls import Certificates

CONNECT_TIMEOUT_S = 1.0
# A client is asked whether it is there after so long without a word, and has so long to answer.
SILENCE_S = 30.0
ANSWER_S = 10.0

# Reflection resolves the details in our statuses only when this file is registered.
_DETAILS = error_details_pb2.DESCRIPTOR


def build_server(
    *,
    model_service: ModelService,
    memory_service: MemoryService,
    health: Health,
    gate: Gate,
    max_message_bytes: int,
    observers: Sequence[CallObserver] = (),
) -> aio.Server:
    own = [logged(observers), errors_to_status]
    server = aio.server(
        interceptors=[
            # A line for each probe of the health would drown the others.
            AroundInterceptor(gate, own=own, standard=[errors_to_status])
        ],
        options=channel_options(max_message_bytes),
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(model_service, server)
    memory_service_pb2_grpc.add_MemoryServiceServicer_to_server(memory_service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    channelz.add_channelz_servicer(server)
    reflection.enable_server_reflection(_reflected_services(), server, ReflectedDescriptors())
    return server


def bind(
    server: aio.Server, addresses: Sequence[str], certificates: Certificates | None
) -> tuple[str, ...]:
    """Bind every address; return them with the ports the kernel picked.

    `certificates` are for TCP; a unix socket is guarded by the file system.
    Raises: AddressUnavailableError.
    """
    bound = []
    for address in addresses:
        if _is_served_socket(address):
            raise AddressUnavailableError(address)
        try:
            if certificates is None or address.startswith("unix:"):
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, certificates.credentials())
        except RuntimeError as error:
            raise AddressUnavailableError(address) from error
        if address.startswith("unix:"):
            bound.append(address)
        else:
            bound.append(f"{address.rpartition(':')[0]}:{port}")
    return tuple(bound)


def _is_served_socket(address: str) -> bool:
    """Whether somebody listens on this unix socket: grpc would take it away from them, silently."""
    if not address.startswith("unix:"):
        return False
    path = address.removeprefix("unix:").removeprefix("//")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(CONNECT_TIMEOUT_S)
        return probe.connect_ex(path) == 0


def channel_options(max_message_bytes: int) -> list[tuple[str, Any]]:
    """How every port of ours treats its connections."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # Otherwise two servers share a port, silently.
        ("grpc.so_reuseport", 0),
        # Clients may ping through a long silence; by default that costs them the connection.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Clients that vanished without closing are noticed, and their slots freed; so are those
        # that never said hello.
        ("grpc.keepalive_time_ms", int(1e3 * SILENCE_S)),
        ("grpc.keepalive_timeout_ms", int(1e3 * ANSWER_S)),
        # Without it a ping may go unanswered for a minute, whatever keepalive_timeout_ms says.
        ("grpc.http2.ping_timeout_ms", int(1e3 * ANSWER_S)),
        ("grpc.enable_channelz", 1),
    ]


def _reflected_services() -> tuple[str, ...]:
    return (
        model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
        memory_service_pb2.DESCRIPTOR.services_by_name["MemoryService"].full_name,
        standard_health.SERVICE_NAME,
        "grpc.channelz.v1.Channelz",
        reflection.SERVICE_NAME,
    )
