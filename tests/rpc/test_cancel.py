"""Whatever ends a call early frees its slot and gives its lease back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence

import grpc
import pytest
import pytest_asyncio

from fakes import FakeFiles, FakeModel
from mlxpool.v1 import model_service_pb2 as pb
from rpc.harness import (
    PATIENCE_S,
    Reader,
    Server,
    failure_of,
    final_text,
    release,
    running_server,
    text_request,
    until,
)


def endless(prompt: Sequence[int]) -> Iterator[int]:
    while True:
        yield ord("x")


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    """Model `m` never ends by itself and steps only when it is told to."""
    files = {"m": FakeFiles(model=FakeModel(script=endless, is_stepped=True), context_length=10**6)}
    async with running_server(files, progress_interval_s=0.05) as running:
        yield running


async def started(server: Server, **fields: object) -> Reader:
    """A generation that has given at least one delta."""
    reader = server.reader(text_request(**fields))
    async with asyncio.timeout(PATIENCE_S):
        while True:
            release(server.model, 1)
            if (await reader.next()).HasField("delta"):
                return reader


async def assert_freed(server: Server) -> None:
    """The call is over for the server: the step it is in is the last one with that slot."""
    await server.log_line("Generate")
    (batch,) = server.model.batches
    # What started() released too much is used up, and the next step waits.
    await until(lambda: not batch.slots or server.model.steps._value == 0)
    steps = batch.num_steps
    release(server.model, 1)
    await until(lambda: not batch.slots)
    assert batch.num_steps <= steps + 1
    async with asyncio.timeout(PATIENCE_S):
        while True:
            answer = await server.models.GetModel(pb.GetModelRequest(model="m"))
            if answer.model.active_requests + answer.model.queued_requests == 0:
                return


async def test_hanging_up_frees_the_slot(server: Server) -> None:
    """And the log says CANCELLED, with the tokens that were made."""
    reader = await started(server, generation_id="mine")
    await reader.hang_up()
    await assert_freed(server)
    line = await server.log_line("Generate")
    assert line["status"] == "CANCELLED"
    assert line["generation_id"] == "mine"
    assert line["model"] == "m"
    assert line["completion_tokens"] >= 1


async def test_deadline_frees_the_slot(server: Server) -> None:
    """The caller sees DEADLINE_EXCEEDED, and so does the log."""
    await server.models.LoadModel(pb.LoadModelRequest(model="m")).read()
    call = server.models.Generate(text_request(), timeout=0.3)
    release(server.model, 3)
    assert (await failure_of(call)).code is grpc.StatusCode.DEADLINE_EXCEEDED
    await assert_freed(server)
    assert (await server.log_line("Generate"))["status"] == "DEADLINE_EXCEEDED"


async def test_cancel_generation_ends_it_with_what_there_is(server: Server) -> None:
    """The reader gets its text and FINISH_REASON_CANCELLED, with status OK."""
    reader = await started(server, generation_id="mine")
    await server.models.CancelGeneration(pb.CancelGenerationRequest(generation_id="mine"))
    release(server.model, 1)
    events = await reader.rest()
    assert events[-1].finished.finish_reason == pb.FINISH_REASON_CANCELLED
    assert final_text(events).startswith("x")
    assert await reader.call.code() is grpc.StatusCode.OK
    await assert_freed(server)
    assert (await server.log_line("Generate"))["finish_reason"] == "cancelled"


async def test_stalled_reader_that_hangs_up_frees_the_slot() -> None:
    """GeneratorExit while a send is blocked: the slot is freed all the same."""

    def wordy(prompt: Sequence[int]) -> Iterator[int]:
        while True:
            yield from b"x" * 4096

    files = {"m": FakeFiles(model=FakeModel(script=wordy), context_length=2**32)}
    async with running_server(files) as server:
        options = pb.OutputOptions(include_token_ids=True)
        stop = pb.StopConditions(max_tokens=2**31 - 1)
        reader = server.reader(text_request(output=options, stop=stop))
        await reader.next()
        model = server.model
        await until(lambda: bool(model.batches) and model.batches[0].num_steps > 30_000)
        await reader.hang_up()
        await until(lambda: not model.batches[0].slots)
        assert (await server.log_line("Generate"))["status"] == "CANCELLED"


async def test_cancel_while_loading_leaves_the_load_to_others(server: Server) -> None:
    """The one that started the load hangs up; the other gets its answer from the same load."""
    files = server.files["m"]
    files.may_load.clear()
    first = server.reader(text_request())
    await first.next()
    second = server.reader(text_request(stop=pb.StopConditions(max_tokens=1)))
    await second.next()
    await first.hang_up()
    files.may_load.set()
    release(server.model, 10)
    events = await second.rest()
    assert events[-1].finished.finish_reason == pb.FINISH_REASON_MAX_TOKENS
    assert files.num_loads == 1


async def test_cancel_generation_while_loading(server: Server) -> None:
    """It ends at once, before it ran, with no tokens."""
    server.files["m"].may_load.clear()
    reader = server.reader(text_request(generation_id="mine"))
    await reader.next()
    await server.models.CancelGeneration(pb.CancelGenerationRequest(generation_id="mine"))
    events = await reader.rest()
    assert events[-1].finished.finish_reason == pb.FINISH_REASON_CANCELLED
    assert events[-1].finished.usage.completion_tokens == 0


async def test_max_duration_while_loading(server: Server) -> None:
    """The soft limit counts from the request, not from the load."""
    server.files["m"].may_load.clear()
    stop = pb.StopConditions()
    stop.max_duration.FromMilliseconds(60)
    events = await server.generate(text_request(stop=stop))
    assert events[-1].finished.finish_reason == pb.FINISH_REASON_TIME_LIMIT


@pytest.mark.parametrize(
    "phase", [pb.GENERATION_PHASE_LOADING, pb.GENERATION_PHASE_PREFILLING], ids=["load", "prefill"]
)
async def test_heartbeats_while_nothing_flows(server: Server, phase: int) -> None:
    """Silence is broken by progress of the phase it waits in, again and again."""
    if phase == pb.GENERATION_PHASE_LOADING:
        server.files["m"].may_load.clear()
    # The step that prefills; the next one waits.
    release(server.model, 1)
    reader = server.reader(text_request())
    seen = 0
    while seen < 4:
        event = await reader.next()
        seen += event.HasField("progress") and event.progress.phase == phase
    await reader.hang_up()


async def test_heartbeats_while_queued() -> None:
    """A request that waits for a place in the batch hears its position."""
    files = {"m": FakeFiles(model=FakeModel(script=endless, is_stepped=True))}
    async with running_server(files, progress_interval_s=0.05, max_batch_size=1) as server:
        running = await started(server)
        waiting = server.reader(text_request())
        positions = []
        async with asyncio.timeout(PATIENCE_S):
            while len(positions) < 4:
                # A message reaches a busy engine between two steps.
                release(server.model, 1)
                progress = (await waiting.next()).progress
                if progress.queue_position:
                    assert progress.phase == pb.GENERATION_PHASE_QUEUED
                    positions.append(progress.queue_position)
        assert positions == [1, 1, 1, 1]
        await running.hang_up()
        await waiting.hang_up()
