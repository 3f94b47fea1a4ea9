"""Reflection and channelz, as grpcurl and grpcdebug use them."""

from __future__ import annotations

import pytest
from google.protobuf import descriptor_pb2
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rpc.harness import Server


async def reflect(
    server: Server, request: reflection_pb2.ServerReflectionRequest
) -> reflection_pb2.ServerReflectionResponse:
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    async for response in stub.ServerReflectionInfo(iter([request])):
        return response
    raise AssertionError("no answer")


async def test_reflection_lists_every_service(server: Server) -> None:
    """Ours and the standard ones."""
    answer = await reflect(server, reflection_pb2.ServerReflectionRequest(list_services=""))
    assert {each.name for each in answer.list_services_response.service} == {
        "mlxpool.v1.ModelService",
        "mlxpool.v1.MemoryService",
        "grpc.health.v1.Health",
        "grpc.channelz.v1.Channelz",
        "grpc.reflection.v1alpha.ServerReflection",
    }


@pytest.mark.parametrize(
    "symbol",
    [
        "mlxpool.v1.ModelService",
        "mlxpool.v1.MemoryService",
        "mlxpool.v1.GenerateRequest",
        "google.rpc.ErrorInfo",
        "google.rpc.BadRequest",
        "google.rpc.ResourceInfo",
        "google.rpc.QuotaFailure",
        "google.rpc.RetryInfo",
    ],
)
async def test_reflection_resolves(server: Server, symbol: str) -> None:
    """Without the details' descriptors grpcurl shows them as base64."""
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
    answer = await reflect(server, request)
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(raw)
        for raw in answer.file_descriptor_response.file_descriptor_proto
    ]
    package, _, name = symbol.rpartition(".")
    assert any(
        file.package == package
        and name in {each.name for each in (*file.message_type, *file.service)}
        for file in files
    )


async def test_reflection_finds_methods(server: Server) -> None:
    """As ghz asks for them; what is not there is not found."""
    for name, is_there in (("Generate", True), ("Nothing", False)):
        symbol = f"mlxpool.v1.ModelService.{name}"
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
        answer = await reflect(server, request)
        assert answer.HasField("file_descriptor_response") is is_there
        assert answer.HasField("error_response") is not is_there


async def test_channelz_counts_our_calls(server: Server) -> None:
    """It is on, and sees this server."""
    stub = channelz_pb2_grpc.ChannelzStub(server.channel)
    before = (await stub.GetServers(channelz_pb2.GetServersRequest())).server
    await server.assert_serves()
    after = (await stub.GetServers(channelz_pb2.GetServersRequest())).server
    assert after
    started = sum(each.data.calls_started for each in after)
    assert started > sum(each.data.calls_started for each in before)
