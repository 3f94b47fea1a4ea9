"""A real server process with the demo model, from its first log line to its exit code."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from e2e.server_process import ServerProcess
from mlxpool.v1 import memory_service_pb2 as memory_pb
from mlxpool.v1 import memory_service_pb2_grpc as memory_grpc
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool.v1 import model_service_pb2_grpc as model_grpc

TIMEOUT_S = 120
QUESTION = "Why is the sky blue?"

pytestmark = [pytest.mark.demo_model, pytest.mark.timeout(600)]


def chat_request(text: str = QUESTION, **fields: Any) -> pb.GenerateRequest:
    message = pb.ChatMessage(role=pb.ROLE_USER, content=[pb.ContentPart(text=text)])
    prompt = pb.Prompt(chat=pb.ChatPrompt(messages=[message]))
    greedy = {"sampling": pb.SamplingParams(temperature=0)}
    limits = {"stop": pb.StopConditions(max_tokens=12)}
    return pb.GenerateRequest(**({"model": "demo", "prompt": prompt} | greedy | limits | fields))


def stub(channel: grpc.Channel) -> model_grpc.ModelServiceStub:
    return model_grpc.ModelServiceStub(channel)


def generate(channel: grpc.Channel, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    return list(stub(channel).Generate(request, timeout=TIMEOUT_S))


def text_of(events: list[pb.GenerateResponse]) -> str:
    return "".join(event.delta.text for event in events)


def state(channel: grpc.Channel) -> int:
    return stub(channel).GetModel(pb.GetModelRequest(model="demo"), timeout=TIMEOUT_S).model.state


@pytest.fixture
def fresh(demo_folder: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    """A server of this test's own."""
    with ServerProcess(tmp_path / "log.jsonl") as process:
        yield process


# ---------------------------------------------------------------- serving


def test_tokenizing_loads_no_weights(channel: grpc.Channel) -> None:
    """Counts are what Generate reports; the model stays UNLOADED for them."""
    stub(channel).UnloadModel(pb.UnloadModelRequest(model="demo"), timeout=TIMEOUT_S)
    request = chat_request()
    prompt = request.prompt
    tokens = stub(channel).Tokenize(
        pb.TokenizeRequest(model="demo", prompt=prompt, include_pieces=True), timeout=TIMEOUT_S
    )
    count = stub(channel).CountTokens(
        pb.CountTokensRequest(model="demo", prompt=prompt), timeout=TIMEOUT_S
    )
    assert state(channel) == pb.MODEL_STATE_UNLOADED
    assert b"".join(tokens.pieces).decode() == tokens.rendered_prompt
    assert QUESTION in tokens.rendered_prompt
    finished = generate(channel, request)[-1].finished
    assert finished.usage.prompt_tokens == count.token_count == len(tokens.token_ids)
    assert state(channel) == pb.MODEL_STATE_READY


def test_load_tells_rising_bytes(channel: grpc.Channel) -> None:
    """And the memory figures follow the model in and out."""
    memory = memory_grpc.MemoryServiceStub(channel)

    def usage() -> memory_pb.MemoryUsage:
        return memory.GetMemoryUsage(memory_pb.GetMemoryUsageRequest(), timeout=TIMEOUT_S).usage

    stub(channel).UnloadModel(pb.UnloadModelRequest(model="demo"), timeout=TIMEOUT_S)
    empty = usage()
    assert not empty.models
    events = list(stub(channel).LoadModel(pb.LoadModelRequest(model="demo"), timeout=TIMEOUT_S))
    done = [event.progress.completed_bytes for event in events if event.HasField("progress")]
    assert done == sorted(done)
    assert len(set(done)) > 2
    model = events[-1].finished.model
    assert model.estimated_bytes == pytest.approx(model.resident_bytes, rel=0.05)
    loaded = usage()
    assert loaded.active_bytes - empty.active_bytes == pytest.approx(model.resident_bytes, rel=0.05)
    assert [each.model for each in loaded.models] == ["demo"]
    assert loaded.models[0].resident_bytes == model.resident_bytes
    assert loaded.device_bytes > 2**30
    assert 0 < loaded.limits.pool_bytes <= loaded.device_bytes
    freed = stub(channel).UnloadModel(pb.UnloadModelRequest(model="demo"), timeout=TIMEOUT_S)
    assert freed.was_loaded
    assert freed.freed_bytes == model.resident_bytes
    assert usage().active_bytes - empty.active_bytes < 2**20


def test_answer_makes_sense(channel: grpc.Channel) -> None:
    """The demo model is small, not random."""
    events = generate(
        channel, chat_request("What is the capital of France?", stop=pb.StopConditions())
    )
    assert "Paris" in text_of(events)
    finished = events[-1].finished
    assert finished.finish_reason == pb.FINISH_REASON_STOP
    assert text_of(events) == finished.message.content[0].text
    assert finished.timings.time_to_first_token.ToMilliseconds() > 0


def test_concurrent_requests_are_what_they_are_alone(channel: grpc.Channel) -> None:
    """Eight at once, greedy and seeded ones mixed."""
    requests = [
        chat_request(
            sampling=pb.SamplingParams(temperature=0.8 * (index % 2), seed=index),
            stop=pb.StopConditions(max_tokens=6),
        )
        for index in range(8)
    ]
    expected = [text_of(generate(channel, request)) for request in requests]
    got: dict[int, str] = {}

    def ask(index: int) -> None:
        got[index] = text_of(generate(channel, requests[index]))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert [got[index] for index in range(8)] == expected
    assert len(set(expected)) > 3


def test_extreme_sampling_is_served(channel: grpc.Channel) -> None:
    """What breaks other servers' batches: each runs, and the next request too."""
    for sampling in (
        pb.SamplingParams(top_k=2**31 - 1),
        pb.SamplingParams(top_p=1e-45, temperature=1e-38),
        pb.SamplingParams(xtc_probability=1, xtc_threshold=0, temperature=100),
        pb.SamplingParams(repetition_penalty=100, frequency_penalty=-2, penalty_context_size=1),
        pb.SamplingParams(logit_bias={0: -100, 49151: 100}, min_p=1, seed=-(2**63)),
    ):
        few = pb.StopConditions(max_tokens=3)
        events = generate(channel, chat_request(sampling=sampling, stop=few))
        assert events[-1].HasField("finished")
    greedy = generate(channel, chat_request())
    assert text_of(greedy)


def test_bad_requests_do_not_end_it(channel: grpc.Channel) -> None:
    """A long list of them, then a good one."""
    for request in (
        chat_request(model="nope"),
        pb.GenerateRequest(model="demo", prompt=pb.Prompt(tokens=pb.TokenIds(ids=[2**31 - 1]))),
        pb.GenerateRequest(model="demo", prompt=pb.Prompt(text="x " * 20_000)),
        pb.GenerateRequest(model="demo"),
    ):
        with pytest.raises(grpc.RpcError):
            generate(channel, request)
    assert text_of(generate(channel, chat_request()))


def test_keep_alive_unloads(channel: grpc.Channel, server_process: ServerProcess) -> None:
    """0s: when it becomes idle, by itself."""
    generate(channel, chat_request())
    num_unloads = server_process.log().count('"model.unloaded"')
    generate(channel, chat_request(keep_alive=Duration()))
    server_process.wait_for("model.expired")
    # The next request waits for the unload that is under way, and loads it again.
    generate(channel, chat_request())
    assert server_process.log().count('"model.unloaded"') == num_unloads + 1
    assert state(channel) == pb.MODEL_STATE_READY


def test_log_is_json_without_prompts(channel: grpc.Channel, server_process: ServerProcess) -> None:
    """Every line of it, libraries' too; one for each call."""
    generate(channel, chat_request("pineapple pizza", generation_id="logged"))
    line = server_process.wait_for("rpc.finished", generation_id="logged")
    assert line["status"] == "OK"
    assert line["completion_tokens"] == 12
    assert 0 < line["ttft_s"] < line["duration_s"]
    assert "pineapple" not in server_process.log()
    levels = {event["level"] for event in server_process.events()}
    assert levels <= {"info"}, [e for e in server_process.events() if e["level"] != "info"]


# ---------------------------------------------------------------- start and stop


def test_sigterm_lets_streams_finish(fresh: ServerProcess) -> None:
    """The stream in flight ends by itself, new ones are refused, the exit code is 0."""
    with grpc.insecure_channel(fresh.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        events = iter(
            stub(channel).Generate(
                chat_request(stop=pb.StopConditions(max_tokens=25, ignore_eos=True)),
                timeout=TIMEOUT_S,
            )
        )
        seen = [next(events)]
        while not seen[-1].HasField("delta"):
            seen.append(next(events))
        fresh.signal(signal.SIGTERM)
        fresh.wait_for("server.draining")
        status = health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status
        assert status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as refused:
            generate(channel, chat_request())
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        seen += list(events)
        assert seen[-1].finished.usage.completion_tokens == 25
    assert fresh.wait() == 0
    stopped = fresh.wait_for("server.stopped")
    assert (stopped["drained"], stopped["engine_stopped"]) == (True, True)


def test_seed_repeats_after_a_restart(fresh: ServerProcess, channel: grpc.Channel) -> None:
    """Two processes, one seed, one text."""
    request = chat_request(sampling=pb.SamplingParams(temperature=1.0, seed=-42))
    with grpc.insecure_channel(fresh.address) as other:
        assert text_of(generate(other, request)) == text_of(generate(channel, request))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_it_at_once(fresh: ServerProcess, number: signal.Signals) -> None:
    """With 128 plus its number, whatever still runs."""
    with grpc.insecure_channel(fresh.address) as channel:
        endless = pb.StopConditions(max_tokens=2000, ignore_eos=True)
        events = iter(stub(channel).Generate(chat_request(stop=endless), timeout=TIMEOUT_S))
        while not next(events).HasField("delta"):
            pass
        fresh.signal(number)
        fresh.wait_for("server.draining")
        fresh.signal(number)
        assert fresh.wait() == 128 + number


def test_taken_port(server_address: str, tmp_path: Path) -> None:
    """Exit code 69, and a line that names the address."""
    with ServerProcess(tmp_path / "log.jsonl", "--listen", server_address) as second:
        assert second.wait() == os.EX_UNAVAILABLE
        assert f"cannot listen on {server_address}" in second.log()


def test_unix_socket(demo_folder: Path, tmp_path: Path) -> None:
    """It is served, and gone after the exit."""
    path = tmp_path / "mlxpool.sock"
    with ServerProcess(tmp_path / "log.jsonl", "--listen", f"unix:{path}") as process:
        process.wait_for("server.listening")
        with grpc.insecure_channel(f"unix:{path}") as channel:
            assert state(channel) == pb.MODEL_STATE_UNLOADED
        process.signal(signal.SIGINT)
        assert process.wait() == 0
    with socket.socket(socket.AF_UNIX) as probe:
        assert probe.connect_ex(str(path)) != 0
