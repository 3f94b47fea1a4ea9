"""Grammars of tool calls, in the forms that models' own templates give them.

Only forms whose arguments are JSON, or hold it: the parsers of the others take more than a grammar
could say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlxpool_server.domain import Constraint, ConstraintSyntax
from mlxpool_server.errors import BadConstraintError
from mlxpool_server.mlx_backend import harmony
from mlxpool_server.mlx_backend.constraints.grammar import JSON_OPTIONS, quoted
from mlxpool_server.mlx_backend.parameter_kinds import (
    kinds_of,
    resolved,
    values_of,
    without_null,
)

_NEW_LINE = quoted("\n")
_FIELD = "prompt.chat.tools"
# Of parameters in Qwen's XML: those whose JSON its parser reads, alone and in a list of types.
_KINDS = frozenset({"object", "array", "integer", "number", "boolean", "null"})
_LITERALS = frozenset({"string", "integer", "number", "null"})
# Compiling takes memory and time in proportion.
MAX_GRAMMAR_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Calls:
    """What has to be called. `tools` are described as templates know them."""

    tools: Sequence[dict[str, Any]]
    # One call, or one after the other.
    is_one: bool
    # How Lark names the tokens of a marker.
    marker: Callable[[str], str]

    def repeated(self, separator: str) -> str:
        return "call" if self.is_one else f"call ({separator} call)*"

    def each(self, write: Callable[[str, str, dict[str, Any]], list[str]]) -> list[str]:
        """The rule `tool`, and what `write` returns for (rule, name, parameters) of each tool."""
        rules = [f"tool_{index}" for index in range(len(self.tools))]
        lines = [f"tool: {' | '.join(rules)}"]
        for rule, tool in zip(rules, self.tools, strict=True):
            function = tool["function"]
            lines += write(rule, function["name"], function["parameters"])
        return lines


def _in_tags(calls: Calls) -> list[str]:
    start, end = calls.marker("<tool_call>"), calls.marker("</tool_call>")
    return [
        f"start: {calls.repeated(_NEW_LINE)}",
        f"call: {start} {_NEW_LINE} tool {_NEW_LINE} {end}",
    ]


def _json_tools(calls: Calls) -> list[str]:
    r"""<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>: Qwen, Hermes."""
    return [*_in_tags(calls), *calls.each(_object)]


def _mistral(calls: Calls) -> list[str]:
    """[TOOL_CALLS][{"name": "f", "arguments": {}}]."""
    items = calls.repeated(quoted(", "))
    return [
        f'start: {calls.marker("[TOOL_CALLS]")} "[" {items} "]"',
        "call: tool",
        *calls.each(_object),
    ]


def _qwen3_coder(calls: Calls) -> list[str]:
    r"""<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>."""
    return [*_in_tags(calls), *calls.each(_function_tag)]


def _kimi_k2(calls: Calls) -> list[str]:
    """functions.f:0, the arguments behind it, between marks of each call and of all."""
    marker = calls.marker
    argument_begin = marker("<|tool_call_argument_begin|>")

    def write(rule: str, name: str, parameters: dict[str, Any]) -> list[str]:
        return _with_arguments(
            rule, f"{quoted(f'functions.{name}:')} INDEX {argument_begin}", parameters
        )

    start, end = marker("<|tool_calls_section_begin|>"), marker("<|tool_calls_section_end|>")
    return [
        f"start: {start} {'call' if calls.is_one else 'call+'} {end}",
        f"call: {marker('<|tool_call_begin|>')} tool {marker('<|tool_call_end|>')}",
        "INDEX: /[0-9]{1,3}/",
        *calls.each(write),
    ]


def _harmony(calls: Calls) -> list[str]:
    """One call to a message, behind a thought with the message's start: see harmony.py."""
    marker = calls.marker
    begin = f"{marker('<|channel|>')} {quoted('commentary to=functions.')}"
    json_mark = f"{quoted(' ')} {marker('<|constrain|>')} {quoted('json')}"

    def write(rule: str, name: str, parameters: dict[str, Any]) -> list[str]:
        return _with_arguments(
            rule, f"{quoted(name)} {json_mark} {marker('<|message|>')}", parameters
        )

    return [
        f"start: ({marker('<|start|>')} {quoted('assistant')})? {begin} tool",
        *calls.each(write),
    ]


_FORMS: dict[str, Callable[[Calls], list[str]]] = {
    "json_tools": _json_tools,
    "mistral": _mistral,
    "qwen3_coder": _qwen3_coder,
    "kimi_k2": _kimi_k2,
    harmony.PARSER: _harmony,
}


def has_grammar(parser: str) -> bool:
    """`parser`: as in output_format.Family."""
    return parser in _FORMS


def call_constraint(parser: str, calls: Calls) -> Constraint:
    """Only for a parser that has a grammar. Raises: BadConstraintError."""
    grammar = "\n".join(_FORMS[parser](calls)) + "\n"
    size = len(grammar.encode())
    if size > MAX_GRAMMAR_BYTES:
        problem = f"have {size} bytes as a grammar; at most {MAX_GRAMMAR_BYTES} are allowed"
        raise BadConstraintError(_FIELD, problem)
    return Constraint(ConstraintSyntax.LARK, grammar, _FIELD)


def _object(rule: str, name: str, parameters: dict[str, Any]) -> list[str]:
    begin = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
    return _with_arguments(rule, quoted(begin), parameters, quoted("}"))


def _with_arguments(
    rule: str, before: str, parameters: dict[str, Any], after: str = ""
) -> list[str]:
    """A rule with a tool's arguments as JSON, and the rule of the arguments.

    They hold nothing that the tool does not name, unless it says otherwise.
    """
    schema = {"type": "object", "additionalProperties": False, **parameters}
    return [
        f"{rule}: {before} {rule}_arguments {after}".rstrip(),
        _json_rule(f"{rule}_arguments", schema),
    ]


def _function_tag(rule: str, name: str, parameters: dict[str, Any]) -> list[str]:
    """Texts as they are, other values as JSON. Raises: BadConstraintError."""
    required, properties = parameters.get("required", []), parameters.get("properties", {})
    if not (isinstance(required, list) and isinstance(properties, dict)):
        raise BadConstraintError(_FIELD, f"the parameters of {name} are no JSON schema")
    uses, lines = [], []
    for index, (key, schema) in enumerate(properties.items()):
        value = f"{rule}_{index}"
        uses.append(value if key in required else f"{value}?")
        lines += _parameter(value, key, schema, parameters)
    begin = quoted(f"<function={name}>\n")
    return [f"{rule}: {' '.join([begin, *uses, quoted('</function>')])}", *lines]


def _parameter(rule: str, key: str, schema: Any, root: dict[str, Any]) -> list[str]:
    """Raises: BadConstraintError."""
    begin, end = quoted(f"<parameter={key}>\n"), quoted("\n</parameter>\n")
    schema, may_be_null = without_null(schema, root)
    null = f" | {quoted('null')} {end}" if may_be_null else ""
    text = resolved(schema, root)
    if choices := _texts(text):
        if any(choice.lower() == "null" for choice in choices):
            raise BadConstraintError(_FIELD, f"{key} may be a text that is read as null")
        texts = " | ".join(map(quoted, choices))
        return [f"{rule}: {begin} (({texts}) {end}{null})"]
    if text.get("type") == "string":
        # The lexeme ends with the first such end.
        return [
            f"{rule}: {begin} ({rule}_text{null})",
            f"{rule}_text[suffix={end}]: {_any_text(key, text)}",
        ]
    _check_is_read(key, schema, root)
    return [
        f"{rule}: {begin} ({rule}_json {end}{null})",
        _json_rule(f"{rule}_json", _with_definitions(schema, root)),
    ]


def _texts(schema: dict[str, Any]) -> list[str]:
    """The texts of which a value is one; none for a value of another kind."""
    found = values_of(schema)
    return found if all(isinstance(each, str) for each in found) else []


def _any_text(key: str, schema: dict[str, Any]) -> str:
    for keyword in ("pattern", "format"):
        if keyword in schema:
            problem = f"the {keyword} of {key} cannot be enforced in this model's form of calls"
            raise BadConstraintError(_FIELD, problem)
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if not (isinstance(least, int) and (most == "" or isinstance(most, int))):
        raise BadConstraintError(_FIELD, f"the length of {key} is no whole number")
    return f"/(?s:.){{{least},{most}}}/ & ~/[nN][uU][lL][lL]/"


def _check_is_read(key: str, schema: Any, root: dict[str, Any]) -> None:
    """Raises: BadConstraintError for what mlx-lm's parser hands out as a text."""
    kinds = kinds_of(schema, root)
    several = [kind for kind in kinds if kind != "null"]
    is_one = len(kinds) == 1 and kinds[0] in _KINDS
    if not is_one and not (len(several) > 1 and _LITERALS.issuperset(several)):
        problem = f"{key} needs a type of its own in this model's form of calls"
        raise BadConstraintError(_FIELD, problem)


def _with_definitions(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return {**found, **schema} if isinstance(schema, dict) else found


def _json_rule(rule: str, schema: dict[str, Any]) -> str:
    text = json.dumps({**schema, "x-guidance": JSON_OPTIONS}, ensure_ascii=False)
    return f"{rule}: %json {text}"
