"""Tokenizers and prompts: read once, off the event loop, without weights."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from fakes.loader import FakeFiles, FakeLoader
from fakes.tokenizer import FakeTokenizer
from mlxpool_server.domain import ChatMessage, ChatPrompt, ModelSpec, Role, TextPrompt, TokenPrompt
from mlxpool_server.errors import (
    InvalidFieldError,
    LoadFailedError,
    MalformedCallError,
    PromptTooLongError,
    QueueTimeoutError,
)
from mlxpool_server.pool.model_threads import MAX_THREADS
from mlxpool_server.pool.prompts import PromptReader
from mlxpool_server.pool.tokenizers import Tokenizers

SPEC = ModelSpec("m", Path("unread"))


@pytest.fixture
def files() -> FakeFiles:
    return FakeFiles()


@pytest.fixture
def tokenizers(files: FakeFiles) -> Tokenizers:
    return Tokenizers(FakeLoader({"m": files}), lambda _: None)


@pytest.fixture
def prompts(files: FakeFiles) -> PromptReader:
    return PromptReader(FakeLoader({"m": files}))


async def test_a_tokenizer_is_read_once(files: FakeFiles, tokenizers: Tokenizers) -> None:
    """However many ask, together or later, they get the same one."""
    together = await asyncio.gather(*(tokenizers.get(SPEC) for _ in range(5)))
    assert {id(each) for each in (*together, await tokenizers.get(SPEC))} == {id(files.tokenizer)}
    assert files.num_tokenizer_reads == 1


async def test_a_failed_read_is_tried_again(files: FakeFiles, tokenizers: Tokenizers) -> None:
    """Everyone who waits gets the error; the next caller tries again."""
    files.tokenizer_error = "broken"
    waiting = [tokenizers.get(SPEC) for _ in range(3)]
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [LoadFailedError] * 3
    assert files.num_tokenizer_reads == 1
    files.tokenizer_error = ""
    assert await tokenizers.get(SPEC) is files.tokenizer
    assert files.num_tokenizer_reads == 2


async def test_a_caller_who_gives_up_harms_nobody(files: FakeFiles, tokenizers: Tokenizers) -> None:
    """The one that started the read may leave; the others get the tokenizer."""
    files.may_read_tokenizer.clear()
    starter, other = (asyncio.ensure_future(tokenizers.get(SPEC)) for _ in range(2))
    await asyncio.sleep(0)
    starter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starter
    files.may_read_tokenizer.set()
    assert await other is files.tokenizer
    assert files.num_tokenizer_reads == 1


async def test_a_failed_read_that_nobody_waits_for(
    files: FakeFiles, tokenizers: Tokenizers
) -> None:
    """Its error is nobody's, and the next caller tries again."""
    files.tokenizer_error = "broken"
    files.may_read_tokenizer.clear()
    starter = asyncio.ensure_future(tokenizers.get(SPEC))
    await asyncio.sleep(0)
    starter.cancel()
    await asyncio.wait([starter])
    (read,) = tokenizers._reads.values()
    files.may_read_tokenizer.set()
    await asyncio.wait([read])
    await asyncio.sleep(0)
    files.tokenizer_error = ""
    assert await tokenizers.get(SPEC) is files.tokenizer


async def test_prompts_are_read_off_the_loop(files: FakeFiles, prompts: PromptReader) -> None:
    """Encoding, and the pieces of Tokenize, run on worker threads."""
    await prompts.tokenize(SPEC, TextPrompt("abc"), include_pieces=True)
    assert files.tokenizer.threads
    assert threading.current_thread().name not in files.tokenizer.threads


async def test_tokenize_and_read_agree(files: FakeFiles, prompts: PromptReader) -> None:
    """Tokenize shows exactly what would run: ids, text after the template, bytes of each token."""
    chat = ChatPrompt((ChatMessage(Role.USER, "é"),))
    shown = await prompts.tokenize(SPEC, chat, include_pieces=True)
    read = await prompts.read(SPEC, chat)
    assert shown.token_ids == read.token_ids == tuple("<user>é".encode())
    assert shown.rendered_prompt == "<user>é"
    assert b"".join(shown.pieces) == "<user>é".encode()


async def test_pieces_only_when_asked_for(files: FakeFiles, prompts: PromptReader) -> None:
    """Tokens are taken as they are, with no text and no pieces."""
    shown = await prompts.tokenize(SPEC, TokenPrompt((1, 2)), include_pieces=False)
    assert (shown.token_ids, shown.pieces, shown.rendered_prompt) == ((1, 2), (), "")


async def test_changed_files_are_read_anew(files: FakeFiles) -> None:
    """But not while the model is in memory: its weights are those of the files as they were."""
    load: int | None = 1
    tokenizers = Tokenizers(FakeLoader({"m": files}), lambda _: load)
    old, files.tokenizer, files.stamp = await tokenizers.get(SPEC), FakeTokenizer(), 1
    assert await tokenizers.get(SPEC) is old
    load = None
    both = await asyncio.gather(tokenizers.get(SPEC), tokenizers.get(SPEC))
    assert {id(each) for each in both} == {id(files.tokenizer)}
    assert files.num_tokenizer_reads == 2


@pytest.mark.parametrize("before", [None, 1])
async def test_a_load_has_its_own_files_tokenizer(files: FakeFiles, before: int | None) -> None:
    """One that was read before the load is compared with the files once more."""
    load = before
    tokenizers = Tokenizers(FakeLoader({"m": files}), lambda _: load)
    old, files.tokenizer, files.stamp = await tokenizers.get(SPEC), FakeTokenizer(), 1
    load = 2
    assert await tokenizers.get(SPEC) is files.tokenizer is not old


async def test_a_prompt_has_the_files_looked_at_once(
    files: FakeFiles, prompts: PromptReader
) -> None:
    """Whoever has the tokenizer reads with it: ids and pieces are the same one's."""
    await prompts.tokenizer(SPEC)
    before = files.num_stamps
    await prompts.tokenize(SPEC, TextPrompt("abc"), include_pieces=True)
    assert files.num_stamps == before + 1


# ---------------------------------------------------------------- slow ones


async def test_a_slow_tokenizer_costs_only_its_own_prompts() -> None:
    """They are refused when their time is up, and other models' prompts are read meanwhile."""
    slow, quick = FakeFiles(), FakeFiles()
    slow.tokenizer.may_encode.clear()
    prompts = PromptReader(FakeLoader({"slow": slow, "quick": quick}), limit_s=0.05)
    specs = {name: ModelSpec(name, Path("unread")) for name in ("slow", "quick")}
    reading = [prompts.read(specs["slow"], TextPrompt("abc")) for _ in range(MAX_THREADS + 2)]
    refused = await asyncio.gather(*reading, return_exceptions=True)
    kinds = [type(error) for error in refused]
    assert kinds.count(InvalidFieldError) == MAX_THREADS
    # Those never had a thread: it is not they who were too slow.
    assert kinds.count(QueueTimeoutError) == 2
    assert not prompts.is_idle
    assert (await prompts.read(specs["quick"], TextPrompt("abc"))).text == "abc"
    # What they asked for went with them.
    assert prompts._threads._threads["slow"].executor._work_queue.empty()
    prompts.forget("slow")
    slow.tokenizer.may_encode.set()
    assert (await prompts.read(specs["slow"], TextPrompt("abc"))).text == "abc"
    async with asyncio.timeout(10):
        await asyncio.gather(*map(asyncio.wrap_future, prompts._threads._left))
    assert prompts.is_idle
    prompts.close()


async def test_a_text_that_must_be_too_long_is_not_tokenised(
    files: FakeFiles, prompts: PromptReader
) -> None:
    """A text and what a template wrote: so many characters cannot be so few tokens."""
    files.tokenizer.max_token_chars = 4
    message = ChatMessage(Role.USER, "a" * 40)
    for prompt in (TextPrompt("a" * 41), ChatPrompt((message,))):
        with pytest.raises(PromptTooLongError, match=r"at least 1\d tokens") as caught:
            await prompts.read(SPEC, prompt, max_tokens=10)
        assert caught.value.limit_tokens == 10
    assert not files.tokenizer.is_encoding.is_set()
    # It may fit, as far as its length tells.
    assert await prompts.read(SPEC, TextPrompt("a" * 40), max_tokens=10)
    # A tokenizer that makes one token of any word tells nothing by the length.
    files.tokenizer.max_token_chars = None
    assert await prompts.read(SPEC, TextPrompt("a" * 41), max_tokens=10)


async def test_slow_files_hold_up_only_their_own_model() -> None:
    """Whoever asks for them is told in time; other models' tokenizers are read meanwhile."""
    slow, quick = FakeFiles(), FakeFiles()
    slow.may_read_tokenizer.clear()
    tokenizers = Tokenizers(FakeLoader({"slow": slow, "quick": quick}), lambda _: None, 0.05)
    specs = {name: ModelSpec(name, Path("unread")) for name in ("slow", "quick")}
    for _ in range(MAX_THREADS):
        with pytest.raises(LoadFailedError, match="takes longer"):
            await tokenizers.get(specs["slow"])
    # Its threads are taken: it is not read a third time.
    with pytest.raises(QueueTimeoutError):
        await tokenizers.get(specs["slow"])
    assert await tokenizers.get(specs["quick"]) is quick.tokenizer
    assert not tokenizers.is_idle
    slow.may_read_tokenizer.set()
    async with asyncio.timeout(10):
        await asyncio.gather(*map(asyncio.wrap_future, tokenizers._threads._left))
    assert tokenizers.is_idle
    assert await tokenizers.get(specs["slow"]) is slow.tokenizer


async def test_a_call_that_finds_no_thread_is_text() -> None:
    """Slow prompts keep the threads: who waits for a call gets its text, and no error."""
    slow = FakeFiles()
    slow.tokenizer.may_encode.clear()
    prompts = PromptReader(FakeLoader({"m": slow}), limit_s=0.05)
    reading = [prompts.read(SPEC, TextPrompt("abc")) for _ in range(MAX_THREADS)]
    await asyncio.gather(*reading, return_exceptions=True)
    tokenizer = await prompts.tokenizer(SPEC)
    with pytest.raises(MalformedCallError):
        await prompts.read_calls(SPEC, tokenizer, "add 1", ChatPrompt(()))
    slow.tokenizer.may_encode.set()
    async with asyncio.timeout(10):
        await asyncio.gather(*map(asyncio.wrap_future, prompts._threads._left))
