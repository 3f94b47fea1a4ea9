"""The engine thread: batches, turns, aborts, failures, its end."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import weakref
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from fakes.model import FakeBatch, FakeEmbedder, FakeModel, endless
from fakes.running_engine import (
    PATIENCE_S,
    FakeClock,
    Reader,
    RunningEngine,
    running_engine,
    sequence_request,
)
from fakes.tokenizer import EOS, FakeDecoder
from mlxpool_server.domain import FinishReason
from mlxpool_server.engine.engine import MAX_CONSECUTIVE_FAILURES, Engine
from mlxpool_server.engine.model_runner import RunnerStats
from mlxpool_server.engine.output_stream import OutputStream
from mlxpool_server.errors import DrainingError, GenerationFailedError, ModelUnloadedError


@pytest.fixture
async def running() -> AsyncGenerator[RunningEngine, None]:
    async with running_engine() as running:
        yield running


class Death(BaseException):
    """What no step is expected to raise."""


# ---------------------------------------------------------------- batches and turns


async def test_a_request_is_answered(running: RunningEngine) -> None:
    """What the batch generates arrives on the stream, decoded."""
    await running.attach()
    assert (await running.submit("hello").finished()).text == "hello"


async def test_requests_join_and_leave_a_running_batch(running: RunningEngine) -> None:
    """A request joins while another decodes, ends before it, and both texts are whole."""
    model = await running.attach(is_stepped=True)
    long = running.submit("a long answer")
    model.steps.release(4)
    await long.delta()
    short = running.submit("ab")
    model.run_freely()
    assert (await short.finished()).text == "ab"
    assert (await long.finished()).text == "a long answer"
    (batch,) = model.batches
    assert batch.largest == 2


async def test_the_batch_is_bounded_and_fills_up_again() -> None:
    """No more rows than max_batch_size run together, and everyone gets its turn."""
    async with running_engine(max_batch_size=3) as running:
        model = await running.attach()
        readers = [running.submit(f"answer {number}") for number in range(10)]
        texts = [(await reader.finished()).text for reader in readers]
        assert texts == [f"answer {number}" for number in range(10)]
        assert model.batches[0].largest == 3


async def test_models_take_turns() -> None:
    """While two models are busy with steps of equal length neither gets far ahead."""
    order: list[str] = []

    def script(name: str) -> Callable[[Any], Any]:
        def run(prompt: Any) -> Any:
            for token in prompt:
                order.append(name)
                yield token
            while True:
                yield EOS

        return run

    # A clock that ticks with each look at it: every step takes as long as every other.
    async with running_engine(clock=itertools.count(1.0).__next__) as running:
        first = await running.attach("a", script=script("a"), is_stepped=True)
        await running.attach("b", script=script("b"))
        readers = [running.submit("x" * 20, name) for name in "ab"]
        # The engine waits in a's first step, or is not there yet: b's request comes in time.
        first.steps.release(30)
        for reader in readers:
            await reader.finished()
    leads = [order[:end].count("a") - order[:end].count("b") for end in range(len(order))]
    assert max(map(abs, leads)) <= 3


async def test_decoding_stays_on_one_thread(running: RunningEngine) -> None:
    """Every step of every model runs on the thread named "engine"."""
    models = [await running.attach(name) for name in "ab"]
    for name in "ab":
        await running.submit("text", name).finished()
    assert {thread for model in models for thread in model.batches[0].threads} == {"engine"}


async def test_one_message_a_step(running: RunningEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows a step has, the event loop is called once for it."""
    model = await running.attach(is_stepped=True)
    readers = [running.submit("abcdefgh") for _ in range(4)]
    # Whoever came during the first step joins in the second and has its token in the third.
    model.steps.release(3)
    for reader in readers:
        await reader.delta()
    calls: list[object] = []
    loop = asyncio.get_running_loop()
    call = loop.call_soon_threadsafe

    def spy(callback: Any, *args: Any, **options: Any) -> asyncio.Handle:
        if threading.current_thread().name == "engine":
            calls.append(callback)
        return call(callback, *args, **options)

    monkeypatch.setattr(loop, "call_soon_threadsafe", spy)
    model.steps.release(4)
    for reader in readers:
        await reader.until(lambda event: getattr(event, "completion_tokens", 0) >= 5)
    assert len(calls) <= 4


async def test_the_sampling_of_each_request_reaches_its_row(running: RunningEngine) -> None:
    """A row gets its own request's parameters."""
    model = await running.attach()
    readers = [running.submit("a"), running.submit("b")]
    for reader in readers:
        await reader.finished()
    samplings = model.batches[0].samplings
    assert set(samplings) == {reader.slot for reader in readers}


async def test_stats_follow_the_batch(running: RunningEngine) -> None:
    """stats() is what ran, waited and was held after the last step."""
    model = await running.attach(is_stepped=True)
    assert running.engine.stats("m") == RunnerStats()
    reader = running.submit("abc")
    model.steps.release(2)
    await reader.delta()
    assert running.engine.stats("m") == RunnerStats(running=1, waiting=0, kv_bytes=10)
    assert running.engine.stats("no such model") == RunnerStats()


# ---------------------------------------------------------------- abort and time


async def test_an_abort_frees_the_slot_within_one_step(running: RunningEngine) -> None:
    """After an abort at most the step that runs already still has the row."""
    model = await running.attach(is_stepped=True, script=endless)
    reader = running.submit("abc")
    model.steps.release(2)
    await reader.delta()
    (batch,) = model.batches
    running.engine.abort(reader.slot)
    # The engine may be inside a step: that one ends, no other begins.
    model.steps.release(1)
    finished = await reader.finished()
    assert finished.finish_reason is FinishReason.CANCELLED
    await running.settle()
    assert batch.slots == {}
    assert batch.num_steps <= 3
    assert running.engine.stats("m") == RunnerStats()


async def test_an_abort_ends_a_waiting_request() -> None:
    """A request that waits for a slot ends at once, and who comes after it moves up."""
    async with running_engine(max_batch_size=1) as running:
        model = await running.attach(is_stepped=True, script=endless)
        first = running.submit("a", submitted_at=1.0)
        model.steps.release(2)
        await first.delta()
        waiting = running.submit("b", submitted_at=2.0)
        last = running.submit("c", submitted_at=3.0)
        running.engine.abort(waiting.slot)
        model.steps.release(1)
        finished = await waiting.finished()
        assert finished.finish_reason is FinishReason.CANCELLED
        assert finished.usage.completion_tokens == 0
        running.engine.abort(first.slot)
        model.run_freely()
        await last.delta()
        assert model.batches[0].joined == [tuple(b"a"), tuple(b"c")]


async def test_an_abort_after_the_end_does_no_harm(running: RunningEngine) -> None:
    """Aborting what ended, twice, changes nothing; the next request is answered."""
    await running.attach()
    reader = running.submit("abc")
    await reader.finished()
    running.engine.abort(reader.slot)
    running.engine.abort(reader.slot)
    assert (await running.submit("next").finished()).text == "next"


async def test_time_limits_end_running_and_waiting_requests() -> None:
    """Expired requests end with TIME_LIMIT at the next step, those too that still wait."""
    clock = FakeClock()
    async with running_engine(max_batch_size=1, clock=clock) as running:
        model = await running.attach(is_stepped=True, script=endless)
        first = running.submit("a", expires_at=clock.now + 1)
        second = running.submit("b", expires_at=clock.now + 1, submitted_at=1.0)
        model.steps.release(2)
        await first.delta()
        clock.now += 1
        model.steps.release(1)
        for reader in (first, second):
            assert (await reader.finished()).finish_reason is FinishReason.TIME_LIMIT


# ---------------------------------------------------------------- attach and detach


async def test_detach_ends_what_runs_with_the_error(running: RunningEngine) -> None:
    """Running and waiting streams get the given error; other models go on."""
    model = await running.attach("a", is_stepped=True, script=endless)
    await running.attach("b")
    reader = running.submit("x", "a")
    model.steps.release(2)
    await reader.delta()
    detaching = asyncio.ensure_future(running.engine.detach("a", ModelUnloadedError("a")))
    model.run_freely()
    with pytest.raises(ModelUnloadedError):
        await reader.rest()
    await detaching
    assert model.batches[0].is_closed
    assert running.engine.stats("a") == RunnerStats()
    assert (await running.submit("fine", "b").finished()).text == "fine"


async def test_a_model_that_was_detached_is_unknown(running: RunningEngine) -> None:
    """A request for it fails instead of waiting for ever."""
    await running.attach()
    await running.engine.detach("m", ModelUnloadedError("m"))
    with pytest.raises(GenerationFailedError):
        await running.submit().rest()


async def test_attach_raises_what_the_batch_raised(running: RunningEngine) -> None:
    """A model whose batch cannot be built is not attached, and its caller learns why."""
    model = FakeModel()
    model.runner_errors.append(RuntimeError("no memory"))
    with pytest.raises(RuntimeError, match="no memory"):
        await running.engine.attach("m", model)
    assert running.engine.is_alive


class _Weights:
    """A model that nothing but the house refers to."""

    resident_bytes = 1

    def __init__(self, problem: str = "") -> None:
        self._problem = problem

    def new_runner(self) -> FakeBatch:
        if self._problem:
            raise RuntimeError(self._problem)
        return FakeBatch(FakeModel())

    def new_embedder(self) -> FakeEmbedder:
        return FakeEmbedder(FakeModel())


async def test_detach_lets_go_of_the_weights(running: RunningEngine) -> None:
    """When detach returns, the engine holds no reference to the model."""
    model = _Weights()
    weights = weakref.ref(model)
    await running.engine.attach("m", model)
    await running.submit("abc").finished()
    del model
    gc.disable()
    try:
        await running.engine.detach("m", ModelUnloadedError("m"))
        assert weights() is None
    finally:
        gc.enable()


async def test_a_failed_attach_lets_go_of_the_weights(running: RunningEngine) -> None:
    """The idle engine does not keep the message that brought a model it could not take."""
    model = _Weights("no memory")
    weights = weakref.ref(model)
    attaching = asyncio.ensure_future(running.engine.attach("m", model))
    del model
    gc.disable()
    try:
        await asyncio.wait([attaching])
        error = attaching.exception()
        assert isinstance(error, RuntimeError)
        # What the pool does: the frames of whoever asked hold the model.
        error.__traceback__ = None
        del attaching
        assert weights() is None
    finally:
        gc.enable()


async def test_a_caller_who_gives_up_on_attach(running: RunningEngine) -> None:
    """A cancelled attach leaves nothing pending, and the engine goes on."""
    attaching = asyncio.ensure_future(running.engine.attach("m", FakeModel()))
    await asyncio.sleep(0)
    attaching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attaching
    assert running.engine._pending == {}
    await running.attach("other")
    assert (await running.submit("abc", "other").finished()).text == "abc"


# ---------------------------------------------------------------- failures


async def test_a_failed_step_fails_that_model_only(running: RunningEngine) -> None:
    """Every stream of the model ends with GenerationFailedError; the other model goes on."""
    broken = await running.attach("a", is_stepped=True)
    await running.attach("b")
    readers = [running.submit("xyz", "a") for _ in range(3)]
    other = running.submit("fine", "b")
    broken.step_errors.append(MemoryError("out of memory"))
    broken.run_freely()
    for reader in readers:
        with pytest.raises(GenerationFailedError):
            await reader.rest()
    assert (await other.finished()).text == "fine"


async def test_a_model_recovers_from_a_failed_step(running: RunningEngine) -> None:
    """The next request runs on a fresh batch; the failed one was closed."""
    model = await running.attach()
    model.step_errors.append(RuntimeError("once"))
    with pytest.raises(GenerationFailedError):
        await running.submit("abc").rest()
    assert (await running.submit("abc").finished()).text == "abc"
    assert [batch.is_closed for batch in model.batches] == [True, False]
    assert running.failed_models.empty()


async def test_three_failures_in_a_row_give_the_model_up(running: RunningEngine) -> None:
    """The house is told once; requests that come then fail, and other models go on."""
    model = await running.attach("a")
    await running.attach("b")
    model.step_errors.extend(RuntimeError("always") for _ in range(MAX_CONSECUTIVE_FAILURES))
    for _ in range(MAX_CONSECUTIVE_FAILURES):
        with pytest.raises(GenerationFailedError):
            await running.submit("abc", "a").rest()
    async with asyncio.timeout(PATIENCE_S):
        assert await running.failed_models.get() == "a"
    with pytest.raises(GenerationFailedError):
        await running.submit("abc", "a").rest()
    assert (await running.submit("fine", "b").finished()).text == "fine"
    assert running.failed_models.empty()
    # And it can come back.
    await running.engine.detach("a", GenerationFailedError("a"))
    await running.attach("a")
    assert (await running.submit("back", "a").finished()).text == "back"


async def test_a_good_step_forgives_failures(running: RunningEngine) -> None:
    """Only failures in a row count."""
    model = await running.attach()
    for _ in range(2 * MAX_CONSECUTIVE_FAILURES):
        model.step_errors.append(RuntimeError("now and then"))
        with pytest.raises(GenerationFailedError):
            await running.submit("abc").rest()
        assert (await running.submit("abc").finished()).text == "abc"
    assert running.failed_models.empty()


async def test_a_batch_that_cannot_be_rebuilt_gives_the_model_up(running: RunningEngine) -> None:
    """A failed step whose fresh batch fails too ends the model at once."""
    model = await running.attach()
    model.step_errors.append(RuntimeError("step"))
    model.runner_errors.append(RuntimeError("rebuild"))
    with pytest.raises(GenerationFailedError):
        await running.submit("abc").rest()
    async with asyncio.timeout(PATIENCE_S):
        assert await running.failed_models.get() == "m"
    assert running.engine.is_alive


@pytest.mark.parametrize("kind", ["remove_errors", "close_errors"])
async def test_a_batch_that_raises_outside_a_step(running: RunningEngine, kind: str) -> None:
    """An error in remove or close is that model's: every stream ends, the engine goes on."""
    model = await running.attach("a", is_stepped=True, script=endless)
    await running.attach("b")
    reader = running.submit("abc", "a")
    model.steps.release(2)
    await reader.delta()
    getattr(model, kind).append(RuntimeError("broken"))
    if kind == "remove_errors":
        running.engine.abort(reader.slot)
        model.run_freely()
        await reader.finished()
    else:
        model.run_freely()
        await running.engine.detach("a", ModelUnloadedError("a"))
        with pytest.raises(ModelUnloadedError):
            await reader.rest()
    assert (await running.submit("fine", "b").finished()).text == "fine"
    assert running.engine.is_alive


async def test_a_failing_sequence_fails_alone(running: RunningEngine) -> None:
    """A decoder that raises ends its own stream; the neighbour's text is whole."""
    await running.attach()
    broken = running.submit("xyz", decoder=FakeDecoder(fails_on=ord("y")))
    neighbour = running.submit("neighbour")
    with pytest.raises(GenerationFailedError):
        await broken.rest()
    assert (await neighbour.finished()).text == "neighbour"
    assert running.failed_models.empty()


# ---------------------------------------------------------------- the end


async def _doomed(running: RunningEngine) -> list[Reader]:
    """Two streams, and an engine that waits in the step in which it will die."""
    model = await running.attach(is_stepped=True, script=endless)
    readers = [running.submit("abc") for _ in range(2)]
    # The second may join one step later.
    model.steps.release(3)
    for reader in readers:
        await reader.delta()
    assert await asyncio.to_thread(model.is_waiting.wait, PATIENCE_S)
    model.step_errors.append(Death())
    return readers


async def test_death_tells_everyone(running: RunningEngine) -> None:
    """Streams, attach and detach get GenerationFailedError, and on_death is called."""
    readers = await _doomed(running)
    (model,) = running.models
    asking = [
        asyncio.ensure_future(running.engine.attach("other", FakeModel())),
        asyncio.ensure_future(running.engine.detach("m", ModelUnloadedError("m"))),
    ]
    await asyncio.sleep(0)
    model.steps.release(1)
    async with asyncio.timeout(PATIENCE_S):
        await running.deaths.wait()
        await asyncio.wait(asking)
    for reader in readers:
        with pytest.raises(GenerationFailedError):
            await reader.rest()
    assert all(isinstance(each.exception(), GenerationFailedError) for each in asking)
    assert not running.engine.is_alive


async def test_death_also_ends_an_aborted_stream(running: RunningEngine) -> None:
    """A reader whose abort the dead engine never saw does not wait for ever."""
    readers = await _doomed(running)
    (model,) = running.models
    for reader in readers:
        running.engine.abort(reader.slot)
    model.steps.release(1)
    for reader in readers:
        with pytest.raises(GenerationFailedError):
            await reader.rest()


async def test_nothing_starts_after_death(running: RunningEngine) -> None:
    """submit, attach and detach raise at once; abort does no harm."""
    readers = await _doomed(running)
    running.models[0].steps.release(1)
    async with asyncio.timeout(PATIENCE_S):
        await running.deaths.wait()
    await _assert_refuses(running.engine)
    running.engine.abort(readers[0].slot)


async def test_stop_ends_every_stream(running: RunningEngine) -> None:
    """Streams get the given error, the thread is joined, and nothing starts any more."""
    model = await running.attach(is_stepped=True, script=endless)
    readers = [running.submit("abc") for _ in range(2)]
    model.steps.release(2)
    await readers[0].delta()
    model.run_freely()
    assert await running.engine.stop(DrainingError(1.0), PATIENCE_S)
    for reader in readers:
        with pytest.raises(DrainingError):
            await reader.rest()
    assert not running.engine.is_alive
    assert not running.deaths.is_set()
    await _assert_refuses(running.engine)


async def test_stop_does_not_wait_for_a_stuck_step(running: RunningEngine) -> None:
    """A thread that hangs inside a step is given up: its streams and callers are told."""
    model = await running.attach(is_stepped=True)
    reader = running.submit("abc")
    assert await asyncio.to_thread(model.is_waiting.wait, PATIENCE_S)
    detaching = asyncio.ensure_future(running.engine.detach("m", ModelUnloadedError("m")))
    await asyncio.sleep(0)
    assert not await running.engine.stop(DrainingError(1.0), timeout_s=0.01)
    with pytest.raises(DrainingError):
        await reader.rest()
    with pytest.raises(DrainingError):
        await detaching


async def test_stop_before_start() -> None:
    """An engine that never started has nothing to stop."""
    engine = Engine(max_batch_size=1, on_death=lambda: None, on_model_failed=lambda _name: None)
    assert await engine.stop(DrainingError(1.0), PATIENCE_S)
    await _assert_refuses(engine)


async def _assert_refuses(engine: Engine) -> None:
    with pytest.raises(GenerationFailedError):
        engine.submit(sequence_request(), OutputStream())
    with pytest.raises(GenerationFailedError):
        await engine.attach("m", FakeModel())
    with pytest.raises(GenerationFailedError):
        await engine.detach("m", ModelUnloadedError("m"))
    assert engine._readers == {}
    assert engine._pending == {}


async def test_a_message_that_takes_long_shows_like_a_step(running: RunningEngine) -> None:
    """An engine that is stuck while it takes a model over does not look idle."""
    is_building, may_build = threading.Event(), threading.Event()

    class SlowModel(FakeModel):
        def new_runner(self) -> FakeBatch:
            is_building.set()
            assert may_build.wait(PATIENCE_S)
            return super().new_runner()

    assert running.engine.step_age_s == 0.0
    attaching = asyncio.ensure_future(running.engine.attach("slow", SlowModel()))
    assert await asyncio.to_thread(is_building.wait, PATIENCE_S)
    assert running.engine.step_age_s > 0.0
    may_build.set()
    await attaching
    await running.settle()
    assert running.engine.step_age_s == 0.0


async def test_steps_are_added_up(running: RunningEngine) -> None:
    """Over all stays of a model: a counter never falls."""
    for _ in range(2):
        await running.attach()
        await running.submit("abc").finished()
        await running.engine.detach("m", DrainingError(1.0))
    totals = running.engine.step_totals("m")
    # A step for the prompt, and one for each byte and the end.
    assert totals.count == 2 * 5
    assert totals.seconds > 0
    assert running.engine.step_totals("nobody").count == 0
