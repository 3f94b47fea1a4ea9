"""Puts a context manager around the handlers of our own services, unary and streaming alike."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, TypeAlias

import grpc
from grpc import aio

OWN_PREFIX = "/mlxpool."

Context = aio.ServicerContext[Any, Any]
Around = Callable[[str, Context], AbstractAsyncContextManager[None]]
# Generic in its type stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class AroundInterceptor(aio.ServerInterceptor):
    """Runs each of our handlers inside `around(method, context)`.

    The standard services (health, reflection, channelz) are left alone.
    """

    def __init__(self, around: Around) -> None:
        self._around = around

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(OWN_PREFIX):
            return handler
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(method, handler.unary_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, handler.unary_unary),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _unary(self, method: str, call: Any) -> Any:
        async def run(request: Any, context: Context) -> Any:
            async with self._around(method, context):
                return await call(request, context)

        return run

    def _stream(self, method: str, call: Any) -> Any:
        async def run(request: Any, context: Context) -> AsyncGenerator[Any, None]:
            async with self._around(method, context), aclosing(call(request, context)) as messages:
                async for message in messages:
                    yield message

        return run
