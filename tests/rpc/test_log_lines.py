"""One line a call, with what support needs and nothing that callers wrote."""

from __future__ import annotations

from typing import Any

import pytest

from mlxpool.v1 import memory_service_pb2 as memory_pb
from mlxpool.v1 import model_service_pb2 as pb
from rpc.harness import Reader, Server, chat_prompt, text_request

PROMPT = "correct horse"


async def test_generate(server: Server) -> None:
    """Id, model, status, counts, time to first token and duration."""
    request = text_request(
        PROMPT, generation_id="mine", stop=pb.StopConditions(sequences=["horse"])
    )
    await server.generate(request)
    line = await server.log_line("Generate")
    assert line["generation_id"] == "mine"
    assert line["model"] == "m"
    assert line["status"] == "OK"
    assert line["finish_reason"] == "stop_sequence"
    assert line["prompt_tokens"] == len(PROMPT)
    assert line["completion_tokens"] == len(PROMPT)
    assert 0 < line["ttft_s"] <= line["duration_s"]
    assert line["peer"].startswith("ipv4:127.0.0.1:")


async def test_refused_generate(server: Server) -> None:
    """Status, reason and message of a call that never ran."""
    await_failure = server.models.Generate(text_request(sampling=pb.SamplingParams(top_p=3)))
    with pytest.raises(Exception, match="top_p"):
        await Reader(await_failure).rest()
    line = await server.log_line("Generate")
    assert (line["status"], line["reason"]) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert line["model"] == "m"
    assert "duration_s" in line


async def test_prompts_and_text_are_never_logged(server: Server) -> None:
    """Not by any RPC that has them, at any level."""
    chat = chat_prompt((pb.ROLE_USER, PROMPT))
    await server.generate(text_request(PROMPT))
    await server.generate(text_request(prompt=chat))
    await server.models.Tokenize(pb.TokenizeRequest(model="m", prompt=chat))
    await server.models.CountTokens(pb.CountTokensRequest(model="m", prompt=chat))
    refused = server.models.Generate(text_request(PROMPT * 1000))
    with pytest.raises(Exception, match="context"):
        await Reader(refused).rest()
    await server.log_line("CountTokens")
    assert PROMPT not in repr(server.logs.entries)


UNARY: dict[str, Any] = {
    "ListModels": pb.ListModelsRequest(),
    "GetModel": pb.GetModelRequest(model="m"),
    "UnloadModel": pb.UnloadModelRequest(model="m"),
    "Tokenize": pb.TokenizeRequest(model="m", prompt=pb.Prompt(text="abc")),
    "CountTokens": pb.CountTokensRequest(model="m", prompt=pb.Prompt(text="abc")),
    "GetServerInfo": pb.GetServerInfoRequest(),
    "GetMemoryUsage": memory_pb.GetMemoryUsageRequest(),
    "SetMemoryLimits": memory_pb.SetMemoryLimitsRequest(),
    "ClearCache": memory_pb.ClearCacheRequest(),
    "ResetPeakMemory": memory_pb.ResetPeakMemoryRequest(),
}


@pytest.mark.parametrize("method", UNARY)
async def test_every_call_has_one_line(server: Server, method: str) -> None:
    """With its model where it has one."""
    request = UNARY[method]
    stub = server.memories if hasattr(server.memories, method) else server.models
    await getattr(stub, method)(request)
    line = await server.log_line(method)
    assert line["status"] == "OK"
    assert line["duration_s"] >= 0
    assert line.get("model", "") == getattr(request, "model", "")
    if hasattr(request, "prompt"):
        assert line["prompt_tokens"] == 3


async def test_load_has_one_line(server: Server) -> None:
    """However many messages it streamed."""
    await Reader(server.models.LoadModel(pb.LoadModelRequest(model="m"))).rest()
    line = await server.log_line("LoadModel")
    assert (line["status"], line["model"]) == ("OK", "m")
