"""smg-grpc-servicer's MLX engine; runs in that package's environment, which has its stubs."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
from smg_grpc_proto import mlx_engine_pb2 as pb
from smg_grpc_proto import mlx_engine_pb2_grpc as pb_grpc

from benchmark.clients import REQUEST_TIMEOUT_S, SMALL_WINDOW, Endpoint
from benchmark.workload import Answer, Request, Sampling, check_length


class SmgClient:
    def __init__(self, endpoint: Endpoint) -> None:
        self._address = endpoint.address
        self._channel = grpc.aio.insecure_channel(endpoint.address)
        self._stub = pb_grpc.MlxEngineStub(self._channel)

    async def generate(self, request: Request, answer: Answer) -> None:
        times, counts = answer.times, answer.counts
        async for response in self._stub.Generate(_message(request), timeout=REQUEST_TIMEOUT_S):
            if response.HasField("chunk"):
                times.append(time.perf_counter())
                counts.append(response.chunk.completion_tokens)
                answer.num_cached_tokens = response.chunk.cached_tokens
        num_tokens = counts[-1] if counts else 0
        check_length(request, num_tokens)
        answer.total = num_tokens

    @asynccontextmanager
    async def stalled(self, request: Request) -> AsyncIterator[None]:
        channel = grpc.aio.insecure_channel(self._address, options=SMALL_WINDOW)
        call = pb_grpc.MlxEngineStub(channel).Generate(_message(request))
        try:
            await call.read()
            yield
        finally:
            call.cancel()
            await channel.close()

    async def close(self) -> None:
        await self._channel.close()


def _message(request: Request) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=uuid.uuid4().hex,
        # It takes no text.
        tokenized=pb.TokenizedInput(input_ids=request.ids),
        sampling_params=_sampling(request.sampling, request.max_tokens),
        stream=True,
    )


def _sampling(sampling: Sampling, max_tokens: int) -> pb.SamplingParams:
    return pb.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
        max_tokens=max_tokens,
        ignore_eos=True,
    )
