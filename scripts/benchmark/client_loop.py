"""The reference: mlx-lm's BatchGenerator in this process, with nothing around it.

It makes tokens and notes when; no text, no messages, no other thread.
"""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.clients import Endpoint
from benchmark.workload import GREEDY, Answer, Request, RequestError, Sampling, check_length
from mlxpool_server.mlx_backend.openblas import OpenBlas, load_openblas

MAX_BATCH_SIZE = 64


@dataclass(slots=True)
class _Live:
    request: Request
    answer: Answer
    done: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class LoopClient:
    """Use it as an async context manager: the loop is a task of its own."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._blas: OpenBlas | None = load_openblas()
        # mlx-lm imports mlx, which must come after OpenBLAS.
        from mlx_lm.generate import BatchGenerator  # noqa: PLC0415
        from mlx_lm.utils import load_model  # noqa: PLC0415

        model, _ = load_model(Path(endpoint.models["a"]))
        self._generator = BatchGenerator(
            model,
            completion_batch_size=MAX_BATCH_SIZE,
            prefill_step_size=endpoint.prefill_step_tokens,
        )
        self._live: dict[int, _Live] = {}
        self._samplers: dict[Sampling, Callable[[Any], Any]] = {}
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def generate(self, request: Request, answer: Answer) -> None:
        live = _Live(request, answer)
        (uid,) = self._generator.insert(
            [request.ids],
            max_tokens=[request.max_tokens],
            samplers=[self._sampler(request.sampling)],
            logits_processors=[_processors(request.sampling)],
        )
        self._live[uid] = live
        self._wake.set()
        try:
            await live.done
        finally:
            if self._live.pop(uid, None):
                self._generator.remove([uid])
        check_length(request, answer.counts[-1])
        answer.total = answer.counts[-1]

    @asynccontextmanager
    async def stalled(self, request: Request) -> AsyncIterator[None]:
        raise RequestError(f"the loop has no readers, so none stalls ({request.model})")
        yield

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        self._generator.close()

    @property
    def max_threads(self) -> int:
        """The BLAS threads that it may be worth to try; 0 where there is nothing to set."""
        return self._blas.threads if self._blas and self._blas.path else 0

    def set_threads(self, threads: int) -> None:
        if self._blas and self._blas.path:
            # The same library as was loaded before, not a second one.
            ctypes.CDLL(str(self._blas.path)).openblas_set_num_threads(threads)

    async def _run(self) -> None:
        try:
            while True:
                if not self._live:
                    self._wake.clear()
                    await self._wake.wait()
                self._step()
                # What has ended sends its next request before the next step.
                await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001 - whatever mlx-lm raises: the readers must know
            for live in self._live.values():
                if not live.done.done():
                    live.done.set_exception(RequestError(f"the loop ended: {error!r}"))

    def _step(self) -> None:
        _, generated = self._generator.next()
        now = time.perf_counter()
        for token in generated:
            live = self._live[token.uid]
            live.answer.times.append(now)
            live.answer.counts.append(len(live.answer.times))
            if token.finish_reason is not None:
                del self._live[token.uid]
                if not live.done.done():
                    live.done.set_result(None)

    def _sampler(self, sampling: Sampling) -> Callable[[Any], Any]:
        """One object for equal parameters, since mlx-lm samples those rows in one call."""
        from mlx_lm.sample_utils import greedy_sampler, make_sampler  # noqa: PLC0415

        if sampling == GREEDY:
            self._samplers[sampling] = greedy_sampler
        elif sampling not in self._samplers:
            self._samplers[sampling] = make_sampler(
                sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
            )
        return self._samplers[sampling]


def _processors(sampling: Sampling) -> list[Callable[[Any, Any], Any]]:
    from mlx_lm.sample_utils import make_logits_processors  # noqa: PLC0415

    processors: list[Callable[[Any, Any], Any]] = make_logits_processors(
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
    )
    return processors
