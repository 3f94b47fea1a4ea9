"""A gRPC server for the gateway: one model, no other service. Unknown ones are UNIMPLEMENTED."""

from __future__ import annotations

from collections.abc import Sequence

from grpc import aio
from smg_grpc_proto import mlx_engine_pb2_grpc as pb_grpc

from mlxpool_server.rpc.access.gate import Gate
from mlxpool_server.rpc.gateway.engine_service import EngineService
from mlxpool_server.rpc.interceptors.errors import errors_to_status
from mlxpool_server.rpc.interceptors.logging import logged
from mlxpool_server.rpc.interceptors.wrap import AroundInterceptor
from mlxpool_server.rpc.observer import CallObserver
from mlxpool_server.rpc.server import channel_options


def build_gateway_server(
    service: EngineService,
    *,
    gate: Gate,
    max_message_bytes: int,
    observers: Sequence[CallObserver] = (),
) -> aio.Server:
    around = AroundInterceptor(
        gate, own=[logged(observers), errors_to_status], standard=[errors_to_status]
    )
    server = aio.server(interceptors=[around], options=channel_options(max_message_bytes))
    pb_grpc.add_MlxEngineServicer_to_server(service, server)
    return server
