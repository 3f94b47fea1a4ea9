"""Arguments to requests: what is sent, what is left unset, what is refused before it is sent."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_client import ChatMessage, GenerateOptions, Priority, Role, ToolCall
from mlxpool_client.durations import to_duration, to_seconds
from mlxpool_client.requests import generate_request


def test_what_is_not_given_is_not_sent() -> None:
    """Without options only the model and the prompt are set: the rest is the server's default."""
    request = generate_request("demo", "hi")
    assert request.prompt.text == "hi"
    assert request.sampling == pb.SamplingParams()
    assert request.stop == pb.StopConditions()
    assert not request.HasField("keep_alive")
    assert request.priority == pb.PRIORITY_UNSPECIFIED


def test_an_explicit_zero_is_sent() -> None:
    """temperature=0 and max_tokens=0 are values, not "unset"."""
    request = generate_request("demo", "hi", temperature=0, max_tokens=0, keep_alive_s=0)
    assert request.sampling.HasField("temperature")
    assert request.stop.HasField("max_tokens")
    assert request.HasField("keep_alive")


def test_every_option_is_sent() -> None:
    """Each option lands in its field."""
    request = generate_request(
        "demo",
        None,
        token_ids=[1, 2],
        adapter="a",
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        penalty_context_size=7,
        xtc_probability=0.5,
        xtc_threshold=0.25,
        logit_bias={5: -1.0},
        seed=-9,
        max_tokens=10,
        max_reasoning_tokens=4,
        stop=["a", "b"],
        stop_token_ids=[2],
        ignore_eos=True,
        max_duration_s=1.5,
        final_only=True,
        include_token_ids=True,
        top_logprobs=0,
        generation_id="g",
        priority=Priority.HIGH,
        keep_alive_s=60,
        require_loaded=True,
        disable_prompt_cache=True,
        regex="a",
    )
    assert list(request.prompt.tokens.ids) == [1, 2]
    set_in_sampling = {field.name for field, _ in request.sampling.ListFields()}
    assert set_in_sampling == set(pb.SamplingParams.DESCRIPTOR.fields_by_name)
    set_in_stop = {field.name for field, _ in request.stop.ListFields()}
    assert set_in_stop == set(pb.StopConditions.DESCRIPTOR.fields_by_name)
    set_in_output = {field.name for field, _ in request.output.ListFields()}
    assert set_in_output == set(pb.OutputOptions.DESCRIPTOR.fields_by_name)
    assert request.priority == pb.PRIORITY_HIGH
    assert request.stop.max_duration.nanos == 500_000_000
    unset = set(pb.GenerateRequest.DESCRIPTOR.fields_by_name) - {
        field.name for field, _ in request.ListFields()
    }
    assert not unset


@pytest.mark.parametrize(
    ("options", "kind", "value"),
    [
        ({"json_object": True}, "json_object", pb.JsonObject()),
        ({"json_schema": {"b": 1, "a": 2}}, "json_schema", '{"b": 1, "a": 2}'),
        ({"json_schema": "{}"}, "json_schema", "{}"),
        ({"regex": "a"}, "regex", "a"),
        ({"lark": "l"}, "grammar", pb.Grammar(syntax=pb.GRAMMAR_SYNTAX_LARK, source="l")),
        ({"gbnf": "g"}, "grammar", pb.Grammar(syntax=pb.GRAMMAR_SYNTAX_GBNF, source="g")),
        ({"choices": ["a", "b"]}, "choices", pb.Choices(values=["a", "b"])),
    ],
)
def test_each_constraint(options: Any, kind: str, value: object) -> None:
    """Under its own name; a schema's keys keep their order."""
    constraint = generate_request("demo", "hi", **options).constraint
    assert constraint.WhichOneof("kind") == kind
    assert getattr(constraint, kind) == value


def test_one_constraint_at_a_time() -> None:
    """Two of them are a mistake of the caller's."""
    with pytest.raises(TypeError, match="json_object, regex"):
        generate_request("demo", "hi", json_object=True, regex="a")


def test_one_stop_string_is_one_sequence() -> None:
    """A str is taken as one stop sequence, not as its characters."""
    assert list(generate_request("demo", "hi", stop="END").stop.sequences) == ["END"]


def test_messages_may_be_dicts_or_typed() -> None:
    """Both forms of a message give the same request."""
    typed = generate_request(
        "demo", None, messages=[ChatMessage(Role.SYSTEM, "be brief"), ChatMessage(Role.USER, "hi")]
    )
    plain = generate_request(
        "demo",
        None,
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
    )
    assert typed == plain
    assert plain.prompt.chat.messages[1].role == pb.ROLE_USER
    assert plain.prompt.chat.messages[1].content[0].text == "hi"


def test_an_assistants_message_goes_back_as_it_came() -> None:
    """Reasoning and tool calls of an answer are part of the next turn's request."""
    answer = ChatMessage(Role.ASSISTANT, "", "hm", (ToolCall("c1", "add", "{}"),))
    request = generate_request(
        "demo",
        None,
        messages=[answer, {"role": "tool", "content": "3", "tool_call_id": "c1"}],
        enable_reasoning=False,
    )
    first, second = request.prompt.chat.messages
    assert (first.reasoning, first.tool_calls[0].name) == ("hm", "add")
    assert not first.content
    assert (second.role, second.tool_call_id) == (pb.ROLE_TOOL, "c1")
    assert request.prompt.chat.HasField("enable_reasoning")


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (None, {}),
        ("hi", {"messages": []}),
        ("hi", {"token_ids": [1]}),
        (None, {"messages": [], "token_ids": [1]}),
        ("hi", {"continue_final_message": True}),
        ("hi", {"temprature": 1.0}),
        (None, {"messages": [{"role": "user", "content": ["hi"]}]}),
    ],
)
def test_wrong_arguments_are_type_errors(prompt: str | None, options: Any) -> None:
    """Not exactly one input, a mistyped option and a content that is no text are refused."""
    with pytest.raises(TypeError):
        generate_request("demo", prompt, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"messages": [{"role": "robot", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "hi", "name": "Bob"}]},
        {"messages": [{"content": "hi"}]},
        {"token_ids": [2**40]},
        {"token_ids": [1], "keep_alive_s": -1},
        {"token_ids": [1], "max_duration_s": math.nan},
    ],
)
def test_values_that_cannot_be_sent_are_value_errors(options: GenerateOptions) -> None:
    """Unknown roles and keys, numbers out of range: nothing is dropped silently."""
    with pytest.raises(ValueError):
        generate_request("demo", None, **options)


@pytest.mark.parametrize("seconds", [0.0, 0.1, 1.5, 59.999999999, 1e9])
def test_durations_survive_the_wire(seconds: float) -> None:
    """Seconds come back as they went, to the nanosecond."""
    assert to_seconds(to_duration(seconds, "x")) == pytest.approx(seconds, abs=1e-9)


def test_a_duration_never_rounds_into_an_invalid_one() -> None:
    """Just below a second stays below a second: a Duration's nanos end at 999,999,999."""
    assert to_duration(0.9999999999, "x").nanos == 999_999_999
