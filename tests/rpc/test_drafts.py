"""Tokens that were guessed: what the caller and the operator see of them."""

from __future__ import annotations

from fakes import FakeFiles, FakeModel
from mlxpool.v1 import model_service_pb2 as pb
from rpc.harness import final_text, running_server, text_request
from rpc.metrics_reader import scrape


async def test_usage_and_metric() -> None:
    """Both count the tokens that were guessed and found right, and no others."""
    files = {"m": FakeFiles(model=FakeModel(num_drafted=3))}
    async with running_server(files, metrics_listen="127.0.0.1:0") as server:
        events = await server.generate(text_request("abcdefgh"))
        assert final_text(events) == "abcdefgh"
        # abcd and efgh, the first three of each guessed, and the end.
        assert events[-1].finished.usage.accepted_draft_tokens == 7
        limited = text_request("abcdefgh", stop=pb.StopConditions(max_tokens=2))
        assert final_text(await server.generate(limited)) == "ab"
        assert (await scrape(server))("mlxpool_accepted_draft_tokens_total", model="m") == 7 + 2
