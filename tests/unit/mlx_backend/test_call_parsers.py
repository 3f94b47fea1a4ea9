"""Tool calls are read in a process that can be stopped, by every parser that mlx-lm has."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import mlx_lm.tool_parsers
import pytest

from mlxpool_server.mlx_backend.call_parsers import ID_CHARS, CallParsers
from mlxpool_server.mlx_backend.template_renderer import (
    CALL_LIMIT_S,
    GRACE_S,
    CallError,
    TemplateRenderer,
)


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    renderer.close()


def test_every_parser_of_mlx_lm_is_there() -> None:
    """One that a release adds is taken in; harmony is ours."""
    (folder,) = mlx_lm.tool_parsers.__path__
    names = {path.stem for path in Path(folder).glob("*.py")} - {"__init__"}
    assert CallParsers().names == names | {"harmony"}


def test_a_call_is_read(renderer: TemplateRenderer) -> None:
    """It gets an id when the model gave none."""
    text = '{"name": "f", "arguments": {"a": "é"}}'
    (call,) = renderer.read_calls("json_tools", text, None)
    assert (call.name, call.arguments_json) == ("f", '{"a": "é"}')
    assert len(call.id) == ID_CHARS
    assert call.id.isalnum()


def test_what_may_be_null_is_read_as_what_it_is(renderer: TemplateRenderer) -> None:
    """In a form of calls whose values are bare text, a parser has only the schema to go by."""
    optional = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    parameters = {"properties": {"a": optional, "b": optional}}
    tools = [{"function": {"name": "f", "parameters": parameters}}]
    values = "<parameter=a>\n5\n</parameter>\n<parameter=b>\nnull\n</parameter>\n"
    text = f"<function=f>\n{values}</function>"
    (call,) = renderer.read_calls("qwen3_coder", text, tools)
    assert json.loads(call.arguments_json) == {"a": 5, "b": None}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        "3",
        '{"arguments": {}}',
        '{"name": 3, "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "no JSON"}',
        "[" * 100_000,
    ],
)
def test_what_is_no_call(renderer: TemplateRenderer, text: str) -> None:
    """Whatever a model writes, it is refused in words, and the next call is read."""
    with pytest.raises(CallError):
        renderer.read_calls("json_tools", text, None)
    assert renderer.read_calls("json_tools", '{"name": "f", "arguments": {}}', None)


def test_a_call_that_takes_for_ever_is_given_up(renderer: TemplateRenderer) -> None:
    """A regular expression that runs wild is stopped with its process; others go on."""
    text = '<atem:invoke name="f">' + "<atem:parameter " * 16_000
    started_at = time.monotonic()
    with pytest.raises(CallError):
        renderer.read_calls("muse_spark", text * 2 + "x", None)
    assert time.monotonic() - started_at < 5 * (CALL_LIMIT_S + GRACE_S)
    assert renderer.read_calls("json_tools", '{"name": "f", "arguments": {}}', None)


@pytest.mark.parametrize("arguments", [{}, {"a": [1, {"b": None}]}, {"text": "</tool_call> {}"}])
def test_harmony(renderer: TemplateRenderer, arguments: object) -> None:
    """GPT-OSS's own form, with and without its constrain token."""
    text = json.dumps(arguments)
    for between in (" <|constrain|>json", "<|channel|>commentary json", ""):
        (call,) = renderer.read_calls("harmony", f"functions.f{between}<|message|>{text}", None)
        assert (call.name, json.loads(call.arguments_json)) == ("f", arguments)


def test_half_a_character_is_escaped(renderer: TemplateRenderer) -> None:
    """Arguments are JSON that the wire can carry, whatever escapes the model wrote."""
    text = '{"name": "f", "arguments": {"a": "\\ud800", "b": "é"}}'
    (call,) = renderer.read_calls("json_tools", text, None)
    assert json.loads(call.arguments_json) == {"a": "\ud800", "b": "é"}
    assert call.arguments_json.encode()


def test_half_a_character_is_no_name(renderer: TemplateRenderer) -> None:
    """No caller could have offered such a function."""
    with pytest.raises(CallError):
        renderer.read_calls("json_tools", '{"name": "\\ud800", "arguments": {}}', None)
