"""Log-probabilities over the wire: one a token, in every channel, with bytes to rebuild text."""

from __future__ import annotations

import math

import pytest

from fakes import EOS, FakeFiles, FakeTokenizer
from mlxpool.v1 import model_service_pb2 as pb
from rpc.harness import Server, chat_prompt, final_text, running_server, text_request
from rpc.metrics_reader import scrape


def deltas_of(events: list[pb.GenerateResponse]) -> list[pb.GenerationDelta]:
    return [event.delta for event in events if event.HasField("delta")]


def logprobs_of(events: list[pb.GenerateResponse]) -> list[pb.TokenLogprob]:
    return [each for delta in deltas_of(events) for each in delta.logprobs]


def bytes_of(events: list[pb.GenerateResponse]) -> bytes:
    return b"".join(each.chosen.raw_bytes for each in logprobs_of(events))


@pytest.mark.parametrize("count", [0, 1, 20])
async def test_as_many_as_asked(server: Server, count: int) -> None:
    """Chosen and alternatives of every token, the one that ends it included."""
    request = text_request("né", output=pb.OutputOptions(top_logprobs=count))
    events = await server.generate(request)
    logprobs = logprobs_of(events)
    assert [each.chosen.token_id for each in logprobs] == [*"né".encode(), EOS]
    assert len(logprobs) == events[-1].finished.usage.completion_tokens
    assert {len(each.top) for each in logprobs} == {count}
    assert logprobs[0].chosen.logprob == pytest.approx(-math.log(2))
    assert bytes_of(events).decode() == "né" == final_text(events)
    # Half a character each.
    assert [each.chosen.text for each in logprobs[1:3]] == ["\ufffd", "\ufffd"]


async def test_none_without_asking(server: Server) -> None:
    """Deltas have none."""
    assert not logprobs_of(await server.generate(text_request()))


async def test_aligned_with_ids(server: Server) -> None:
    """Each delta has those of its own tokens, a stop sequence's that is cut off too."""
    request = text_request(
        "one, STAR, STOP it",
        stop=pb.StopConditions(sequences=["STOP"]),
        output=pb.OutputOptions(top_logprobs=0, include_token_ids=True),
    )
    events = await server.generate(request)
    for delta in deltas_of(events):
        assert [each.chosen.token_id for each in delta.logprobs] == list(delta.token_ids)
    assert final_text(events) == "one, STAR, "
    assert bytes_of(events) == b"one, STAR, STOP"


@pytest.mark.parametrize("text", ["<hm>so(add 1)(sub 2)", "a(what)b", "(add 1)", "<hm", "a(b"])
async def test_every_channel(text: str) -> None:
    """Thoughts, calls, what only looks like one, and their markers: none lost, none twice."""
    files = FakeFiles(tokenizer=FakeTokenizer(speaks_format=True))
    prompt = chat_prompt((pb.ROLE_USER, text))
    prompt.chat.tools.add(name="add")
    async with running_server({"m": files}) as server:
        request = text_request(prompt=prompt, output=pb.OutputOptions(top_logprobs=2))
        events = await server.generate(request)
        assert bytes_of(events).decode() == text
        assert len(logprobs_of(events)) == events[-1].finished.usage.completion_tokens


async def test_metric() -> None:
    """Counts the tokens of those who asked."""
    async with running_server({"m": FakeFiles()}, metrics_listen="127.0.0.1:0") as server:
        await server.generate(text_request("abc"))
        await server.generate(text_request("abc", output=pb.OutputOptions(top_logprobs=0)))
        assert (await scrape(server))("mlxpool_logprob_tokens_total", model="m") == 4
