"""Client processes that vanish in the middle of their streams: SIGKILL, or SIGSTOP for ever."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import grpc.aio

from mlxpool.v1 import model_service_pb2_grpc as pb_grpc
from soak.clients import Crowd, make_request
from soak.tally import Call, Tally, Window

_STREAMS_EACH = 5
# Many enough that a victim is never at its end when it vanishes.
_TOKENS = 1000
_START_TIMEOUT_S = 30.0
# As long as a well-behaved stream takes.
_LIFE_S = 3.0


def _victim(address: str, seed: int, started: Connection) -> None:
    """Streams for ever; says when each of them has had an event."""

    async def stream(stub: pb_grpc.ModelServiceStub, number: int) -> None:
        request = make_request(random.Random(f"{seed} {number}"), _TOKENS)  # noqa: S311 - no secret
        call: Call = stub.Generate(request)  # type: ignore[assignment]  # the stub of an aio channel
        await call.read()
        started.send(number)
        while await call.read() is not grpc.aio.EOF:
            pass

    async def main() -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = pb_grpc.ModelServiceStub(channel)
            await asyncio.gather(*(stream(stub, number) for number in range(_STREAMS_EACH)))

    with contextlib.suppress(grpc.aio.AioRpcError):
        asyncio.run(main())


class Vanishing:
    """Processes come and vanish, side by side, while a window lasts.

    One is only stopped, in the first window, and stays: its kernel goes on to acknowledge what
    comes, so that nothing but HTTP/2's own pings can tell.
    """

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self._dice = random.Random(f"vanishing {crowd.seed}")  # noqa: S311 - nothing secret
        # Forked from a process that has imported everything: a start takes no time of the server's.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._frozen: BaseProcess | None = None

    async def open(self) -> None:
        """Starts the process that is forked from."""
        process = self._context.Process(target=os.getpid)
        process.start()
        await asyncio.to_thread(process.join, _START_TIMEOUT_S)

    async def run(self, ramp_s: float, seconds: float) -> Tally:
        """`calls` counts the streams that vanished: nobody is left to see how they ended."""
        tally, window = Tally(), Window.of(ramp_s, seconds)
        if self._frozen is None:
            self._frozen, streaming = await self._start()
            os.kill(self._frozen.pid or 0, signal.SIGSTOP)
            tally.calls += streaming
        places = max(1, self._crowd.streams // _STREAMS_EACH)
        await asyncio.gather(*(self._come_and_vanish(tally, window) for _ in range(places)))
        return tally

    async def close(self) -> None:
        if self._frozen is not None:
            await self._kill(self._frozen)

    async def _come_and_vanish(self, tally: Tally, window: Window) -> None:
        while not window.is_over:
            process, streaming = await self._start()
            await asyncio.sleep(self._dice.uniform(0.0, _LIFE_S))
            await self._kill(process)
            tally.calls += streaming

    async def _start(self) -> tuple[BaseProcess, int]:
        """Return it when its streams have begun, and how many have."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_victim, args=(self._crowd.address, self._dice.getrandbits(32), theirs)
        )
        process.start()
        theirs.close()
        streaming = await asyncio.to_thread(_count_started, ours)
        ours.close()
        return process, streaming

    @staticmethod
    async def _kill(process: BaseProcess) -> None:
        process.kill()
        await asyncio.to_thread(process.join, _START_TIMEOUT_S)
        process.close()


def _count_started(started: Connection) -> int:
    count, deadline = 0, time.monotonic() + _START_TIMEOUT_S
    while count < _STREAMS_EACH and started.poll(max(0.0, deadline - time.monotonic())):
        try:
            started.recv()
        except EOFError:
            break
        count += 1
    return count
