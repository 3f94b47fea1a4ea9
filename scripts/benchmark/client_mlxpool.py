"""mlxpool through the generated stubs: tokens are counted by `completion_tokens`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from benchmark.clients import REQUEST_TIMEOUT_S, SMALL_WINDOW, Endpoint
from benchmark.workload import Answer, Request, Sampling, check_length
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool.v1 import model_service_pb2_grpc as pb_grpc


class MlxpoolClient:
    def __init__(self, endpoint: Endpoint) -> None:
        self._address = endpoint.address
        self._channel = grpc.aio.insecure_channel(endpoint.address)
        self._stub = pb_grpc.ModelServiceStub(self._channel)

    async def generate(self, request: Request, answer: Answer) -> None:
        times, counts = answer.times, answer.counts
        usage = pb.TokenUsage()
        async for response in self._stub.Generate(_message(request), timeout=REQUEST_TIMEOUT_S):
            if response.HasField("delta"):
                times.append(time.perf_counter())
                counts.append(response.delta.completion_tokens)
            elif response.HasField("finished"):
                usage = response.finished.usage
        check_length(request, usage.completion_tokens)
        answer.num_cached_tokens = usage.cached_prompt_tokens
        # The last tokens may bring no text, and so no delta.
        if not counts or counts[-1] != usage.completion_tokens:
            times.append(time.perf_counter())
            counts.append(usage.completion_tokens)
        answer.total = usage.completion_tokens

    @asynccontextmanager
    async def stalled(self, request: Request) -> AsyncIterator[None]:
        channel = grpc.aio.insecure_channel(self._address, options=SMALL_WINDOW)
        call = pb_grpc.ModelServiceStub(channel).Generate(_message(request))
        try:
            async for response in call:
                if response.HasField("delta"):
                    break
            yield
        finally:
            call.cancel()
            await channel.close()

    async def close(self) -> None:
        await self._channel.close()


def _message(request: Request) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=request.model,
        prompt=pb.Prompt(text=request.text),
        sampling=_sampling(request.sampling),
        stop=pb.StopConditions(max_tokens=request.max_tokens, ignore_eos=True),
    )


def _sampling(sampling: Sampling) -> pb.SamplingParams:
    params = pb.SamplingParams(temperature=sampling.temperature)
    if sampling.temperature == 0:
        return params
    params.top_p = sampling.top_p
    params.top_k = sampling.top_k
    params.min_p = sampling.min_p
    params.presence_penalty = sampling.presence_penalty
    params.frequency_penalty = sampling.frequency_penalty
    if sampling.repetition_penalty:
        params.repetition_penalty = sampling.repetition_penalty
    if sampling.seed is not None:
        params.seed = sampling.seed
    return params
