"""Embed in the pool: admitted, loaded, reserved, run, and whatever ends it early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from fakes import VOCAB_SIZE, FakeFiles, FakeModel, FakeTokenizer
from fakes.model import endless
from fakes.running_engine import PATIENCE_S
from fakes.running_pool import House, running_house
from mlxpool_server.domain import (
    ChatMessage,
    ChatPrompt,
    EmbeddingInfo,
    EmbedResult,
    Footprint,
    HubSource,
    ModelSpec,
    ModelState,
    Pooling,
    Prompt,
    Role,
    TextPrompt,
    TokenPrompt,
)
from mlxpool_server.errors import (
    CapabilityMissingError,
    DrainingError,
    GenerationFailedError,
    InvalidFieldError,
    LoadFailedError,
    ModelNotFoundError,
    ModelUnloadedError,
    PoolMemoryLimitError,
    PromptTooLongError,
    QueueFullError,
    QueueTimeoutError,
)

HUB = (ModelSpec("m", HubSource("somebody/m")),)
INFO = EmbeddingInfo(2, Pooling.MEAN, pass_tokens=100)
# Two bytes for each token of a pass, and one for each that a longer text leaves in a cache.
FOOTPRINT = Footprint(kv_bytes_per_token=1, activation_bytes_per_token=2)


@pytest.fixture
async def house() -> AsyncGenerator[House, None]:
    async with running_house() as house:
        yield house


def only_embeds(**changes: Any) -> FakeFiles:
    return FakeFiles(can_generate=False, **changes)


async def waiting(model: FakeModel) -> None:
    """Wait until the engine is in a step of this model, which is stepped."""
    assert await asyncio.to_thread(model.is_waiting.wait, PATIENCE_S)


def start(house: House, *inputs: str, **fields: Any) -> asyncio.Task[EmbedResult]:
    return asyncio.ensure_future(house.embed(*inputs, **fields))


# ---------------------------------------------------------------- the plain way


async def test_a_vector_an_input(house: House) -> None:
    """Texts, chats and tokens alike, in their order; usage counts all of their tokens."""
    chat = ChatPrompt((ChatMessage(Role.USER, "hi"),))
    result = await house.embed("abc", chat, TokenPrompt((7, 8)))
    assert [list(vector) for vector in result.vectors] == [
        [3, ord("a")], [len("<user>hi"), ord("<")], [2, 7],
    ]  # fmt: skip
    assert result.prompt_tokens == 3 + len("<user>hi") + 2


async def test_the_model_is_loaded_shared_and_kept(house: House) -> None:
    """One load for all who ask, generations too; the request's keep_alive counts from its end."""
    house.files["m"].may_load.clear()
    first, second = start(house, "a"), start(house, "b", keep_alive_s=0.0)
    stream = house.generate("abc")
    await stream.started()
    await house.loading()
    house.files["m"].may_load.set()
    await asyncio.gather(first, second)
    assert (await stream.finished()).text == "abc"
    assert house.files["m"].num_loads == 1
    house.expire()
    await house.gone()


@pytest.mark.parametrize(
    ("own", "asked", "used"),
    [
        (Pooling.CLS, None, Pooling.CLS),
        (Pooling.CLS, Pooling.LAST_TOKEN, Pooling.LAST_TOKEN),
        (None, Pooling.MEAN, Pooling.MEAN),
    ],
)
async def test_pooling(own: Pooling | None, asked: Pooling | None, used: Pooling) -> None:
    """The request's, else the model's own."""
    files = FakeFiles(embedding=replace(INFO, pooling=own))
    async with running_house({"m": files}) as house:
        await house.embed("a", pooling=asked, normalize=False)
        (job,) = files.model.embedders[0].asked
        assert (job.pooling, job.normalize) == (used, False)


# ---------------------------------------------------------------- refused


BAD_INPUTS: list[tuple[Prompt, type[Exception], str]] = [
    (TextPrompt(""), InvalidFieldError, "inputs[1]"),
    (TokenPrompt((VOCAB_SIZE,)), InvalidFieldError, "inputs[1].tokens.ids"),
    (TokenPrompt((-1,)), InvalidFieldError, "inputs[1].tokens.ids"),
    (
        ChatPrompt((ChatMessage(Role.ASSISTANT, "x"),)),
        InvalidFieldError,
        "inputs[1].chat.messages",
    ),
    (TextPrompt("x" * 1001), PromptTooLongError, "inputs[1]"),
]


@pytest.mark.parametrize(("bad", "kind", "field"), BAD_INPUTS)
async def test_a_bad_input_is_named(
    house: House, bad: Prompt, kind: type[Exception], field: str
) -> None:
    """By its index; nothing is loaded for it."""
    with pytest.raises(kind) as refusal:
        await house.embed("good", bad)
    assert getattr(refusal.value, "field", "") == field
    assert house.files["m"].num_loads == 0


async def test_a_bad_input_behind_many(house: House) -> None:
    """Also where inputs are read a part at a time."""
    with pytest.raises(InvalidFieldError) as refusal:
        await house.embed(*(["a"] * 77), "")
    assert refusal.value.field == "inputs[77]"


@pytest.mark.parametrize(
    ("max_tokens", "max_prompt_tokens", "what"),
    [(10, None, "the model's limit"), (None, 10, "this server's limit"), (10, 11, "the model's")],
)
async def test_a_long_input(
    max_tokens: int | None, max_prompt_tokens: int | None, what: str
) -> None:
    """The smallest limit counts, and is named; a text may fill it."""
    files = FakeFiles(embedding=replace(INFO, max_tokens=max_tokens))
    # Only counting tells.
    files.tokenizer.max_token_chars = None
    async with running_house({"m": files}, max_prompt_tokens=max_prompt_tokens) as house:
        assert (await house.embed("x" * 10)).prompt_tokens == 10
        with pytest.raises(PromptTooLongError, match=what) as refusal:
            await house.embed("ok", "x" * 11)
        assert refusal.value.field == "inputs[1]"
        assert (refusal.value.prompt_tokens, refusal.value.limit_tokens) == (11, 10)


async def test_more_than_a_reply_holds() -> None:
    """The first input without room is named, before anything is read; as many as fit are served."""
    async with running_house({"m": FakeFiles(embedding=replace(INFO, size=100))},
                             max_reply_bytes=256 + 3 * 412) as house:  # fmt: skip
        assert len((await house.embed("a", "b", "c")).vectors) == 3
        with pytest.raises(InvalidFieldError, match="3 embeddings of 100 numbers") as refusal:
            await house.embed("a", "b", "c", "")
        assert refusal.value.field == "inputs[3]"


@pytest.mark.parametrize(
    ("embedding", "text"),
    [
        (None, "hidden states"),
        (replace(INFO, problem="its modules.json has a 'Dense'"), "Dense"),
        (replace(INFO, pooling=None), "name one in pooling"),
    ],
)
async def test_a_model_that_cannot(embedding: EmbeddingInfo | None, text: str) -> None:
    """It says why, and is not loaded for it."""
    files = FakeFiles(embedding=embedding)
    async with running_house({"m": files}) as house:
        with pytest.raises(CapabilityMissingError, match=text):
            await house.embed("a")
        assert files.num_loads == 0


async def test_generating_on_a_model_that_only_embeds() -> None:
    """It is refused before the first event, whatever the prompt is; nothing is loaded for it."""
    files = only_embeds(tokenizer=FakeTokenizer(has_chat_template=False))
    async with running_house({"m": files}) as house:
        chat = ChatPrompt((ChatMessage(Role.USER, "hi"),))
        for prompt in (TextPrompt("hi"), chat):
            with pytest.raises(CapabilityMissingError, match="call Embed"):
                await house.generate(prompt=prompt).started()
        assert files.num_loads == 0
        await house.embed("a")
        with pytest.raises(CapabilityMissingError):
            await house.generate().started()


async def test_a_hub_model_that_turns_out_to_be_another_kind() -> None:
    """What is known only after the download is checked then."""
    files = only_embeds(is_fetched=False, embedding=replace(INFO, max_tokens=2))
    files.tokenizer.max_token_chars = None
    async with running_house({"m": files}, specs=HUB) as house:
        with pytest.raises(CapabilityMissingError):
            await house.generate().finished()
    files = FakeFiles(is_fetched=False, embedding=replace(INFO, max_tokens=2))
    async with running_house({"m": files}, specs=HUB) as house:
        with pytest.raises(PromptTooLongError):
            await house.embed("abc")


async def test_unknown_models(house: House) -> None:
    """As everywhere."""
    with pytest.raises(ModelNotFoundError):
        await house.embed("a", model="nobody")


async def test_a_load_that_fails() -> None:
    """Its error is the caller's."""
    files = FakeFiles(load_error=LoadFailedError("m", "broken"))
    async with running_house({"m": files}) as house:
        with pytest.raises(LoadFailedError):
            await house.embed("a")


async def test_a_full_queue() -> None:
    """Embeddings and generations of a model count together."""
    files = FakeFiles(model=FakeModel(is_stepped=True))
    async with running_house({"m": files}, max_in_flight=2) as house:
        first, second = start(house, "a"), start(house, "b")
        await waiting(files.model)
        with pytest.raises(QueueFullError):
            await house.embed("c")
        with pytest.raises(QueueFullError):
            await house.generate().started()
        files.model.run_freely()
        await asyncio.gather(first, second)


# ---------------------------------------------------------------- memory


async def test_what_passes_take_is_reserved() -> None:
    """Beside the weights: a pass, padding included, and the longest text's cache."""
    model = FakeModel(resident_bytes=100, is_stepped=True)
    files = FakeFiles(estimated_bytes=100, footprint=FOOTPRINT, model=model)
    async with running_house({"m": files}, limit_bytes=10_000) as house:
        embedding = start(house, "x" * 30, "x" * 10)
        await waiting(model)
        # Each of 30 and 10 tokens to at most twice its length, or 32.
        assert house.pool.used_bytes == 100 + 2 * (60 + 32) + (30 + 256)
        model.run_freely()
        await embedding
        assert house.pool.used_bytes == 100


async def test_a_pass_is_no_larger_than_that() -> None:
    """However many texts there are; but a text of a model that only embeds goes in whole."""
    for can_generate, pass_tokens in ((True, 100), (False, 300)):
        model = FakeModel(is_stepped=True)
        files = FakeFiles(footprint=FOOTPRINT, model=model, can_generate=can_generate)
        async with running_house({"m": files}, limit_bytes=10_000) as house:
            embedding = start(house, "x" * 300, "x" * 290)
            await waiting(model)
            assert house.pool.used_bytes == 100 + 2 * pass_tokens + (300 + 256)
            model.run_freely()
            await embedding


async def test_beside_generations() -> None:
    """Both kinds' bytes are held while both run."""
    model = FakeModel(script=endless, is_stepped=True)
    files = FakeFiles(footprint=FOOTPRINT, model=model)
    async with running_house({"m": files}, limit_bytes=100_000) as house:
        stream = house.generate("abc")
        await stream.started()
        reading = asyncio.ensure_future(stream.rest())
        await waiting(model)
        alone = house.pool.used_bytes
        embedding = start(house, "x" * 30)
        await house.held(alone + 2 * 60 + (30 + 256))
        model.run_freely()
        await embedding
        await house.held(alone)
        house.generations.cancel(next(iter(house.generations._in_flight._generations))[1])
        await reading


async def test_what_can_never_fit() -> None:
    """It is refused at once, with the numbers; nobody is evicted for it."""
    files = {"m": FakeFiles(footprint=FOOTPRINT), "idle": FakeFiles()}
    async with running_house(files, limit_bytes=500) as house:
        await house.load("idle")
        with pytest.raises(PoolMemoryLimitError) as refusal:
            await house.embed("x" * 200)
        assert refusal.value.required_bytes == 100 + 2 * 100 + 200 + 256
        assert house.resident == {"idle"}


async def test_others_are_evicted_for_it() -> None:
    """As for a generation: an idle model makes room."""
    files = {"m": FakeFiles(footprint=FOOTPRINT), "idle": FakeFiles.of_size(400)}
    async with running_house(files, limit_bytes=600) as house:
        await house.load("idle")
        await house.embed("x" * 30)
        assert house.resident == {"m"}


async def test_waiting_for_memory_has_an_end() -> None:
    """max_queue_wait_s holds for an Embed, too."""
    busy = FakeModel(script=endless, is_stepped=True)
    files = {
        "busy": FakeFiles(model=busy, footprint=Footprint(kv_bytes_per_token=1)),
        "m": FakeFiles(footprint=FOOTPRINT),
    }
    async with running_house(files, limit_bytes=1700, max_queue_wait_s=0.05,
                             default_max_tokens=10) as house:  # fmt: skip
        await house.load()
        stream = house.generate("x" * 800, model="busy")
        await stream.started()
        reading = asyncio.ensure_future(stream.rest())
        await waiting(busy)
        with pytest.raises(QueueTimeoutError):
            await house.embed("x" * 100)
        busy.run_freely()
        await reading


async def test_a_model_that_only_embeds_keeps_no_prompts() -> None:
    """No bytes are set aside for a prompt cache that nothing fills."""
    files = {"m": only_embeds(), "other": FakeFiles()}
    async with running_house(files, prompt_cache_share=0.5) as house:
        await house.embed("a")
        assert house.pool.used_bytes == 100
        await house.load("other")
        assert house.pool.used_bytes > 200


# ---------------------------------------------------------------- ended early


async def test_a_caller_who_gives_up() -> None:
    """In a pass, or while the model loads: what it held is free, and the load goes on."""
    files = FakeFiles(footprint=FOOTPRINT, model=FakeModel(is_stepped=True))
    async with running_house({"m": files}, limit_bytes=10_000) as house:
        files.may_load.clear()
        embedding = start(house, "abc")
        await house.loading()
        embedding.cancel()
        files.may_load.set()
        await house.load()
        assert house.entry().num_leases == 0
        embedding = start(house, "abc")
        await waiting(files.model)
        embedding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await embedding
        assert house.pool.used_bytes == 100
        assert house.entry().num_leases == 0
        files.model.run_freely()
        assert (await house.embed("z")).prompt_tokens == 1


async def test_an_unload_by_force() -> None:
    """Whoever waits for vectors learns why there are none."""
    files = FakeFiles(model=FakeModel(is_stepped=True))
    async with running_house({"m": files}) as house:
        embedding = start(house, *"abc")
        await waiting(files.model)
        unloading = asyncio.ensure_future(house.unload(force=True))
        # Its task, and the one that it starts: the engine is told before its step ends.
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(house.engine._pending) == 2
        files.model.run_freely()
        await unloading
        with pytest.raises(ModelUnloadedError):
            await embedding


async def test_an_unload_waits_for_it() -> None:
    """A leased model stays until its vectors are there."""
    files = FakeFiles(model=FakeModel(is_stepped=True))
    async with running_house({"m": files}) as house:
        embedding = start(house, "abc")
        await waiting(files.model)
        unloading = asyncio.ensure_future(house.unload())
        await asyncio.sleep(0)
        assert await house.state() is ModelState.UNLOADING
        files.model.run_freely()
        assert (await embedding).prompt_tokens == 3
        await unloading


async def test_a_pass_that_fails(house: House) -> None:
    """Nothing is left behind, and the next one is served."""
    house.files["m"].model.pass_errors.append(RuntimeError("secret"))
    with pytest.raises(GenerationFailedError, match="embedding"):
        await house.embed("abc")
    assert (await house.embed("abc")).prompt_tokens == 3


async def test_draining() -> None:
    """Those in flight end in peace, or in time; new ones are refused."""
    files = FakeFiles(model=FakeModel(is_stepped=True))
    async with running_house({"m": files}) as house:
        embedding = start(house, "abc")
        await waiting(files.model)
        assert not await house.embeddings.drain(0.0)
        with pytest.raises(DrainingError):
            await house.embed("abc")
        draining = asyncio.ensure_future(house.embeddings.drain(PATIENCE_S))
        files.model.run_freely()
        assert await draining
        assert (await embedding).prompt_tokens == 3


async def test_it_is_told(house: House) -> None:
    """Who keeps statistics hears of inputs and tokens."""
    told: list[tuple[str, int, int]] = []
    house.pool.activity.observer.embedded = lambda *facts: told.append(facts)  # type: ignore[method-assign]
    await house.embed("abc", "de")
    assert told == [("m", 2, 5)]
