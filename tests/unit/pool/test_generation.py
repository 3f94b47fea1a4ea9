"""One generation's way: lease, render, admit, load, run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator

import pytest

from fakes.loader import FakeFiles
from fakes.model import endless
from fakes.running_engine import PATIENCE_S
from fakes.running_pool import House, Stream, running_house
from fakes.tokenizer import EOS, VOCAB_SIZE, FakeTokenizer
from mlxpool_server.domain import (
    ChatMessage,
    ChatPrompt,
    FinishReason,
    GenerationDelta,
    GenerationFinished,
    GenerationPhase,
    GenerationProgress,
    GenerationStarted,
    HubSource,
    LoadPhase,
    ModelSpec,
    OutputOptions,
    Priority,
    Prompt,
    Role,
    SamplingParams,
    StopConditions,
    TextPrompt,
    TokenPrompt,
)
from mlxpool_server.errors import (
    CapabilityMissingError,
    DrainingError,
    GenerationFailedError,
    GenerationIdInUseError,
    GenerationNotFoundError,
    InvalidFieldError,
    LoadFailedError,
    ModelNotLoadedError,
    PoolMemoryLimitError,
    PromptTooLongError,
    QueueFullError,
)


@pytest.fixture
async def house() -> AsyncGenerator[House, None]:
    async with running_house() as house:
        yield house


def _kinds(events: list[object]) -> list[str]:
    return [type(event).__name__.removeprefix("Generation") for event in events]


async def _rendering(house: House, stream: Stream) -> asyncio.Task[GenerationFinished]:
    """Read on, and wait until the prompt is being rendered; `may_encode` lets it go."""
    tokenizer = house.files["m"].tokenizer
    tokenizer.may_encode.clear()
    reading = asyncio.ensure_future(stream.finished())
    assert await asyncio.to_thread(tokenizer.is_encoding.wait, PATIENCE_S)
    return reading


def _step_by_step(house: House, num_steps: int = 2) -> threading.Semaphore:
    """The model makes this many steps: two give the first token."""
    house.files["m"].model.steps = steps = threading.Semaphore(num_steps)
    return steps


# ---------------------------------------------------------------- events


async def test_the_order_of_events(house: House) -> None:
    """started, then progress of each phase and deltas, then exactly one finished."""
    events = await house.generate("hi").rest()
    kinds = _kinds(list(events))
    assert kinds[0] == "Started"
    assert kinds[-1] == "Finished"
    assert set(kinds[1:-1]) == {"Progress", "Delta"}
    phases = [event.phase for event in events if isinstance(event, GenerationProgress)]
    # The queue is the loaded model's; a phase that is over before it is read may be left out.
    order = (
        GenerationPhase.LOADING,
        GenerationPhase.QUEUED,
        GenerationPhase.PREFILLING,
        GenerationPhase.DECODING,
    )
    assert phases == sorted(phases, key=order.index)
    assert phases[0] is GenerationPhase.LOADING
    text = "".join(event.text for event in events if isinstance(event, GenerationDelta))
    assert text == "hi"
    finished = events[-1]
    assert isinstance(finished, GenerationFinished)
    assert (finished.text, finished.finish_reason) == ("hi", FinishReason.STOP)
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (2, 3)


async def test_started_names_the_model_and_revision(house: House) -> None:
    """Started says what the request resolved to, and the id the server made."""
    stream = house.generate()
    started = await stream.started()
    assert (started.model, started.revision) == ("m", "r1")
    assert started.generation_id
    await stream.close()


async def test_a_load_is_told_as_progress(house: House) -> None:
    """While the model loads, progress carries the load's own."""
    stream = house.generate()
    event = await stream.until(GenerationProgress)
    assert event.phase is GenerationPhase.LOADING
    assert event.load.phase is LoadPhase.QUEUED
    assert (await stream.finished()).timings.load_s > 0


async def test_the_timings_add_up(house: House) -> None:
    """No part is negative, and together they are not more than the total."""
    timings = (await house.generate().finished()).timings
    parts = (timings.load_s, timings.queue_s, timings.prefill_s, timings.decode_s)
    assert all(part >= 0 for part in parts)
    assert sum(parts) <= timings.total_s
    assert timings.time_to_first_token_s is not None
    assert 0 < timings.time_to_first_token_s <= timings.total_s


async def test_an_alias_resolves_to_its_model() -> None:
    """A request by an alias runs on the model, under the model's name."""
    specs = (ModelSpec("m", HubSource("org/m"), aliases=("default",)),)
    async with running_house({"m": FakeFiles()}, specs=specs) as house:
        stream = house.generate(model="default")
        assert (await stream.started()).model == "m"
        assert (await stream.finished()).text == "abc"


async def test_a_chat_is_rendered_by_the_template(house: House) -> None:
    """The template's text is what the model gets."""
    prompt = ChatPrompt((ChatMessage(Role.USER, "hi"),))
    assert (await house.generate(prompt=prompt).finished()).text == "<user>hi"


# ---------------------------------------------------------------- refused before `started`


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        (TokenPrompt((1, VOCAB_SIZE)), InvalidFieldError),
        (TokenPrompt((-1,)), InvalidFieldError),
        (TokenPrompt(()), InvalidFieldError),
        (TextPrompt(""), InvalidFieldError),
        (ChatPrompt((ChatMessage(Role.ASSISTANT, "x"),)), InvalidFieldError),
        (TextPrompt("x" * 1000), PromptTooLongError),
    ],
)
async def test_bad_prompts_are_refused(
    house: House, prompt: Prompt, error: type[Exception]
) -> None:
    """The error is the first thing to come; no model is loaded for it, and the house goes on."""
    with pytest.raises(error):
        await house.generate(prompt=prompt).started()
    assert house.files["m"].num_loads == 0
    assert house.generations.num_in_flight == 0
    assert await house.answer() == "abc"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sampling": SamplingParams(logit_bias={VOCAB_SIZE: 1.0})}, "sampling.logit_bias"),
        ({"sampling": SamplingParams(logit_bias={-1: 1.0})}, "sampling.logit_bias"),
        ({"stop": StopConditions(token_ids=frozenset({VOCAB_SIZE}))}, "stop.token_ids"),
    ],
)
async def test_token_ids_outside_the_vocabulary(
    house: House, changes: dict[str, object], field: str
) -> None:
    """They are refused wherever a request names them, with the field's name."""
    with pytest.raises(InvalidFieldError) as refusal:
        await house.generate(**changes).started()
    assert refusal.value.field == field


async def test_a_chat_without_a_template() -> None:
    """A chat for a model without one is refused, and the remedy named."""
    files = FakeFiles(tokenizer=FakeTokenizer(has_chat_template=False))
    async with running_house({"m": files}) as house:
        prompt = ChatPrompt((ChatMessage(Role.USER, "hi"),))
        with pytest.raises(CapabilityMissingError, match=r"prompt\.text"):
            await house.generate(prompt=prompt).started()


async def test_a_prompt_over_the_servers_own_limit() -> None:
    """max_prompt_tokens refuses what the model's context would take."""
    async with running_house(max_prompt_tokens=3) as house:
        assert await house.answer("abc") == "abc"
        with pytest.raises(PromptTooLongError) as refusal:
            await house.generate("abcd").started()
        assert (refusal.value.prompt_tokens, refusal.value.limit_tokens) == (4, 3)


async def test_require_loaded(house: House) -> None:
    """It refuses a model that is not READY, one that loads included, and loads nothing."""
    with pytest.raises(ModelNotLoadedError):
        await house.generate(require_loaded=True).started()
    assert house.files["m"].num_loads == 0
    house.files["m"].may_load.clear()
    load = house.start_load()
    await house.loading()
    with pytest.raises(ModelNotLoadedError):
        await house.generate(require_loaded=True).started()
    house.files["m"].may_load.set()
    await load
    assert await house.answer(require_loaded=True) == "abc"


async def test_a_model_that_cannot_fit() -> None:
    """A request for it is refused before `started`, with the numbers."""
    async with running_house({"m": FakeFiles.of_size(101)}, limit_bytes=100) as house:
        with pytest.raises(PoolMemoryLimitError):
            await house.generate().started()


async def test_a_broken_folder() -> None:
    """A request for a folder that is no model is refused before `started`."""
    async with running_house({"m": FakeFiles(inspect_error="no config.json")}) as house:
        with pytest.raises(LoadFailedError):
            await house.generate().started()


async def test_an_id_that_is_in_use(house: House) -> None:
    """A second request with the id is refused and does not harm the first; later it is free."""
    steps = _step_by_step(house)
    first = house.generate(generation_id="one")
    await first.until(GenerationDelta)
    with pytest.raises(GenerationIdInUseError):
        await house.generate(generation_id="one").started()
    house.files["m"].model.run_freely()
    steps.release()
    assert (await first.finished()).text == "abc"
    stream = house.generate(generation_id="one")
    assert (await stream.started()).generation_id == "one"
    await stream.close()


async def test_the_queue_is_bounded() -> None:
    """max_in_flight counts the model's running and waiting requests; the next is refused."""
    files = {"m": FakeFiles(), "other": FakeFiles()}
    async with running_house(files, max_in_flight=2) as house:
        streams = [house.generate() for _ in range(2)]
        for stream in streams:
            await stream.started()
        with pytest.raises(QueueFullError) as refusal:
            await house.generate().started()
        assert refusal.value.queued == 2
        assert await house.answer(model="other") == "abc"
        await streams[0].finished()
        assert await house.answer() == "abc"
        await streams[1].finished()


async def test_draining(house: House) -> None:
    """Nothing new is admitted; what is in flight ends; then the drain is over."""
    stream = house.generate()
    await stream.started()
    drain = asyncio.ensure_future(house.generations.drain(PATIENCE_S))
    await asyncio.sleep(0)
    with pytest.raises(DrainingError):
        await house.generate().started()
    assert not drain.done()
    await stream.finished()
    assert await drain


async def test_a_drain_has_a_deadline(house: House) -> None:
    """After the grace time the caller is told that some are left."""
    stream = house.generate()
    await stream.started()
    assert not await house.generations.drain(grace_s=0.001)
    await stream.close()
    assert await house.generations.drain(grace_s=0.001)


# ---------------------------------------------------------------- limits and sampling


@pytest.mark.parametrize(
    ("max_tokens", "default", "reason", "text"),
    [
        (2, None, FinishReason.MAX_TOKENS, "ab"),
        (None, 3, FinishReason.MAX_TOKENS, "abc"),
        (2, 3, FinishReason.MAX_TOKENS, "ab"),
        (None, None, FinishReason.CONTEXT_LENGTH, "abcda"),
        (5, None, FinishReason.MAX_TOKENS, "abcda"),
        (6, None, FinishReason.CONTEXT_LENGTH, "abcda"),
    ],
)
async def test_token_limits(
    max_tokens: int | None, default: int | None, reason: FinishReason, text: str
) -> None:
    """The caller's limit, the server's default or the context ends it, and is named."""
    files = FakeFiles(context_length=9)
    files.model.script = endless
    async with running_house({"m": files}, default_max_tokens=default) as house:
        stop = StopConditions(max_tokens=max_tokens)
        finished = await house.generate("abcd", stop=stop).finished()
        assert (finished.finish_reason, finished.text) == (reason, text)


async def test_a_context_that_is_known_after_the_fetch() -> None:
    """A hub model's prompt is checked once its files are here, at the latest."""
    files = FakeFiles(context_length=9, is_fetched=False)
    files.model.script = endless
    specs = (ModelSpec("m", HubSource("org/m")),)
    async with running_house({"m": files}, specs=specs) as house:
        finished = await house.generate("abcd").finished()
        assert finished.finish_reason is FinishReason.CONTEXT_LENGTH
    files = FakeFiles(context_length=2, is_fetched=False)
    async with running_house({"m": files}, specs=specs) as house:
        with pytest.raises(PromptTooLongError):
            await house.generate("abcd").finished()


async def test_a_seed_is_used_and_told(house: House) -> None:
    """The request's seed reaches the batch; without one the server picks one and tells it."""
    for given in (7, 0, None):
        stream = house.generate(sampling=SamplingParams(seed=given))
        told = (await stream.started()).seed
        await stream.finished()
        used = list(house.files["m"].model.batches[0].samplings.values())[-1].seed
        assert used == told
        assert given is None or told == given


async def test_stop_conditions_reach_the_sequence(house: House) -> None:
    """Sequences, token ids and ignore_eos of the request count."""
    finished = await house.generate("abc", stop=StopConditions(sequences=("b",))).finished()
    assert (finished.text, finished.stop_sequence) == ("a", "b")
    stop = StopConditions(token_ids=frozenset({ord("c")}))
    assert (await house.generate("abc", stop=stop).finished()).stop_token_id == ord("c")
    stop = StopConditions(ignore_eos=True, max_tokens=6)
    finished = await house.generate("abc", stop=stop).finished()
    assert finished.finish_reason is FinishReason.MAX_TOKENS
    assert finished.usage.completion_tokens == 6


async def test_output_options_reach_the_sequence(house: House) -> None:
    """final_only sends no delta; ids come when asked for."""
    output = OutputOptions(final_only=True, include_token_ids=True)
    events = await house.generate("hi", output=output).rest()
    assert "Delta" not in _kinds(list(events))
    finished = events[-1]
    assert isinstance(finished, GenerationFinished)
    assert finished.token_ids == (*b"hi", EOS)


async def test_priority_reaches_the_queue() -> None:
    """Of two that wait for one slot the urgent one runs first, though it came later."""
    async with running_house(max_batch_size=1) as house:
        _step_by_step(house)
        streams = [house.generate("first")]
        await streams[0].until(GenerationDelta)
        for text, priority in (("late", Priority.NORMAL), ("urgent", Priority.HIGH)):
            streams.append(house.generate(text, priority=priority))
            await streams[-1].until(GenerationStarted)
        reading = [asyncio.ensure_future(stream.finished()) for stream in streams]
        await asyncio.sleep(0)
        house.files["m"].model.run_freely()
        await asyncio.gather(*reading)
        joined = house.files["m"].model.batches[0].joined
        assert joined == [tuple(b"first"), tuple(b"urgent"), tuple(b"late")]


# ---------------------------------------------------------------- cancel and time


async def test_cancel_an_unknown_id(house: House) -> None:
    """What is not in flight, or not any more, raises GenerationNotFoundError."""
    with pytest.raises(GenerationNotFoundError):
        house.generations.cancel("one")
    await house.answer(generation_id="one")
    with pytest.raises(GenerationNotFoundError):
        house.generations.cancel("one")


async def test_cancel_while_it_renders(house: House) -> None:
    """A request that is cancelled before it ran ends with CANCELLED and never joins a batch."""
    reading = await _rendering(house, house.generate(generation_id="one"))
    house.generations.cancel("one")
    house.files["m"].tokenizer.may_encode.set()
    finished = await reading
    assert (finished.finish_reason, finished.text) == (FinishReason.CANCELLED, "")
    assert finished.usage.prompt_tokens == 3


async def test_cancel_while_it_loads(house: House) -> None:
    """The stream ends at once; the load goes on."""
    house.files["m"].may_load.clear()
    stream = house.generate(generation_id="one")
    await stream.phase(GenerationPhase.LOADING)
    residency = await house.loading()
    reading = asyncio.ensure_future(stream.finished())
    await asyncio.sleep(0)
    house.generations.cancel("one")
    finished = await reading
    assert finished.finish_reason is FinishReason.CANCELLED
    assert finished.timings.time_to_first_token_s is None
    house.files["m"].may_load.set()
    assert not residency.gone.is_set()
    assert await house.answer() == "abc"
    assert house.files["m"].num_loads == 1


async def test_cancel_while_the_reader_holds_a_load_event(house: House) -> None:
    """A cancel that comes while nobody waits for the load is not lost."""
    house.files["m"].may_load.clear()
    stream = house.generate(generation_id="one")
    await stream.phase(GenerationPhase.LOADING)
    await house.loading()
    while (await stream.until(GenerationProgress)).load.phase is not LoadPhase.LOADING:
        pass
    house.generations.cancel("one")
    assert (await stream.finished()).finish_reason is FinishReason.CANCELLED


async def test_cancel_while_the_model_unloads(house: House) -> None:
    """A request that waits for an old stay to end is woken too."""
    steps = _step_by_step(house)
    first = house.generate()
    await first.until(GenerationDelta)
    unload = asyncio.ensure_future(house.unload())
    await asyncio.sleep(0)
    waiting = house.generate(generation_id="two")
    await waiting.started()
    reading = asyncio.ensure_future(waiting.finished())
    await asyncio.sleep(0)
    house.generations.cancel("two")
    assert (await reading).finish_reason is FinishReason.CANCELLED
    house.files["m"].model.run_freely()
    steps.release()
    await first.finished()
    await unload


async def test_cancel_while_it_waits_for_a_slot() -> None:
    """A queued request ends; the one that runs is not touched."""
    async with running_house(max_batch_size=1) as house:
        _step_by_step(house)
        first = house.generate()
        await first.until(GenerationDelta)
        waiting = house.generate(generation_id="two")
        await waiting.started()
        reading = asyncio.ensure_future(waiting.finished())
        await asyncio.sleep(0)
        house.generations.cancel("two")
        house.files["m"].model.run_freely()
        assert (await reading).finish_reason is FinishReason.CANCELLED
        assert (await first.finished()).text == "abc"


async def test_cancel_while_it_runs(house: House) -> None:
    """It ends with CANCELLED and the text so far; a second cancel does no harm."""
    house.files["m"].model.script = endless
    steps = _step_by_step(house)
    stream = house.generate(generation_id="one")
    await stream.until(GenerationDelta)
    house.generations.cancel("one")
    house.generations.cancel("one")
    steps.release()
    finished = await stream.finished()
    assert finished.finish_reason is FinishReason.CANCELLED
    assert "abc".startswith(finished.text)
    assert finished.text


async def test_max_duration_during_a_load(house: House) -> None:
    """The stream ends with TIME_LIMIT while the load goes on."""
    house.files["m"].may_load.clear()
    finished = await house.generate(stop=StopConditions(max_duration_s=0.001)).finished()
    assert finished.finish_reason is FinishReason.TIME_LIMIT
    house.files["m"].may_load.set()
    assert await house.answer() == "abc"


async def test_max_duration_while_it_runs(house: House) -> None:
    """It ends with TIME_LIMIT and the text so far."""
    house.files["m"].model.script = endless
    house.files["m"].context_length = 10**9
    await house.load()
    finished = await house.generate(stop=StopConditions(max_duration_s=0.02)).finished()
    assert finished.finish_reason is FinishReason.TIME_LIMIT
    assert finished.timings.total_s >= 0.02


# ---------------------------------------------------------------- hanging up


@pytest.mark.parametrize("moment", ["started", "loading", "waiting", "running", "text"])
async def test_hanging_up_gives_everything_back(moment: str) -> None:
    """Wherever a caller leaves, its id, its lease and its slot are free and the batch goes on."""
    async with running_house(max_batch_size=1) as house:
        model = house.files["m"].model
        model.script = endless
        house.files["m"].context_length = 10**9
        other: Stream | None = None
        if moment == "waiting":
            other = house.generate("other")
            await other.until(GenerationDelta)
        if moment == "loading":
            house.files["m"].may_load.clear()
        if moment == "running":
            _step_by_step(house, num_steps=1)
        stream = house.generate(generation_id="one")
        await stream.started()
        if moment == "loading":
            await stream.phase(GenerationPhase.LOADING)
        elif moment == "waiting":
            await stream.phase(GenerationPhase.QUEUED)
        elif moment == "running":
            await stream.phase(GenerationPhase.PREFILLING)
        elif moment == "text":
            await stream.until(GenerationDelta)
        await stream.close()
        assert house.generations.num_in_flight == (0 if other is None else 1)
        assert house.entry().num_leases == (0 if other is None else 1)
        if other is not None:
            await other.close()
        house.files["m"].may_load.set()
        model.run_freely()
        await house.load()
        # There and back: the engine has seen what came before.
        await house.engine.detach("nobody", DrainingError(1.0))
        assert all(not batch.slots for batch in model.batches)


@pytest.mark.parametrize("moment", ["tokenizer", "rendering", "loading", "running"])
async def test_a_cancelled_task_gives_everything_back(moment: str) -> None:
    """A deadline cancels the task that reads, wherever it waits: nothing is left behind."""
    async with running_house() as house:
        files = house.files["m"]
        files.model.script = endless
        stream = house.generate()
        if moment == "tokenizer":
            files.may_read_tokenizer.clear()
        if moment == "rendering":
            reading = await _rendering(house, stream)
        else:
            if moment == "loading":
                files.may_load.clear()
            _step_by_step(house)
            if moment == "running":
                await stream.until(GenerationDelta)
            reading = asyncio.ensure_future(stream.finished())
            if moment == "loading":
                await house.loading()
            await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert house.generations.num_in_flight == 0
        assert house.entry().num_leases == 0


async def test_a_request_under_a_dead_engine(house: House) -> None:
    """It fails at once with GenerationFailedError."""
    await house.load()
    await house.engine.stop(DrainingError(1.0), PATIENCE_S)
    with pytest.raises(GenerationFailedError):
        await house.generate().finished()


async def test_text_with_tokens_the_model_does_not_have() -> None:
    """A tokenizer may know more tokens than the model: such a prompt is refused, not run."""
    files = FakeFiles()
    files.tokenizer.vocab_size = 98
    async with running_house({"m": files}) as house:
        with pytest.raises(InvalidFieldError, match="token id 98"):
            await house.generate("ab").started()
        assert await house.answer("a") == "a"


async def test_what_is_not_read_holds_nothing(house: House) -> None:
    """A generation that has ended gives back its lease though nobody reads its end."""
    await house.load()
    stream = house.generate("ab" * 20)
    await stream.until(GenerationProgress)
    # An unload waits for leases.
    assert (await house.unload()).was_loaded
    assert (await stream.finished()).text == "ab" * 20


async def test_what_ended_before_its_load_starts_none(house: House) -> None:
    """A time limit that has passed by then brings no model in."""
    finished = await house.generate(stop=StopConditions(max_duration_s=1e-9)).finished()
    assert finished.finish_reason is FinishReason.TIME_LIMIT
    assert house.files["m"].num_loads == 0
