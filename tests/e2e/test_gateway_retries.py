"""The real gateway in front of servers whose model a test writes the answers of."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fakes import EOS, FakeFiles, FakeModel
from fakes.model import Script, endless
from mlxpool_server.mlx_backend.tokenizer import byte_alphabet
from replicas.fleet import SECONDLY, running_gateway
from rpc.gateway_harness import Worker, request, running_worker
from rpc.harness import until
from tiny_models.tokenizers import CHAT_TEMPLATE

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
# The gateway may send any of so many requests to either worker, and sends some to both.
NUM_REQUESTS = 8

pytestmark = pytest.mark.usefixtures("smg")


def says(text: str) -> Script:
    def script(_: Sequence[int]) -> Iterator[int]:
        yield from text.encode()
        while True:
            yield EOS

    return script


def byte_tokenizer_files() -> dict[str, bytes]:
    """What the fake tokenizer does, for the gateway's: every byte is a token, 256 the end."""
    vocabulary = dict(byte_alphabet())
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    assert tokenizer.token_to_id("<|end|>") == EOS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    files = {"tokenizer_config.json": config, "config.json": {"eos_token_id": EOS}}
    contents = {name: json.dumps(content).encode() for name, content in files.items()}
    return contents | {"tokenizer.json": tokenizer.to_str().encode()}


def files_of(script: Script, *, is_stepped: bool = False) -> dict[str, FakeFiles]:
    model = FakeModel(script=script, is_stepped=is_stepped)
    return {"m": FakeFiles(model=model, tokenizer_files=byte_tokenizer_files())}


@dataclass(frozen=True)
class Front:
    """Starts the gateway in front of workers; an openai client of it."""

    stack: AsyncExitStack
    logs: Path

    async def worker(self, files: dict[str, FakeFiles], **settings: Any) -> Worker:
        return await self.stack.enter_async_context(running_worker(files, **settings))

    async def open(self, *workers: Worker, flags: Sequence[str] = SECONDLY) -> openai.AsyncOpenAI:
        gateways = self.stack.enter_context(ExitStack())
        addresses = [worker.address for worker in workers]
        # On a thread: the workers are on this loop, and have to answer meanwhile.
        gateway = await asyncio.to_thread(
            lambda: gateways.enter_context(running_gateway(addresses, self.logs, flags))
        )
        return await self.stack.enter_async_context(
            openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
        )


@pytest_asyncio.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    async with AsyncExitStack() as stack:
        yield Front(stack, tmp_path)


async def ask(client: openai.AsyncOpenAI, text: str = "hi", **options: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    create: Any = client.chat.completions.create
    return await create(model="m", messages=messages, **options)


def ends(worker: Worker) -> list[tuple[str, str]]:
    """Status and reason of each of its generations."""
    lines = worker.server.events("rpc.finished")
    return [
        (line["status"], line.get("reason", "")) for line in lines if line["method"] == "Generate"
    ]


async def test_tool_calls(front: Front) -> None:
    """The gateway reads them out of what the model wrote, streamed or not."""
    worker = await front.worker(files_of(says(CALL)))
    client = await front.open(worker, flags=(*SECONDLY, "--tool-call-parser", "qwen"))
    answer = (await ask(client, tools=[WEATHER])).choices[0]
    (call,) = answer.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "get_weather",
        {"city": "Paris"},
    )
    assert answer.finish_reason == "tool_calls"
    chunks = [chunk async for chunk in await ask(client, tools=[WEATHER], stream=True)]
    calls = [call for each in chunks for call in each.choices[0].delta.tool_calls or ()]
    assert calls[0].function.name == "get_weather"
    arguments = "".join(call.function.arguments or "" for call in calls)
    assert json.loads(arguments) == {"city": "Paris"}


async def test_a_full_worker_loses_no_request(front: Front) -> None:
    """UNAVAILABLE before the first token: the gateway asks the other worker."""
    limits = {"max_batch_size": 1, "max_queued_requests": 1}
    full = await front.worker(files_of(endless, is_stepped=True), **limits)
    free = await front.worker(files_of(says("hello")))
    client = await front.open(full, free, flags=("--policy", "round_robin"))
    taken = [full.stub.Generate(request(request_id=str(number))) for number in range(2)]
    await until(lambda: full.server.app._generations.num_in_flight == 2)
    for number in range(NUM_REQUESTS):
        answer = await ask(client, f"{number} hi")
        assert answer.choices[0].message.content == "hello"
    # Both log where the one that was started last does.
    assert ("UNAVAILABLE", "QUEUE_FULL") in ends(free)
    for call in taken:
        call.cancel()


async def test_a_model_that_fails_at_once(front: Front) -> None:
    """INTERNAL before the first token is an error 500 at once: nobody tries it everywhere."""
    worker = await front.worker(files_of(endless, is_stepped=True))
    client = await front.open(worker)
    worker.server.model.step_errors.append(RuntimeError("broken"))
    worker.server.model.steps.release(1)
    with pytest.raises(openai.InternalServerError, match="failed inside the engine"):
        await ask(client)
    await until(lambda: bool(ends(worker)))
    assert ends(worker) == [("INTERNAL", "GENERATION_FAILED")]


async def test_a_step_that_fails(front: Front) -> None:
    """INTERNAL in a stream reaches the client as an error, never as the answer's end."""
    worker = await front.worker(files_of(endless, is_stepped=True))
    client = await front.open(worker)
    release = worker.server.model.steps.release
    # The prefill, and a few tokens: the answer begins with the first.
    release(4)
    chunks = await ask(client, stream=True)
    worker.server.model.step_errors.append(RuntimeError("broken"))
    release(20)
    with pytest.raises(openai.APIError, match="failed inside the engine"):
        assert not [chunk async for chunk in chunks if chunk.choices[0].finish_reason]
