"""The README's examples with tools, against Qwen 3's own template, markers and parser.

The demo model calls no tools, so that only the model's words are made up here.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio
from google.protobuf import json_format

from e2e.readme import at, grpcurl_examples, needs_tools, python_examples
from e2e.server_process import environment
from fakes import FakeFiles, FakeModel
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_server.mlx_backend.tokenizer import MlxTokenizer
from model_families import FAMILIES
from rpc.harness import running_server

TIMEOUT_S = 60
CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
CALLING = f"<think>\nWhere?\n</think>\n\n<tool_call>\n{CALL}\n</tool_call><|im_end|>"
ANSWER = "It is 18 degrees.<|im_end|>"

GRPCURL = [words for words in grpcurl_examples() if needs_tools(words)]
PYTHON = [block for block in python_examples() if "tools=" in block]


@pytest_asyncio.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    """A server whose model calls get_weather, and answers when the prompt has its result."""
    tokenizer = FAMILIES["qwen3"].read(tmp_path)

    def script(prompt: Sequence[int]) -> Iterator[int]:
        has_result = "18 degrees" in text_of(tokenizer, prompt)
        yield from tokenizer.encode(ANSWER if has_result else CALLING, add_special_tokens=False)

    files = FakeFiles(tokenizer=tokenizer, model=FakeModel(script=script), context_length=10_000)
    async with running_server({"qwen3": files}) as server:
        yield server.address


def text_of(tokenizer: MlxTokenizer, token_ids: Sequence[int]) -> str:
    return b"".join(map(tokenizer.piece, token_ids)).decode()


async def output_of(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, env=environment(),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(TIMEOUT_S):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


def test_there_are_examples() -> None:
    """The tests below test nothing when their examples are not found."""
    assert GRPCURL
    assert PYTHON


@pytest.mark.parametrize("words", GRPCURL)
async def test_grpcurl_example(grpcurl: str, address: str, words: list[str]) -> None:
    """Thought and call come apart, and the call is the reason of the end."""
    printed = await output_of(grpcurl, *(at(address, word) for word in words[1:]))
    last = printed[printed.rindex("\n{") :]
    finished = json_format.Parse(last, pb.GenerateResponse()).finished
    assert finished.finish_reason == pb.FINISH_REASON_TOOL_CALLS
    assert finished.message.reasoning == "Where?\n"
    (call,) = finished.message.tool_calls
    assert (call.name, json.loads(call.arguments_json)) == ("get_weather", {"city": "Paris"})


@pytest.mark.parametrize("code", PYTHON)
async def test_python_example(address: str, code: str, tmp_path: Path) -> None:
    """It shows the call, sends its result, and shows the answer."""
    script = tmp_path / "example.py"
    script.write_text(at(address, code), encoding="utf-8")
    printed = await output_of(sys.executable, str(script))
    assert 'get_weather {"city": "Paris"}' in printed
    assert printed.rstrip().endswith("It is 18 degrees.")
