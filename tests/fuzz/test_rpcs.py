"""Random requests for every RPC: no crash, no hang, no INTERNAL, nothing leaked.

Briefly in `scripts/test fuzz`; for long by hand, as docs/development.md says. What it finds goes
into corpus.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.messages import messages
from fuzz.target import HANG_S, METHODS, Reader, Target, running_target
from mlxpool.v1 import model_service_pb2 as pb

CORPUS = json.loads((Path(__file__).parent / "corpus.json").read_text())
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "16"))
PROFILE = settings(
    max_examples=EXAMPLES,
    deadline=None,
    # One server for all of a test's cases: starting one takes longer than a case.
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
READERS = st.builds(
    Reader,
    leaves_after=st.none() | st.none() | st.integers(0, 3),
    deadline_s=st.just(HANG_S) | st.sampled_from([HANG_S, 0.001, 0.01]),
)
PATIENT = Reader()
PARAMETERS = ("", "{}", '{"type": "object"}', "[]", "{", "NaN", '{"a": "\\ud800"}', "[" * 100_000)

pytestmark = pytest.mark.timeout(0 if EXAMPLES > 1000 else 300)


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with running_target() as running:
        yield running


@pytest.mark.parametrize("method", sorted(METHODS))
@PROFILE
@given(request_bytes=st.binary(max_size=200), reader=READERS)
def test_raw_bytes(target: Target, method: str, request_bytes: bytes, reader: Reader) -> None:
    """Whatever arrives instead of a message."""
    target.try_bytes(method, request_bytes, reader)


@pytest.mark.parametrize("method", sorted(METHODS))
@PROFILE
@given(data=st.data(), reader=READERS)
def test_messages(target: Target, method: str, data: st.DataObject, reader: Reader) -> None:
    """Well-formed messages with anything in their fields."""
    message = data.draw(messages(METHODS[method].input_type))
    target.try_bytes(method, message.SerializeToString(), reader)


@pytest.mark.parametrize("method", sorted(METHODS))
@PROFILE
@given(data=st.data())
def test_spoilt_messages(target: Target, method: str, data: st.DataObject) -> None:
    """A message that was cut, or in which bytes were changed."""
    raw = bytearray(data.draw(messages(METHODS[method].input_type)).SerializeToString())
    for _ in range(data.draw(st.integers(0, 3))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    target.try_bytes(method, bytes(raw[: data.draw(st.integers(0, len(raw)))]), PATIENT)


@PROFILE
@given(
    data=st.data(),
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
    reader=READERS,
)
def test_generations(target: Target, data: st.DataObject, text: str, reader: Reader) -> None:
    """Requests that are admitted more often than random ones are."""
    request = pb.GenerateRequest(
        model=data.draw(st.sampled_from(["m", "m", "slow", "bad"])),
        prompt=pb.Prompt(text=text),
        generation_id=data.draw(st.sampled_from(["", "gen-1"])),
        require_loaded=data.draw(st.booleans()),
        priority=data.draw(st.integers(0, 3)),  # type: ignore[arg-type]  # an enum's number
    )
    stop, output = pb.StopConditions.DESCRIPTOR, pb.OutputOptions.DESCRIPTOR
    if data.draw(st.booleans()):
        request.stop.CopyFrom(data.draw(messages(stop)))
    if data.draw(st.booleans()):
        request.output.CopyFrom(data.draw(messages(output)))
    target.try_bytes("/mlxpool.v1.ModelService/Generate", request.SerializeToString(), reader)


@PROFILE
@given(
    data=st.data(),
    text=st.text(st.sampled_from("ab<>() 1é"), min_size=1, max_size=40),
    reader=READERS,
)
def test_chats(target: Target, data: st.DataObject, text: str, reader: Reader) -> None:
    """Chats whose answers have thoughts, calls and what looks like them; tools of any kind."""
    chat = data.draw(messages(pb.ChatPrompt.DESCRIPTOR))
    assert isinstance(chat, pb.ChatPrompt)
    if data.draw(st.booleans()):
        chat.ClearField("messages")
    if data.draw(st.booleans()):
        chat.ClearField("tool_choice")
    if data.draw(st.booleans()):
        chat.template_kwargs.Clear()
        chat.template_kwargs.update({"bare": True})
    for tool in chat.tools:
        if data.draw(st.booleans()):
            tool.name, tool.parameters_json = "add", data.draw(st.sampled_from(PARAMETERS))
    message = pb.ChatMessage(role=pb.ROLE_USER, content=[pb.ContentPart(text=text)])
    chat.messages.insert(0, message)
    request = pb.GenerateRequest(model="m", prompt=pb.Prompt(chat=chat))
    if data.draw(st.booleans()):
        request.stop.max_reasoning_tokens = data.draw(st.integers(-1, 5))
    request.output.final_only = data.draw(st.booleans())
    request.output.include_token_ids = data.draw(st.booleans())
    if data.draw(st.booleans()):
        request.output.top_logprobs = data.draw(st.integers(-1, 21))
    target.try_bytes("/mlxpool.v1.ModelService/Generate", request.SerializeToString(), reader)


@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method, cases in CORPUS.items() for name in cases]
)
def test_corpus(target: Target, method: str, name: str) -> None:
    """Cases that are worth keeping."""
    target.try_bytes(method, bytes.fromhex(CORPUS[method][name]), PATIENT)
