"""Puts context managers around the handlers of our own services, unary and streaming alike."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from mlxpool_server.errors import InvalidFieldError

OWN_PREFIX = "/mlxpool."

Context = aio.ServicerContext[Any, Any]
Around = Callable[[str, Context], AbstractAsyncContextManager[None]]
# Generic in its type stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class AroundInterceptor(aio.ServerInterceptor):
    """Runs each of our handlers inside every `around(method, context)`, the first one outermost.

    The standard services (health, reflection, channelz) are left alone.
    """

    def __init__(self, *arounds: Around) -> None:
        self._arounds = arounds

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
                request_deserializer=_Reader(handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, handler.unary_unary),
            request_deserializer=_Reader(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _unary(self, method: str, call: Any) -> Any:
        async def run(request: Any, context: Context) -> Any:
            async with self._around(method, context):
                return await call(_readable(request), context)

        return run

    def _stream(self, method: str, call: Any) -> Any:
        async def run(request: Any, context: Context) -> AsyncGenerator[Any, None]:
            async with (
                self._around(method, context),
                aclosing(call(_readable(request), context)) as messages,
            ):
                async for message in messages:
                    yield message

        return run

    @asynccontextmanager
    async def _around(self, method: str, context: Context) -> AsyncGenerator[None, None]:
        async with AsyncExitStack() as stack:
            for around in self._arounds:
                await stack.enter_async_context(around(method, context))
            yield


class _Reader:
    """Parses a request; one that does not parse is kept for the handler to refuse.

    grpc answers an error raised here with UNKNOWN and the error's text.
    """

    def __init__(self, parse: Callable[[bytes], Any] | None) -> None:
        self._parse = parse or bytes

    def __call__(self, data: bytes) -> Any:
        try:
            return self._parse(data)
        except DecodeError as error:
            return error


def _readable(request: Any) -> Any:
    if isinstance(request, DecodeError):
        raise InvalidFieldError("request", "is no message of this method's type")
    return request
