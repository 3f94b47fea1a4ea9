"""Thoughts and tool calls over the wire: channels, reasons, limits, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest

from fakes import FakeFiles, FakeTokenizer
from mlxpool.v1 import model_service_pb2 as pb
from rpc.harness import Server, chat_prompt, failure_of, final_text, running_server, text_request
from rpc.metrics_reader import scrape


@pytest.fixture
async def server() -> AsyncGenerator[Server, None]:
    """Its model repeats the prompt, in which <…> is a thought and (…) a call."""
    files = FakeFiles(tokenizer=FakeTokenizer(speaks_format=True))
    async with running_server({"m": files}) as server:
        yield server


def ask(text: str, *, mode: int = pb.TOOL_MODE_AUTO, **fields: object) -> pb.GenerateRequest:
    prompt = chat_prompt((pb.ROLE_USER, text))
    prompt.chat.tools.add(name="add")
    prompt.chat.tool_choice.mode = pb.ToolMode.ValueType(mode)
    prompt.chat.template_kwargs.update({"bare": True})
    return text_request(**({"prompt": prompt} | fields))


async def test_channels(server: Server) -> None:
    """Thought, text and calls in order, folded in `finished`, which names the calls as its end."""
    events = await server.generate(ask("<hm>so(add 1)(sub 2)"))
    finished = events[-1].finished
    assert finished.finish_reason == pb.FINISH_REASON_TOOL_CALLS
    assert (finished.message.reasoning, final_text(events)) == ("hm", "so")
    calls = [(call.id, call.name, call.arguments_json) for call in finished.message.tool_calls]
    assert calls == [("id-add", "add", "1"), ("id-sub", "sub", "2")]
    deltas = [event.delta for event in events if event.HasField("delta")]
    kinds = [delta.WhichOneof("content") for delta in deltas]
    assert sorted(set(kinds), key=kinds.index) == ["reasoning", "text", "tool_call"]
    fragments = [delta.tool_call for delta in deltas if delta.HasField("tool_call")]
    assert [(each.index, each.name) for each in fragments] == [(0, "add"), (1, "sub")]
    assert finished.usage.reasoning_tokens == 2


async def test_malformed_call(server: Server) -> None:
    """It is text, in deltas and in the end, and the end is the model's own."""
    events = await server.generate(ask("a(what)b"))
    assert final_text(events) == "a(what)b"
    assert "".join(event.delta.text for event in events) == "a(what)b"
    assert events[-1].finished.finish_reason == pb.FINISH_REASON_STOP


@pytest.mark.parametrize("choice", [{"mode": pb.TOOL_MODE_REQUIRED}, {"tool_name": "add"}])
async def test_forced_calls(server: Server, choice: dict[str, Any]) -> None:
    """The model's row has a guide, which is counted."""
    request = ask("(add 1)")
    request.prompt.chat.tool_choice.CopyFrom(pb.ToolChoice(**choice))
    events = await server.generate(request)
    assert events[-1].finished.finish_reason == pb.FINISH_REASON_TOOL_CALLS
    (batch,) = server.model.batches
    assert None not in batch.guides.values()


async def test_a_model_that_cannot_be_forced(server: Server) -> None:
    """CAPABILITY_MISSING: its calls are in no form that a grammar knows."""
    server.files["m"].tokenizer.can_force_calls = False
    failure = await failure_of(server.models.Generate(ask("(add 1)", mode=pb.TOOL_MODE_REQUIRED)))
    assert failure.reason == "CAPABILITY_MISSING"


@pytest.mark.parametrize(
    ("fields", "tool_choice", "path"),
    [
        ({}, pb.ToolChoice(tool_name="sub"), "prompt.chat.tool_choice.tool_name"),
        ({}, pb.ToolChoice(tool_name=""), "prompt.chat.tool_choice.tool_name"),
        (
            {"stop": pb.StopConditions(ignore_eos=True)},
            pb.ToolChoice(tool_name="add"), "stop.ignore_eos",
        ),
        (
            {"constraint": pb.OutputConstraint(regex="a")},
            pb.ToolChoice(mode=pb.TOOL_MODE_AUTO), "constraint",
        ),
    ],
)  # fmt: skip
async def test_choices_that_cannot_be_kept(
    server: Server, fields: dict[str, Any], tool_choice: pb.ToolChoice, path: str
) -> None:
    """INVALID_ARGUMENT names the field."""
    request = ask("(add 1)", **fields)
    request.prompt.chat.tool_choice.CopyFrom(tool_choice)
    failure = await failure_of(server.models.Generate(request))
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, path)


async def test_forced_without_tools(server: Server) -> None:
    """There is nothing to call."""
    request = ask("(add 1)", mode=pb.TOOL_MODE_REQUIRED)
    request.prompt.chat.ClearField("tools")
    failure = await failure_of(server.models.Generate(request))
    assert failure.field == "prompt.chat.tool_choice.mode"


async def test_no_tools_wanted(server: Server) -> None:
    """With TOOL_MODE_NONE the same words are text."""
    events = await server.generate(ask("(add 1)", mode=pb.TOOL_MODE_NONE))
    assert final_text(events) == "(add 1)"
    assert events[-1].finished.finish_reason == pb.FINISH_REASON_STOP


@pytest.mark.parametrize("limit", [0, 1, 3])
async def test_reasoning_limit(server: Server, limit: int) -> None:
    """A thought has so many tokens, then its end is put in the model's mouth."""
    request = ask("<thinking", stop=pb.StopConditions(max_tokens=9, max_reasoning_tokens=limit))
    finished = (await server.generate(request))[-1].finished
    assert finished.usage.reasoning_tokens == limit
    assert finished.message.reasoning == "thinking"[:limit]


async def test_reasoning_limit_needs_a_chat(server: Server) -> None:
    """Raw text has no thoughts that could be told apart."""
    stop = pb.StopConditions(max_reasoning_tokens=1)
    failure = await failure_of(server.models.Generate(text_request(stop=stop)))
    assert (failure.code, failure.field) == (
        grpc.StatusCode.INVALID_ARGUMENT, "stop.max_reasoning_tokens",
    )  # fmt: skip


async def test_raw_text_is_not_sorted(server: Server) -> None:
    """What looks like a thought in a raw completion is its text."""
    assert final_text(await server.generate(text_request("<hm>a"))) == "<hm>a"


@pytest.mark.parametrize("wish", ["tools", "reasoning", "limit"])
async def test_capability_missing(wish: str) -> None:
    """A model that cannot do it refuses before the first event."""
    prompt = chat_prompt((pb.ROLE_USER, "hi"))
    stop = pb.StopConditions()
    if wish == "tools":
        prompt.chat.tools.add(name="add")
    elif wish == "reasoning":
        prompt.chat.enable_reasoning = True
    else:
        stop.max_reasoning_tokens = 5
    async with running_server() as server:
        failure = await failure_of(server.models.Generate(text_request(prompt=prompt, stop=stop)))
    assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
    assert failure.reason == "CAPABILITY_MISSING"


async def test_calls_are_measured() -> None:
    """Generations by the reason that their callers saw; calls by whether they could be read."""
    files = FakeFiles(tokenizer=FakeTokenizer(speaks_format=True))
    async with running_server({"m": files}, metrics_listen="127.0.0.1:0") as server:
        for text in ("<hm>(add 1)(sub 2)", "(what)", "plain"):
            await server.generate(ask(text))
        await server.generate(text_request(constraint=pb.OutputConstraint(regex="a")))
        seen = await scrape(server)
        assert seen("mlxpool_generations_total", model="m", finish_reason="tool_calls") == 1
        assert seen("mlxpool_generations_total", model="m", finish_reason="stop") == 3
        assert seen("mlxpool_tool_calls_total", model="m", outcome="read") == 2
        assert seen("mlxpool_tool_calls_total", model="m", outcome="malformed") == 1
        assert seen("mlxpool_reasoning_tokens_total", model="m") == 2
        kind = "regular expression"
        assert seen("mlxpool_constrained_generations_total", model="m", constraint=kind) == 1
