"""The sync client. Every method is one call of the contract; safe to use from many threads."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack

import grpc

from mlxpool.v1 import memory_service_pb2 as memory_pb
from mlxpool.v1 import memory_service_pb2_grpc as memory_rpc
from mlxpool.v1 import model_service_pb2 as model_pb
from mlxpool.v1 import model_service_pb2_grpc as model_rpc
from mlxpool_client import convert, requests
from mlxpool_client.channel import DEFAULT_TARGET, open_channel
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
from mlxpool_client.streams import EventStream, Generation, Loading

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
    ) -> ResponseT_co: ...


class Client:
    """A connection to one server; use it in a `with` block, or close() it.

    target: "host:port" or "unix:path". timeout_s: the deadline of every call that does not name
    its own; None = wait as long as it takes. wait_for_ready: calls wait for the server to come
    up, up to their deadline, instead of failing after about a second. tls: True, or Tls with the
    files to use; False = plaintext, even for a key to another machine. api_key: sent with every
    call. credentials: gRPC's own, instead of tls. channel: use this channel instead of making one;
    it stays the caller's to close.

    Calls raise MlxpoolError and its kinds. UNAVAILABLE is retried up to three times, and only
    as long as no message has arrived: an answer never starts twice.
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
        channel: grpc.Channel | None = None,
    ) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._wait_for_ready = wait_for_ready
        self._owns_channel = channel is None
        self._metadata = key_metadata(api_key)
        secrets = channel_credentials(tls, credentials)
        if api_key is not None and channel is None:
            check_key_is_safe(target, tls, is_secure=secrets is not None)
        self._channel = channel if channel is not None else open_channel(target, secrets)
        self._models = model_rpc.ModelServiceStub(self._channel)
        self._memory = memory_rpc.MemoryServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        if self._owns_channel:
            self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the connection stands.

        Raises: UnavailableError when it does not within `timeout_s` seconds.
        """
        ready = grpc.channel_ready_future(self._channel)
        try:
            ready.result(timeout=timeout_s)
        except grpc.FutureTimeoutError as error:
            raise UnavailableError(
                f"nothing answered at {self.target} within {timeout_s} s",
                code=grpc.StatusCode.UNAVAILABLE,
            ) from error
        finally:
            ready.cancel()

    # ------------------------------------------------------------ generation

    def generate(
        self,
        model: str,
        prompt: str | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[requests.GenerateOptions],
    ) -> Generation:
        """Start a generation; iterate over what is returned, or ask it for text() or result().

        `options` are the fields of GenerateOptions; the input is exactly one of `prompt`,
        `messages` and `token_ids`. Past `timeout_s` the output is lost (DeadlineError), past
        `max_duration_s` it ends with what there is. Errors come with the first event.

        Raises: TypeError and ValueError for arguments that cannot be sent.
        """
        request = requests.generate_request(model, prompt, **options)
        call = self._models.Generate(
            request,
            timeout=self._deadline(timeout_s),
            metadata=self._metadata,
            wait_for_ready=self._wait_for_ready,
        )
        return Generation(call)

    def generate_text(
        self,
        model: str,
        prompt: str | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[requests.GenerateOptions],
    ) -> str:
        """Generate and return the whole text; the arguments are those of generate()."""
        options.setdefault("final_only", True)
        with self.generate(model, prompt, timeout_s=timeout_s, **options) as generation:
            return generation.text()

    def cancel_generation(self, generation_id: str, *, timeout_s: float | None = None) -> None:
        """End a generation that somebody else reads, with FinishReason.CANCELLED.

        Raises: GenerationNotFoundError when it is not in flight.
        """
        request = model_pb.CancelGenerationRequest(generation_id=generation_id)
        self._call(self._models.CancelGeneration, request, timeout_s)

    def tokenize(
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
        return convert.tokenization(self._call(self._models.Tokenize, request, timeout_s))

    def count_tokens(
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
        return self._call(self._models.CountTokens, request, timeout_s).token_count

    def embed(
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
        return embeddings(self._call(self._models.Embed, request, timeout_s))

    # ------------------------------------------------------------ models

    def list_models(
        self, *, states: Sequence[ModelState] = (), timeout_s: float | None = None
    ) -> list[Model]:
        """Return all models that the server has, or those in one of `states`."""
        models: list[Model] = []
        page_token = ""
        while True:
            request = requests.list_request(states, page_token)
            page = self._call(self._models.ListModels, request, timeout_s)
            models.extend(convert.model(model) for model in page.models)
            page_token = page.next_page_token
            if not page_token:
                return models

    def get_model(self, model: str, *, adapter: str = "", timeout_s: float | None = None) -> Model:
        """Return one model. Raises: ModelNotFoundError."""
        request = model_pb.GetModelRequest(model=model, adapter=adapter)
        return convert.model(self._call(self._models.GetModel, request, timeout_s).model)

    def load_model(
        self,
        model: str,
        *,
        timeout_s: float | None = None,
        **options: Unpack[requests.LoadOptions],
    ) -> Loading:
        """Load a model, or watch a load that runs already; on a loaded model update its options.

        `options` are the fields of LoadOptions. Errors, PoolMemoryLimitError among them, come
        while the result is read.
        """
        call = self._models.LoadModel(
            requests.load_request(model, **options),
            timeout=self._deadline(timeout_s),
            metadata=self._metadata,
            wait_for_ready=self._wait_for_ready,
        )
        return Loading(call)

    def unload_model(
        self,
        model: str,
        *,
        adapter: str = "",
        force: bool = False,
        timeout_s: float | None = None,
    ) -> Unloaded:
        """Unload a model once its generations are done; `force` cancels them instead."""
        request = model_pb.UnloadModelRequest(model=model, adapter=adapter, force=force)
        return convert.unloaded(self._call(self._models.UnloadModel, request, timeout_s))

    def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """Return the server's versions and device."""
        request = model_pb.GetServerInfoRequest()
        return convert.server_info(self._call(self._models.GetServerInfo, request, timeout_s))

    # ------------------------------------------------------------ memory

    def memory_usage(self, *, timeout_s: float | None = None) -> MemoryUsage:
        """Return the memory in use now, in bytes."""
        request = memory_pb.GetMemoryUsageRequest()
        return convert.memory_usage(
            self._call(self._memory.GetMemoryUsage, request, timeout_s).usage
        )

    def watch_memory_usage(
        self, interval_s: float | None = None, *, timeout_s: float | None = None
    ) -> EventStream[MemoryUsage]:
        """Return a stream of samples that ends only when it is closed, or after `timeout_s`.

        interval_s: None = the server's choice, 1 s; it clamps to 0.1 to 60 s. The client's own
        timeout does not apply.
        """
        request = memory_pb.WatchMemoryUsageRequest(
            interval=optional_duration(interval_s, "interval_s")
        )
        call = self._memory.WatchMemoryUsage(
            request, timeout=timeout_s, metadata=self._metadata, wait_for_ready=self._wait_for_ready
        )
        return EventStream(call, MemoryFold())

    def set_memory_limits(
        self,
        *,
        pool_bytes: int | None = None,
        memory_bytes: int | None = None,
        cache_bytes: int | None = None,
        wired_bytes: int | None = None,
        timeout_s: float | None = None,
    ) -> LimitsChange:
        """Change the limits that are not None; models may be evicted for the pool's.

        Raises: MemoryInUseError when the new limit is below what is pinned or in use.
        """
        limits = MemoryLimits(pool_bytes, memory_bytes, cache_bytes, wired_bytes)
        request = requests.limits_request(limits)
        return convert.limits_change(self._call(self._memory.SetMemoryLimits, request, timeout_s))

    def clear_cache(self, *kinds: CacheKind, timeout_s: float | None = None) -> int:
        """Free caches, MLX's buffers if no kind is named; return the bytes freed."""
        request = requests.clear_cache_request(kinds)
        return self._call(self._memory.ClearCache, request, timeout_s).freed_bytes

    def reset_peak_memory(self, *, timeout_s: float | None = None) -> int:
        """Start a new peak; return the previous one in bytes."""
        request = memory_pb.ResetPeakMemoryRequest()
        return self._call(self._memory.ResetPeakMemory, request, timeout_s).previous_peak_bytes

    def _deadline(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s

    def _call(
        self,
        method: UnaryMethod[RequestT_contra, ResponseT_co],
        request: RequestT_contra,
        timeout_s: float | None,
    ) -> ResponseT_co:
        try:
            return method(
                request,
                timeout=self._deadline(timeout_s),
                metadata=self._metadata,
                wait_for_ready=self._wait_for_ready,
            )
        except grpc.RpcError as error:
            raise error_from(error) from error
