"""Kinds of clients: how each goes on with its streams until the window is over."""

from __future__ import annotations

import asyncio
import random
import string
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc.aio

from mlxpool.v1 import model_service_pb2 as pb
from mlxpool.v1 import model_service_pb2_grpc as pb_grpc
from soak.tally import Event, Stream, Tally, Window

# A connection of its own for each channel, with gRPC's reading ahead kept small.
_OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
_SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
STREAMS_PER_CONNECTION = 25
_STAGGER_S = 0.004
# After a refusal: a client that asks again at once only measures itself.
_PAUSE_S = 0.2
# More text than a small window takes, so that whoever does not read it blocks its sender.
_STALLED_TOKENS = 600
_CONNECT_TIMEOUT_S = 30.0
_PROMPT_WORDS = 8


@dataclass(frozen=True, slots=True)
class Crowd:
    """So many clients of one kind, a stream each at a time."""

    kind: str
    streams: int
    address: str
    max_tokens: int = 64
    # Every so many streams run for ever, until the server ends them.
    endless_share: float = 0.0
    seed: int = 0


class Client:
    """One stream after the other, of which `tally` is the account."""

    def __init__(
        self, crowd: Crowd, number: int, channel: grpc.aio.Channel, tally: Tally, window: Window
    ) -> None:
        self.crowd = crowd
        # Not secret: another seed, other requests.
        self.dice = random.Random(f"{crowd.seed} {crowd.kind} {number}")  # noqa: S311
        self.is_endless = number < crowd.endless_share * crowd.streams
        self._number = number
        self._channel = channel
        self._stub = pb_grpc.ModelServiceStub(channel)
        self._tally = tally
        self._window = window

    async def run(self, live: Callable[[Client], Awaitable[None]]) -> None:
        await asyncio.sleep(self._number * _STAGGER_S)
        while not self._window.is_over:
            refused = self._tally.refused.total()
            await live(self)
            if self._tally.refused.total() > refused:
                await asyncio.sleep(_PAUSE_S)

    @asynccontextmanager
    async def stream(self, **fields: Any) -> AsyncIterator[Stream]:
        request = make_request(self.dice, self.crowd.max_tokens, **fields)
        stream = Stream(self._stub.Generate(request), self._tally, self._window)
        try:
            yield stream
        finally:
            await stream.close()

    async def cancel_generation(self, generation_id: str) -> None:
        with suppress(grpc.aio.AioRpcError):
            request = pb.CancelGenerationRequest(generation_id=generation_id)
            await self._stub.CancelGeneration(request, timeout=_CONNECT_TIMEOUT_S)

    async def wait_for_end(self) -> None:
        await asyncio.sleep(max(0.0, self._window.end_s - time.perf_counter()))


def make_request(dice: random.Random, max_tokens: int, **fields: Any) -> pb.GenerateRequest:
    """Random words, any model's; half of them greedy; lengths within a half of `max_tokens`."""
    words = ("".join(dice.choices(string.ascii_lowercase, k=4)) for _ in range(_PROMPT_WORDS))
    length = dice.randint(max(1, max_tokens // 2), max_tokens + max_tokens // 2)
    defaults: dict[str, Any] = {
        "model": "a",
        "prompt": pb.Prompt(text=" ".join(words)),
        "sampling": pb.SamplingParams(temperature=dice.choice((0.0, 0.8))),
        "stop": pb.StopConditions(max_tokens=length, ignore_eos=True),
    }
    return pb.GenerateRequest(**(defaults | fields))


async def _behave(client: Client) -> None:
    """Read every stream to its end, at once."""
    fields: dict[str, Any] = {}
    if client.is_endless:
        fields["stop"] = pb.StopConditions(ignore_eos=True)
    async with client.stream(**fields) as stream:
        await stream.read()


async def _cancel(client: Client) -> None:
    """Cancel at random: before the first event or later, the call or by CancelGeneration."""
    generation_id = str(uuid.UUID(int=client.dice.getrandbits(128)))
    after = client.dice.randint(0, client.crowd.max_tokens)
    seen = 0

    def enough(_: Event) -> bool:
        nonlocal seen
        seen += 1
        return seen >= after

    async with client.stream(generation_id=generation_id) as stream:
        if after:
            await stream.read(until=enough)
        if client.dice.random() < 0.5:  # noqa: PLR2004 - one of two ways
            stream.call.cancel()
        else:
            await client.cancel_generation(generation_id)
            await stream.read()


async def _stall(client: Client) -> None:
    """Stop reading after the first text; when the window is over, go away or read all the rest."""
    fields = {
        "stop": pb.StopConditions(max_tokens=_STALLED_TOKENS, ignore_eos=True),
        "output": pb.OutputOptions(include_token_ids=True),
    }
    async with client.stream(**fields) as stream:
        await stream.read(until=lambda event: event.HasField("delta"))
        await client.wait_for_end()
        if client.dice.random() < 0.5:  # noqa: PLR2004 - one of two ways
            stream.call.cancel()
        else:
            await stream.read()


async def _short(client: Client) -> None:
    async with client.stream(stop=pb.StopConditions(max_tokens=4, ignore_eos=True)) as stream:
        await stream.read()


KINDS: dict[str, Callable[[Client], Awaitable[None]]] = {
    "good": _behave,
    "cancelling": _cancel,
    "stalling": _stall,
    "short": _short,
}


class Connections:
    """A crowd's channels, kept from window to window."""

    def __init__(self, crowd: Crowd) -> None:
        alone = crowd.kind == "stalling"
        options = _OWN_CONNECTION + (_SMALL_WINDOW if alone else [])
        count = crowd.streams if alone else -(-crowd.streams // STREAMS_PER_CONNECTION)
        self._crowd = crowd
        self._channels = [
            grpc.aio.insecure_channel(crowd.address, options=options) for _ in range(count)
        ]

    async def open(self) -> None:
        """Raises: TimeoutError."""
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            await asyncio.gather(*(channel.channel_ready() for channel in self._channels))

    async def run(self, ramp_s: float, seconds: float) -> Tally:
        """Until the window is over and every stream has ended."""
        tally, window = Tally(), Window.of(ramp_s, seconds)
        clients = self._clients(tally, window)
        live = KINDS[self._crowd.kind]
        await asyncio.gather(*(client.run(live) for client in clients))
        return tally

    async def run_calls(self, total: int) -> Tally:
        """So many streams in all."""
        tally, window = Tally(), Window.of(0.0, 0.0)
        live = KINDS[self._crowd.kind]

        async def some(client: Client) -> None:
            while tally.calls < total:
                await live(client)

        await asyncio.gather(*(some(client) for client in self._clients(tally, window)))
        return tally

    def _clients(self, tally: Tally, window: Window) -> Sequence[Client]:
        channels = self._channels
        return [
            Client(self._crowd, number, channels[number % len(channels)], tally, window)
            for number in range(self._crowd.streams)
        ]

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))
