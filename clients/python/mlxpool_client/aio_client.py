"""The aio client: the calls of Client, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack

import grpc

from mlxpool.v1 import memory_service_pb2 as memory_pb
from mlxpool.v1 import memory_service_pb2_grpc as memory_rpc
from mlxpool.v1 import model_service_pb2 as model_pb
from mlxpool.v1 import model_service_pb2_grpc as model_rpc
from mlxpool_client import convert, requests
from mlxpool_client.aio_streams import AsyncEventStream, AsyncGeneration, AsyncLoading
from mlxpool_client.channel import DEFAULT_TARGET, open_aio_channel
from mlxpool_client.durations import optional_duration
from mlxpool_client.embeddings import (
    Embeddings,
    EmbedOptions,
    Input,
    embed_request,
    embeddings,
)
from mlxpool_client.enums import CacheKind, ModelState
from mlxpool_client.errors import UnavailableError
from mlxpool_client.fold import MemoryFold
from mlxpool_client.memory import LimitsChange, MemoryLimits, MemoryUsage
from mlxpool_client.models import Model, ServerInfo, Tokenization, Unloaded
from mlxpool_client.security import (
    Metadata,
    Tls,
    channel_credentials,
    check_key_is_safe,
    key_metadata,
)
from mlxpool_client.status import error_from

RequestT_contra = TypeVar("RequestT_contra", contravariant=True)
ResponseT_co = TypeVar("ResponseT_co", covariant=True)


class UnaryMethod(Protocol[RequestT_contra, ResponseT_co]):
    """What the stubs' unary methods look like."""

    def __call__(
        self,
        request: RequestT_contra,
        *,
        timeout: float | None,
        metadata: Metadata,
        wait_for_ready: bool | None,
    ) -> Awaitable[ResponseT_co]: ...


class AsyncClient:
    """Client for asyncio: the same arguments, results and errors, awaited.

    Make it inside a running event loop, and use it on that loop only. Cancelling a task cancels
    the call it waits for.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float | None = None,
        wait_for_ready: bool = False,
        tls: Tls | bool | None = None,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        channel: grpc.aio.Channel | None = None,
    ) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._wait_for_ready = wait_for_ready
        self._owns_channel = channel is None
        self._metadata = key_metadata(api_key)
        secrets = channel_credentials(tls, credentials)
        if api_key is not None and channel is None:
            check_key_is_safe(target, tls, is_secure=secrets is not None)
        if channel is None:
            # Without a running loop gRPC would bind the channel to one that never runs.
            asyncio.get_running_loop()
            channel = open_aio_channel(target, secrets)
        self._channel = channel
        self._models = model_rpc.ModelServiceStub(self._channel)
        self._memory = memory_rpc.MemoryServiceStub(self._channel)

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        if self._owns_channel:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the connection stands.

        Raises: UnavailableError when it does not within `timeout_s` seconds.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._channel.channel_ready()
        except TimeoutError as error:
            raise UnavailableError(
                f"nothing answered at {self.target} within {timeout_s} s",
                code=grpc.StatusCode.UNAVAILABLE,
            ) from error

    # ------------------------------------------------------------ generation

    def generate(
        self,
        model: str,
        prompt: str | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[requests.GenerateOptions],
    ) -> AsyncGeneration:
        """Start a generation: `async for` over what is returned, or await its text() or result().

        Errors come with the first event. Cancelling the reading task cancels the generation.
        """
        request = requests.generate_request(model, prompt, **options)
        call = self._models.Generate(
            request,
            timeout=self._deadline(timeout_s),
            metadata=self._metadata,
            wait_for_ready=self._wait_for_ready,
        )
        return AsyncGeneration(call)

    async def generate_text(
        self,
        model: str,
        prompt: str | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[requests.GenerateOptions],
    ) -> str:
        """Generate and return the whole text; the arguments are those of generate()."""
        options.setdefault("final_only", True)
        async with self.generate(model, prompt, timeout_s=timeout_s, **options) as generation:
            return await generation.text()

    async def cancel_generation(
        self, generation_id: str, *, timeout_s: float | None = None
    ) -> None:
        """End a generation that somebody else reads, with FinishReason.CANCELLED."""
        request = model_pb.CancelGenerationRequest(generation_id=generation_id)
        await self._call(self._models.CancelGeneration, request, timeout_s)

    async def tokenize(
        self,
        model: str,
        prompt: str | None = None,
        *,
        messages: Sequence[requests.Message] | None = None,
        token_ids: Sequence[int] | None = None,
        include_pieces: bool = False,
        timeout_s: float | None = None,
    ) -> Tokenization:
        """Return the tokens that a generation would see; needs no loaded weights."""
        request = model_pb.TokenizeRequest(
            model=model,
            prompt=requests.prompt_message(prompt, messages, token_ids),
            include_pieces=include_pieces,
        )
        return convert.tokenization(await self._call(self._models.Tokenize, request, timeout_s))

    async def count_tokens(
        self,
        model: str,
        prompt: str | None = None,
        *,
        messages: Sequence[requests.Message] | None = None,
        token_ids: Sequence[int] | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Return how many tokens a generation would see; needs no loaded weights."""
        request = model_pb.CountTokensRequest(
            model=model, prompt=requests.prompt_message(prompt, messages, token_ids)
        )
        return (await self._call(self._models.CountTokens, request, timeout_s)).token_count

    async def embed(
        self,
        model: str,
        inputs: Sequence[Input],
        *,
        timeout_s: float | None = None,
        **options: Unpack[EmbedOptions],
    ) -> Embeddings:
        """Return one vector for each input: a text, a list of messages, or a list of token ids.

        `options` are the fields of EmbedOptions. Raises: InvalidRequestError and its kinds, whose
        `field_violations` name the input, as `inputs[3]`; CapabilityMissingError.
        """
        request = embed_request(model, inputs, **options)
        return embeddings(await self._call(self._models.Embed, request, timeout_s))

    # ------------------------------------------------------------ models

    async def list_models(
        self, *, states: Sequence[ModelState] = (), timeout_s: float | None = None
    ) -> list[Model]:
        """Return all models that the server has, or those in one of `states`."""
        models: list[Model] = []
        page_token = ""
        while True:
            request = requests.list_request(states, page_token)
            page = await self._call(self._models.ListModels, request, timeout_s)
            models.extend(convert.model(model) for model in page.models)
            page_token = page.next_page_token
            if not page_token:
                return models

    async def get_model(
        self, model: str, *, adapter: str = "", timeout_s: float | None = None
    ) -> Model:
        """Return one model. Raises: ModelNotFoundError."""
        request = model_pb.GetModelRequest(model=model, adapter=adapter)
        return convert.model((await self._call(self._models.GetModel, request, timeout_s)).model)

    def load_model(
        self,
        model: str,
        *,
        timeout_s: float | None = None,
        **options: Unpack[requests.LoadOptions],
    ) -> AsyncLoading:
        """Load a model; read or await what is returned. A cancelled reader stops watching only."""
        call = self._models.LoadModel(
            requests.load_request(model, **options),
            timeout=self._deadline(timeout_s),
            metadata=self._metadata,
            wait_for_ready=self._wait_for_ready,
        )
        return AsyncLoading(call)

    async def unload_model(
        self,
        model: str,
        *,
        adapter: str = "",
        force: bool = False,
        timeout_s: float | None = None,
    ) -> Unloaded:
        """Unload a model once its generations are done; `force` cancels them instead."""
        request = model_pb.UnloadModelRequest(model=model, adapter=adapter, force=force)
        return convert.unloaded(await self._call(self._models.UnloadModel, request, timeout_s))

    async def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """Return the server's versions and device."""
        request = model_pb.GetServerInfoRequest()
        return convert.server_info(await self._call(self._models.GetServerInfo, request, timeout_s))

    # ------------------------------------------------------------ memory

    async def memory_usage(self, *, timeout_s: float | None = None) -> MemoryUsage:
        """Return the memory in use now, in bytes."""
        request = memory_pb.GetMemoryUsageRequest()
        return convert.memory_usage(
            (await self._call(self._memory.GetMemoryUsage, request, timeout_s)).usage
        )

    def watch_memory_usage(
        self, interval_s: float | None = None, *, timeout_s: float | None = None
    ) -> AsyncEventStream[MemoryUsage]:
        """Return a stream of samples that ends only when it is closed, or after `timeout_s`."""
        request = memory_pb.WatchMemoryUsageRequest(
            interval=optional_duration(interval_s, "interval_s")
        )
        call = self._memory.WatchMemoryUsage(
            request, timeout=timeout_s, metadata=self._metadata, wait_for_ready=self._wait_for_ready
        )
        return AsyncEventStream(call, MemoryFold())

    async def set_memory_limits(
        self,
        *,
        pool_bytes: int | None = None,
        memory_bytes: int | None = None,
        cache_bytes: int | None = None,
        wired_bytes: int | None = None,
        timeout_s: float | None = None,
    ) -> LimitsChange:
        """Change the limits that are not None; models may be evicted for the pool's."""
        limits = MemoryLimits(pool_bytes, memory_bytes, cache_bytes, wired_bytes)
        request = requests.limits_request(limits)
        return convert.limits_change(
            await self._call(self._memory.SetMemoryLimits, request, timeout_s)
        )

    async def clear_cache(self, *kinds: CacheKind, timeout_s: float | None = None) -> int:
        """Free caches, MLX's buffers if no kind is named; return the bytes freed."""
        request = requests.clear_cache_request(kinds)
        return (await self._call(self._memory.ClearCache, request, timeout_s)).freed_bytes

    async def reset_peak_memory(self, *, timeout_s: float | None = None) -> int:
        """Start a new peak; return the previous one in bytes."""
        request = memory_pb.ResetPeakMemoryRequest()
        return (
            await self._call(self._memory.ResetPeakMemory, request, timeout_s)
        ).previous_peak_bytes

    def _deadline(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s

    async def _call(
        self,
        method: UnaryMethod[RequestT_contra, ResponseT_co],
        request: RequestT_contra,
        timeout_s: float | None,
    ) -> ResponseT_co:
        try:
            return await method(
                request,
                timeout=self._deadline(timeout_s),
                metadata=self._metadata,
                wait_for_ready=self._wait_for_ready,
            )
        except grpc.RpcError as error:
            raise error_from(error) from error
