"""What guides allow in each family's own format: thoughts, then an answer or a call."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import pytest

from mlxpool_server.domain import (
    ChatMessage,
    ChatPrompt,
    Constraint,
    ConstraintSyntax,
    FinishReason,
    Role,
    Tool,
)
from mlxpool_server.engine.backend import Guide
from mlxpool_server.errors import BadConstraintError, InvalidFieldError
from mlxpool_server.mlx_backend.constraints.behind_thoughts import has_bit
from mlxpool_server.mlx_backend.tokenizer import MlxTokenizer
from model_families import FAMILIES, WEATHER
from unit.mlx_backend.test_model_families import Read, calls_of, expected_calls, read, run

__all__ = ["read"]

ASK = ChatMessage(Role.USER, "Weather in Paris and Oslo?")
REASONING = [name for name, family in FAMILIES.items() if family.has_reasoning]
FORCEABLE = ["qwen3", "qwen3.6", "mistral", "gpt-oss", "kimi-k2.5"]
ANSWER = Constraint(ConstraintSyntax.REGEX, "It is [0-9]{1,3}\\.")
NOTE = Constraint(
    ConstraintSyntax.JSON_SCHEMA,
    '{"type": "object", "properties": {"note": {"type": "string"}}, "required": ["note"],'
    ' "additionalProperties": false}',
)
CLOCK = Tool(
    "clock",
    "The time",
    json.dumps(
        {
            "type": "object",
            "properties": {
                "zone": {"enum": ["UTC", "CET"]},
                "seconds": {"type": "boolean"},
                "places": {"type": "array", "items": {"$ref": "#/$defs/place"}, "maxItems": 2},
            },
            "required": ["zone", "places"],
            "$defs": {"place": {"enum": [{"n": 1}, {"n": 2}]}},
        }
    ),
)
SHORT_WEATHER = Tool(
    "get_weather",
    "The weather now",
    WEATHER.parameters_json.replace('"string"', '"string", "maxLength": 8'),
)
TOOLS = {tool.name: json.loads(tool.parameters_json) for tool in (SHORT_WEATHER, CLOCK)}


def guide_of(
    tokenizer: MlxTokenizer, chat: ChatPrompt, constraint: Constraint | None = None
) -> Guide:
    guide = tokenizer.compile(constraint, chat, tokenizer.render_chat(chat))
    assert guide is not None
    return guide


def is_allowed(guide: Guide, token_id: int) -> bool:
    return has_bit(guide.allowed(), token_id)


def refused(tokenizer: MlxTokenizer, guide: Guide, output: str) -> str | None:
    """What is left of the output where the guide says no; None: all of it may come."""
    ids = tokenizer.encode(output, add_special_tokens=False)
    for index, token_id in enumerate(ids):
        if not is_allowed(guide, token_id):
            return b"".join(map(tokenizer.piece, ids[index:])).decode()
        guide.advance(token_id)
    return None


def written(tokenizer: MlxTokenizer, guide: Guide, seed: int) -> str:
    """What a model writes that knows nothing but the guide, in short words."""
    rng = random.Random(seed)  # noqa: S311 - a choice of words
    output = ""
    for _ in range(1500):
        bits = guide.allowed()
        ids = [token for token in range(tokenizer.vocab_size) if has_bit(bits, token)]
        ends = [token for token in ids if token in tokenizer.eos_token_ids]
        plain = [token for token in ids if re.fullmatch(rb'[ -~]|"', tokenizer.piece(token))]
        closing = [token for token in ids if tokenizer.piece(token) in (b'"', b"}", b"]", b"\n")]
        if ends and rng.random() < 0.5:
            token = rng.choice(ends)
        elif closing and rng.random() < 0.5:
            token = rng.choice(closing)
        else:
            token = rng.choice(plain or ids)
        output += tokenizer.piece(token).decode()
        if token in tokenizer.eos_token_ids:
            return output
        guide.advance(token)
    raise AssertionError(f"no end: {output}")


@pytest.mark.parametrize("name", REASONING)
def test_thoughts_are_free(name: str, read: Read) -> None:
    """A model thinks what it likes; its answer is what the constraint says."""
    tokenizer, output = read(name), FAMILIES[name].thinking
    chat = ChatPrompt((ASK,))
    assert refused(tokenizer, guide_of(tokenizer, chat, ANSWER), output) is None
    other = output.replace("It is 4.", "It was 4.")
    left = refused(tokenizer, guide_of(tokenizer, chat, ANSWER), other)
    assert left is not None
    assert left.startswith("was 4")


@pytest.mark.parametrize("between", ["", "\n", "\n\n", " \n\n"])
@pytest.mark.parametrize("name", REASONING)
def test_white_space_behind_a_thought(name: str, between: str, read: Read) -> None:
    """It may come, and is no part of the answer, which is valid."""
    tokenizer, chat = read(name), ChatPrompt((ASK,))
    thought, _, _ = FAMILIES[name].thinking.partition("It is")
    output = f'{thought.rstrip()}{between}{{"note": "4"}}'
    assert refused(tokenizer, guide_of(tokenizer, chat, NOTE), output) is None
    _, finished = run(tokenizer, chat, output, is_constrained=True)
    assert finished.text == '{"note": "4"}'
    assert finished.reasoning.strip() == "Hm, 日本."


@pytest.mark.parametrize("name", REASONING)
def test_markers_within_an_answer(name: str, read: Read) -> None:
    """In a constrained answer they are its words: none of it goes elsewhere or is lost."""
    tokenizer, chat = read(name), ChatPrompt((ASK,))
    family = FAMILIES[name]
    thought, _, _ = family.thinking.partition("It is")
    answer = f'{{"note": "{"".join(("a", *family.special, *family.added, "b"))}"}}'
    answer = answer.replace('<|"|>', "")
    ids = [*tokenizer.encode(thought, add_special_tokens=False)]
    # A letter at a time, as a model has to: the markers' own tokens are not allowed.
    ids += [
        each for letter in answer for each in tokenizer.encode(letter, add_special_tokens=False)
    ]
    guide = guide_of(tokenizer, chat, NOTE)
    for token_id in ids:
        assert is_allowed(guide, token_id)
        guide.advance(token_id)
    deltas, finished = run(tokenizer, chat, ids, is_constrained=True)
    assert finished.text == answer
    assert "".join(delta.text for delta in deltas) == answer


@pytest.mark.parametrize("name", REASONING)
def test_no_end_within_a_thought(name: str, read: Read) -> None:
    """What ends by itself has an answer."""
    tokenizer = read(name)
    start = FAMILIES[name].thinking.partition("Hm")[0]
    guide = guide_of(tokenizer, ChatPrompt((ASK,)), ANSWER)
    assert refused(tokenizer, guide, start + "Hm") is None
    assert not any(is_allowed(guide, token) for token in tokenizer.eos_token_ids)


@pytest.mark.parametrize("name", ["qwen3", "glm-4.5", "lfm2.5"])
def test_an_answer_without_a_thought(name: str, read: Read) -> None:
    """Where a thought may begin, the answer may, too; but nothing else."""
    tokenizer = read(name)
    chat = ChatPrompt((ASK,))
    assert refused(tokenizer, guide_of(tokenizer, chat, ANSWER), "It is 4.") is None
    assert refused(tokenizer, guide_of(tokenizer, chat, ANSWER), "Hm") == "Hm"


def test_no_thought_where_none_is_wanted(read: Read) -> None:
    """With enable_reasoning false, and in a message that goes on, the answer comes first."""
    tokenizer = read("qwen3")
    continued = ChatPrompt((ASK, ChatMessage(Role.ASSISTANT, "Well:")), continue_final_message=True)
    for chat in (ChatPrompt((ASK,), enable_reasoning=False), continued):
        assert refused(tokenizer, guide_of(tokenizer, chat, ANSWER), "<think>") is not None
        assert refused(tokenizer, guide_of(tokenizer, chat, ANSWER), "It is 4.") is None


@pytest.mark.parametrize("name", REASONING)
def test_a_forced_end_of_a_thought(name: str, read: Read) -> None:
    """The tokens that end a thought at its limit lead to where the constraint begins."""
    tokenizer = read(name)
    chat = ChatPrompt((ASK,))
    guide = guide_of(tokenizer, chat, ANSWER)
    start = FAMILIES[name].thinking.partition("Hm")[0]
    assert refused(tokenizer, guide, start + "Hm") is None
    for token_id in tokenizer.reasoning_end(chat):
        guide.advance(token_id)
    assert refused(tokenizer, guide, "It is 4.") is None


@pytest.mark.parametrize("name", FORCEABLE)
def test_a_call_as_the_family_writes_it(name: str, read: Read) -> None:
    """Its recorded calls may come, thoughts before them, and nothing but calls."""
    tokenizer, family = read(name), FAMILIES[name]
    output = family.calling.replace("One moment.\n", "").replace("One moment.", "")
    output = output.replace("<|channel|>commentary<|message|><|end|><|start|>assistant", "")
    output = output.replace("</think>\n\n", "</think>")
    chat = ChatPrompt((ASK,), tools=(WEATHER,), must_call=True)
    assert refused(tokenizer, guide_of(tokenizer, chat), output) is None
    _, finished = run(tokenizer, chat, output)
    assert calls_of(finished) == expected_calls(family)
    behind = "</think>" if family.opens_thought else ""
    left = refused(tokenizer, guide_of(tokenizer, chat), f"{behind}It is warm.")
    assert left is not None
    assert left.startswith("It is warm")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", FORCEABLE)
def test_whatever_may_come_is_a_call(name: str, seed: int, read: Read) -> None:
    """Every output that ends by itself calls tools that there are, with arguments that fit."""
    tokenizer = read(name)
    chat = ChatPrompt((ASK,), tools=(SHORT_WEATHER, CLOCK), must_call=True, enable_reasoning=False)
    start = "</think>" if tokenizer.render_chat(chat).rstrip().endswith("<think>") else ""
    guide = guide_of(tokenizer, chat)
    assert refused(tokenizer, guide, start) is None
    output = start + written(tokenizer, guide, seed)
    _, finished = run(tokenizer, chat, output)
    assert finished.finish_reason is FinishReason.TOOL_CALLS, output
    assert not finished.text
    for tool, arguments in calls_of(finished):
        jsonschema.validate(json.loads(arguments), TOOLS[tool])


@pytest.mark.parametrize("name", FORCEABLE)
def test_the_named_tool_once(name: str, read: Read) -> None:
    """It is the one that is called, and one call is all there is."""
    tokenizer = read(name)
    chat = ChatPrompt(
        (ASK,),
        tools=(SHORT_WEATHER, CLOCK),
        must_call=True,
        called_tool="clock",
        enable_reasoning=False,
    )
    start = "</think>" if tokenizer.render_chat(chat).rstrip().endswith("<think>") else ""
    guide = guide_of(tokenizer, chat)
    assert refused(tokenizer, guide, start) is None
    _, finished = run(tokenizer, chat, start + written(tokenizer, guide, 7))
    assert [tool for tool, _ in calls_of(finished)] == ["clock"]


@pytest.mark.parametrize("name", FAMILIES)
def test_who_can_be_forced(name: str, read: Read) -> None:
    """Those whose calls hold JSON."""
    assert read(name).can_force_calls is (name in FORCEABLE)


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"enum": ["a"]}, {"enum": ["b"]}]},
        {"anyOf": [{"enum": ["a"]}, {"enum": ["b"]}, {"type": "null"}]},
        {"type": ["boolean", "integer"]},
        {"type": "string", "enum": ["null", "a"]},
        {"type": "string", "format": "date"},
        {"type": "string", "pattern": "^a+$"},
        {"type": {"integer": 1}},
        {"$ref": "#/$defs/none"},
        {},
    ],
)
def test_values_that_the_xml_form_cannot_carry(schema: dict[str, object], read: Read) -> None:
    """What its parser would hand out as another type is refused, with the parameter's name."""
    parameters = json.dumps({"properties": {"shade": schema}, "required": ["shade"]})
    chat = ChatPrompt((ASK,), tools=(Tool("paint", "", parameters),), must_call=True)
    with pytest.raises(BadConstraintError, match="shade"):
        read("qwen3.6").compile(None, chat, "")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "enum": [1, 2]},
        {"type": "number", "minimum": 0, "maximum": 9},
        {"type": "boolean"},
        {"type": ["integer", "null"]},
        {"type": ["boolean", "null"]},
        {"type": ["integer", "string"], "enum": [7, "seven"]},
        {"enum": [1, 2]},
        {"enum": ["a", None]},
        {"const": 5},
        # What pydantic says of a value that may be left out.
        {"anyOf": [{"type": "integer", "maximum": 9, "minimum": 0}, {"type": "null"}]},
        {"anyOf": [{"type": "boolean"}, {"type": "null"}], "default": None},
        {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]},
        {"anyOf": [{"$ref": "#/$defs/pair"}, {"type": "null"}]},
        {"anyOf": [{"$ref": "#/$defs/word"}, {"type": "null"}]},
        {"oneOf": [{"type": "null"}, {"enum": ["a", "b"], "type": "string"}]},
        {"type": "string", "minLength": 4, "maxLength": 4},
        {"enum": ["a", "b"]},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        {"$ref": "#/$defs/pair"},
        {"$ref": "#/$defs/word"},
        {"$ref": "#/$defs/name"},
        {"anyOf": [{"$ref": "#/$defs/name"}, {"type": "null"}]},
    ],
)
def test_values_in_the_xml_form(schema: dict[str, object], read: Read) -> None:
    """Whatever may be written is read as what the schema says."""
    pair = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    parameters = {
        "type": "object",
        "properties": {"shade": schema},
        "required": ["shade"],
        "$defs": {
            "pair": pair | {"additionalProperties": False},
            "word": {"type": "string", "enum": ["1", "dark"]},
            "name": {"type": "string", "maxLength": 4},
        },
    }
    tool = Tool("paint", "", json.dumps(parameters))
    chat = ChatPrompt((ASK,), tools=(tool,), must_call=True, called_tool="paint")
    tokenizer = read("qwen3.6")
    for seed in range(6):
        guide = guide_of(tokenizer, chat)
        assert refused(tokenizer, guide, "</think>") is None
        _, finished = run(tokenizer, chat, "</think>" + written(tokenizer, guide, seed))
        ((_, arguments),) = calls_of(finished)
        jsonschema.validate(json.loads(arguments), parameters)
    guide = guide_of(tokenizer, chat)
    start = "</think><tool_call>\n<function=paint>\n<parameter=shade>\n"
    left = refused(tokenizer, guide, f"{start}null\n</parameter>\n")
    may_be_null = jsonschema.Draft202012Validator(parameters).is_valid({"shade": None})
    assert (left is None) is may_be_null


def test_parameters_that_cannot_be_enforced(read: Read) -> None:
    """They are refused, with what is wrong, before anything runs."""
    for name, schema, error in (
        (
            "qwen3.6",
            '{"properties": {"a": {"type": "string", "pattern": "b"}}}',
            BadConstraintError,
        ),
        ("qwen3.6", '{"properties": []}', BadConstraintError),
        (
            "qwen3.6",
            '{"properties": {"a": {"type": "string", "maxLength": "b"}}}',
            BadConstraintError,
        ),
        ("qwen3", json.dumps({"description": "long" * 100_000}), BadConstraintError),
        ("qwen3", '{"properties": {"a": {"type": "colour"}}}', BadConstraintError),
        ("qwen3", "[]", InvalidFieldError),
    ):
        chat = ChatPrompt((ASK,), tools=(Tool("paint", "", schema),), must_call=True)
        with pytest.raises(error) as caught:
            read(name).compile(None, chat, "")
        assert "prompt.chat.tools" in str(caught.value)
