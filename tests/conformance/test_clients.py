"""Every case through every client: what one language sees, all of them see."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from conformance.conftest import Guarded
from conformance.expectations import check, check_stream, joined
from conformance.programs import CLIENTS, Json, Outcome, Program
from conformance.scripted_server import PATIENCE_S, ScriptedServer
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool.v1 import model_service_pb2_grpc as rpc

STREAMS = {"Generate": pb.GenerateRequest, "LoadModel": pb.LoadModelRequest}

pytestmark = [pytest.mark.demo_model, pytest.mark.timeout(900)]


def read_cases() -> Iterator[Json]:
    for file in sorted((Path(__file__).parent / "cases").glob("*.json")):
        for case in json.loads(file.read_text(encoding="utf-8")):
            yield expanded(case)


def expanded(value: Any) -> Any:
    """Write out what `$repeat` stands for."""
    if isinstance(value, dict):
        if "$repeat" in value:
            text, times = value["$repeat"]
            return text * times
        return {name: expanded(each) for name, each in value.items()}
    return [expanded(each) for each in value] if isinstance(value, list) else value


CASES = list(read_cases())


def test_cases_have_names_of_their_own() -> None:
    """And each says which fact it shows."""
    assert len({case["name"] for case in CASES}) == len(CASES)
    assert all(case["fact"] for case in CASES)


def test_own_tests(client_name: str, built: Path) -> None:
    """Each client's own tests pass; the Python client's are among the unit tests."""
    for check_command in CLIENTS[client_name].checks:
        CLIENTS[client_name].perform(check_command, built)


@pytest.fixture
def call_for(demo_address: str, nobody: str, request: pytest.FixtureRequest) -> Callable[..., Json]:
    def call(case: Json, address: str = "") -> Json:
        call = {
            name: case[name]
            for name in ("method", "request", "timeout_s", "wait_for_ready", "cancel_after_events")
            if name in case
        } | {"method": case.get("method", "Generate"), "timeout_s": case.get("timeout_s", 60)}
        match case.get("server", "demo"):
            case "guarded":
                guarded: Guarded = request.getfixturevalue("guarded")
                call |= {"target": guarded.address, "tls_ca": str(guarded.ca)}
                if "api_key" in case:
                    keys = {"good": guarded.api_key, "bad": guarded.api_key[::-1]}
                    call["api_key"] = keys[case["api_key"]]
            case "nobody":
                call["target"] = nobody
            case _:
                call["target"] = address or demo_address
        return call

    return call


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_case(
    case: Json, program: Program, call_for: Callable[..., Json], demo_address: str
) -> None:
    """The client reports what the case expects."""
    if "attempts" in case:
        with ScriptedServer(case["attempts"]) as server:
            outcome = program.perform(call_for(case, server.address))
            check_scripted(case, server)
    else:
        outcome = program.perform(call_for(case))
    if outcome.end["code"] == "OK" and outcome.events and not outcome.end.get("message"):
        check_stream(outcome.events, case.get("method", "Generate"))
    check(case["expect"], outcome)
    if "cancel_after_events" in case or case["expect"].get("code") == "DEADLINE_EXCEEDED":
        if "cancel_after_events" in case:
            assert len(outcome.events) == case["cancel_after_events"]
        wait_until_idle(demo_address)
    if case["expect"].get("like_stubs"):
        assert essence(outcome.events) == reference(demo_address, case["request"])


def check_scripted(case: Json, server: ScriptedServer) -> None:
    sent = json_format.ParseDict(case["request"], STREAMS[case.get("method", "Generate")]())
    assert len(server.requests) == case["expect"].get("attempts", 1)
    for got in server.requests:
        assert filled(got) == filled(sent)
    if any(attempt.get("hang") for attempt in case["attempts"]):
        assert server.left.wait(PATIENCE_S)


def filled(request: Any) -> Json:
    """As JSON without messages that are there and say nothing."""

    def trimmed(value: Any) -> Any:
        if isinstance(value, dict):
            parts = {name: trimmed(each) for name, each in value.items()}
            return {name: each for name, each in parts.items() if each not in ({}, [])}
        return [trimmed(each) for each in value] if isinstance(value, list) else value

    return trimmed(json_format.MessageToDict(request))  # type: ignore[no-any-return]  # a dict stays one


def wait_until_idle(address: str) -> None:
    """A call that was given up frees its slot."""
    deadline = time.monotonic() + PATIENCE_S
    with grpc.insecure_channel(address) as channel:
        stub = rpc.ModelServiceStub(channel)
        while stub.GetModel(
            pb.GetModelRequest(model="demo"), timeout=PATIENCE_S
        ).model.active_requests:
            assert time.monotonic() < deadline, "the generation still runs"


_references: dict[str, Json] = {}


def reference(address: str, request: Json) -> Json:
    """What a call with the bare stubs brings."""
    key = json.dumps(request)
    if key not in _references:
        message = json_format.ParseDict(request, pb.GenerateRequest())
        with grpc.insecure_channel(address) as channel:
            stream = rpc.ModelServiceStub(channel).Generate(message, timeout=PATIENCE_S)
            _references[key] = essence([json_format.MessageToDict(event) for event in stream])
    return _references[key]


def essence(events: list[Json]) -> Json:
    finished = events[-1]["finished"]
    return {
        "seed": events[0]["started"]["seed"],
        "text": joined(events, "text"),
        "token_ids": [
            token for event in events for token in event.get("delta", {}).get("tokenIds", ())
        ] or list(finished.get("tokenIds", ())),
        "finish_reason": finished["finishReason"],
        "stop_sequence": finished.get("stopSequence", ""),
        "stop_token_id": finished.get("stopTokenId"),
        "prompt_tokens": finished["usage"]["promptTokens"],
        "completion_tokens": finished["usage"]["completionTokens"],
    }  # fmt: skip


def test_outcome_is_judged() -> None:
    """A case that does not hold fails: the checks are not empty."""
    outcome = Outcome([{"started": {"seed": "1"}}, {"finished": {}}], None, {"code": "OK"})
    for wrong in (
        {"code": "NOT_FOUND"}, {"reason": "DRAINING"}, {"kinds": ["started"]}, {"text": "some"},
        {"text_contains": "some"}, {"finish_reason": "STOP"}, {"metadata": ["a"]},
        {"fields": ["model"]}, {"retry_after_s": "some"}, {"raw_bytes": "a"},
        {"events": [{"started": {"seed": "2"}}, {}]}, {"response": {"tokenCount": 1}},
        {"reasoning": "a"},
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            check(wrong, outcome)
    with pytest.raises(AssertionError, match="no such expectation"):
        check({"texts": ""}, outcome)
    with pytest.raises(AssertionError):
        check_stream(outcome.events[:1], "Generate")
