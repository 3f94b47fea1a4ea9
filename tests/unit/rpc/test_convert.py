"""Wire to domain and back."""

from __future__ import annotations

import math

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from mlxpool.v1 import memory_service_pb2 as memory_pb
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_server import domain
from mlxpool_server.errors import InvalidFieldError
from mlxpool_server.rpc.convert import chats, reading, requests, responses

LIMITS = requests.RequestLimits(max_stop_sequences=4, max_stop_sequence_chars=8)


def request(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(**({"model": "m", "prompt": pb.Prompt(text="hi")} | fields))


def read(message: pb.GenerateRequest) -> domain.GenerationRequest:
    return requests.generation_request(message, LIMITS)


# ---------------------------------------------------------------- requests


def test_unset_fields_are_the_defaults() -> None:
    """An almost empty request is the domain's own defaults."""
    expected = domain.GenerationRequest(model="m", prompt=domain.TextPrompt("hi"))
    assert read(request()) == expected


def test_explicit_zeros_are_kept() -> None:
    """They are values, never taken for unset."""
    sampling = read(request(sampling=pb.SamplingParams(temperature=0, top_k=0, seed=0))).sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0, 0, 0)


def test_every_field_arrives() -> None:
    """One request with everything that this server honours."""
    message = request(
        generation_id="id",
        priority=pb.PRIORITY_HIGH,
        keep_alive=Duration(seconds=5, nanos=500_000_000),
        require_loaded=True,
        output=pb.OutputOptions(final_only=True, include_token_ids=True),
        stop=pb.StopConditions(
            max_tokens=3,
            sequences=["a", "b"],
            token_ids=[1, 1, 2],
            ignore_eos=True,
            max_duration=Duration(seconds=2),
        ),
    )
    got = read(message)
    assert got.generation_id == "id"
    assert got.priority is domain.Priority.HIGH
    assert got.keep_alive_s == 5.5
    assert got.require_loaded
    assert got.output == domain.OutputOptions(final_only=True, include_token_ids=True)
    assert got.stop == domain.StopConditions(
        max_tokens=3,
        sequences=("a", "b"),
        token_ids=frozenset({1, 2}),
        ignore_eos=True,
        max_duration_s=2.0,
    )


def test_chat_parts_are_joined() -> None:
    """Several text parts are one text; an empty message is one, too."""
    chat = pb.ChatPrompt(
        messages=[
            pb.ChatMessage(
                role=pb.ROLE_DEVELOPER,
                content=[pb.ContentPart(text="a"), pb.ContentPart(text="b")],
            ),
            pb.ChatMessage(role=pb.ROLE_TOOL),
        ]
    )
    assert requests.prompt(pb.Prompt(chat=chat)) == domain.ChatPrompt(
        (
            domain.ChatMessage(domain.Role.DEVELOPER, "ab"),
            domain.ChatMessage(domain.Role.TOOL, ""),
        )
    )


def test_finished_message_is_the_next_turns_input() -> None:
    """GenerationFinished.message can be appended to messages as it is."""
    finished = domain.GenerationFinished(
        domain.FinishReason.STOP, "hello", domain.TokenUsage(1, 1), domain.GenerationTimings()
    )
    message = responses.generation_event(finished).finished.message
    assert requests.prompt(pb.Prompt(chat=pb.ChatPrompt(messages=[message]))) == domain.ChatPrompt(
        (domain.ChatMessage(domain.Role.ASSISTANT, "hello"),)
    )


@pytest.mark.parametrize(
    ("wire", "ours"),
    [
        (pb.Role, chats.ROLES),
        (pb.Priority, requests.PRIORITIES),
        (pb.ModelState, requests.STATES),
    ],
    ids=["Role", "Priority", "ModelState"],
)
def test_every_wire_value_is_known(wire: object, ours: dict[int, object]) -> None:
    """A value the contract gains has to be read here as well."""
    assert set(wire.values()) - {0} == set(ours) - {0}  # type: ignore[attr-defined]


@given(
    low=st.floats(-100, 0),
    value=st.floats(width=32) | st.floats(-200, 200, width=32),
    high=st.floats(1, 100),
)
def test_number_is_in_its_range_or_refused(low: float, value: float, high: float) -> None:
    """NaN and infinities are in no range."""
    message = pb.SamplingParams(temperature=value)
    if low <= value <= high:
        assert reading.number(message, "sampling.temperature", 1, low=low, high=high) == value
    else:
        with pytest.raises(InvalidFieldError):
            reading.number(message, "sampling.temperature", 1, low=low, high=high)


@given(st.integers(0, reading.NEVER_S - 1), st.integers(0, 999_999_999))
def test_durations_are_read_exactly(seconds: int, nanos: int) -> None:
    """To the precision of a float."""
    got = reading.seconds(Duration(seconds=seconds, nanos=nanos), "keep_alive")
    assert got == pytest.approx(seconds + nanos / 1e9)


def test_longest_duration_is_never() -> None:
    """So that callers can write it."""
    assert reading.seconds(Duration(seconds=315_576_000_000), "keep_alive") == math.inf


@pytest.mark.parametrize(("wanted_ms", "got_s"), [(0, 0.1), (1, 0.1), (2500, 2.5), (10**7, 60.0)])
def test_watch_interval_is_clamped(wanted_ms: int, got_s: float) -> None:
    """To 0.1 s and 60 s."""
    message = memory_pb.WatchMemoryUsageRequest()
    message.interval.FromMilliseconds(wanted_ms)
    assert requests.watch_interval_s(message) == got_s
    assert requests.watch_interval_s(memory_pb.WatchMemoryUsageRequest()) == 1.0


# ---------------------------------------------------------------- responses


@pytest.mark.parametrize(
    ("members", "mapping", "wire"),
    [
        (domain.ModelState, responses.STATE_TO_WIRE, pb.ModelState),
        (domain.Capability, responses.CAPABILITY_TO_WIRE, pb.ModelCapability),
        (domain.LoadPhase, responses.LOAD_PHASE_TO_WIRE, pb.LoadPhase),
        (domain.GenerationPhase, responses.PHASE_TO_WIRE, pb.GenerationPhase),
        (domain.FinishReason, responses.REASON_TO_WIRE, pb.FinishReason),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_domain_value_has_a_wire_value(
    members: object, mapping: dict[object, int], wire: object
) -> None:
    """Of the same name, and none is UNSPECIFIED."""
    assert set(mapping) == set(members)  # type: ignore[call-overload]
    for member, value in mapping.items():
        assert wire.Name(value).endswith(f"_{member.name}")  # type: ignore[attr-defined]


@given(st.floats(0, 1e7))
def test_durations_round_trip(value_s: float) -> None:
    """Through the wire and back."""
    message = responses.duration(value_s)
    message.ToJsonString()
    assert message.seconds + message.nanos / 1e9 == pytest.approx(value_s, abs=1e-6)


@given(st.floats(-1e9, 1e13))
def test_timestamps_print(posix_time: float) -> None:
    """Whatever the time: nothing that JSON printers fail on."""
    message = responses.timestamp(posix_time)
    message.ToJsonString()
    if posix_time < responses.LAST_TIMESTAMP_S:
        assert message.seconds + message.nanos / 1e9 == pytest.approx(posix_time, abs=1e-5)


def test_negative_duration_is_zero() -> None:
    """Clocks of two threads may disagree by a little."""
    assert responses.duration(-1e-6).ToNanoseconds() == 0


def test_delta_without_text_has_no_channel() -> None:
    """Only ids came."""
    event = responses.generation_event(domain.GenerationDelta("", 3, (1, 2)))
    assert event.delta.WhichOneof("content") is None
    assert list(event.delta.token_ids) == [1, 2]


def test_empty_output_is_an_empty_message() -> None:
    """No part with an empty text, and no time to a token that never came."""
    finished = domain.GenerationFinished(
        domain.FinishReason.CANCELLED, "", domain.TokenUsage(1, 0), domain.GenerationTimings()
    )
    wire = responses.generation_event(finished).finished
    assert not wire.message.content
    assert not wire.timings.HasField("time_to_first_token")
    assert not wire.HasField("stop_token_id")


def test_first_token_id_is_no_absent_one() -> None:
    """Stop token 0 is reported."""
    finished = domain.GenerationFinished(
        domain.FinishReason.STOP, "", domain.TokenUsage(1, 1), domain.GenerationTimings(),
        stop_token_id=0,
    )  # fmt: skip
    assert responses.generation_event(finished).finished.HasField("stop_token_id")


def test_limits_that_a_device_lacks_stay_unset() -> None:
    """None is not 0."""
    wire = responses.memory_limits(domain.MemoryLimits(pool_bytes=0))
    assert wire.HasField("pool_bytes")
    assert not wire.HasField("wired_bytes")
    assert requests.memory_limits(
        memory_pb.SetMemoryLimitsRequest(limits=wire)
    ) == domain.MemoryLimits(pool_bytes=0)


def test_model_without_readable_files() -> None:
    """What is not known stays unset."""
    wire = responses.model(domain.ModelStatus("m", domain.ModelState.FAILED, error_message="no"))
    assert (wire.name, wire.state, wire.error_message) == ("m", pb.MODEL_STATE_FAILED, "no")
    assert not wire.HasField("load_time")
