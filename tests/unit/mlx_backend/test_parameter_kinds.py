"""What types a parameter's schema allows, however it says so, and that no schema takes long."""

from __future__ import annotations

from typing import Any

import pytest

from mlxpool_server.mlx_backend import parameter_kinds
from mlxpool_server.mlx_backend.parameter_kinds import kinds_of, with_types, without_null

NULL = {"type": "null"}
ROOT: dict[str, Any] = {
    "$defs": {
        "word": {"enum": ["a", "b"]},
        "maybe": {"anyOf": [{"$ref": "#/$defs/word"}, NULL]},
        "itself": {"$ref": "#/$defs/itself"},
        "circle": {"anyOf": [{"$ref": "#/$defs/circle"}, {"type": "integer"}]},
        **{f"many{i}": {"anyOf": [{"$ref": f"#/$defs/many{i + 1}"}] * 9} for i in range(30)},
        "many30": {"type": "integer"},
    }
}


@pytest.mark.parametrize(
    ("schema", "kinds"),
    [
        ({"type": "integer"}, ["integer"]),
        ({"type": ["integer", "null"]}, ["integer", "null"]),
        ({"enum": [True, 1, 1.5, "a", None, [], {}, 2]},
         ["boolean", "integer", "number", "string", "null", "array", "object"]),
        ({"const": None}, ["null"]),
        ({"anyOf": [{"type": "integer"}, NULL]}, ["integer", "null"]),
        ({"oneOf": [{"type": "integer"}, {"anyOf": [NULL, {"const": "a"}]}]},
         ["integer", "null", "string"]),
        ({"$ref": "#/$defs/maybe"}, ["string", "null"]),
        ({}, []),
        ({"enum": []}, []),
        ({"type": {"a": 1}}, []),
        ({"anyOf": [{"type": "integer"}, {}]}, []),
        ({"anyOf": "integer"}, []),
        ({"$ref": "#/$defs/none"}, []),
        ({"$ref": "#/$defs/itself"}, []),
        ({"$ref": "#/$defs/circle"}, []),
        ("integer", []),
    ],
)  # fmt: skip
def test_kinds(schema: Any, kinds: list[str]) -> None:
    assert kinds_of(schema, ROOT) == kinds


def test_the_parts_that_are_looked_at_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Definitions that name each other would have 9**30 of them."""
    calls = []
    resolved = parameter_kinds.resolved

    def counted(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        return resolved(*arguments)

    monkeypatch.setattr(parameter_kinds, "resolved", counted)
    assert kinds_of({"$ref": "#/$defs/many0"}, ROOT) == []
    assert without_null({"anyOf": [{"$ref": "#/$defs/many0"}] * 60}, ROOT)[1] is False
    assert len(calls) < 64 * 64


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "integer"}, ({"type": "integer"}, False)),
        ({"anyOf": [NULL, {"type": "integer"}], "title": "a"},
         ({"type": "integer", "title": "a"}, True)),
        ({"$ref": "#/$defs/maybe"}, ({"enum": ["a", "b"]}, True)),
        ({"type": ["string", "null"], "maxLength": 3}, ({"type": "string", "maxLength": 3}, True)),
        ({"type": ["string", "integer", "null"]}, ({"type": ["string", "integer"]}, True)),
        ({"enum": ["a", None]}, ({"enum": ["a"]}, True)),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}, NULL]},
         ({"anyOf": [{"type": "integer"}, {"type": "string"}, NULL]}, False)),
    ],
)  # fmt: skip
def test_what_is_left_without_null(schema: Any, expected: tuple[Any, bool]) -> None:
    assert without_null(schema, ROOT) == expected


def test_tools_say_their_types() -> None:
    """What cannot be told, and whatever is no tool, stays as it is."""
    optional = {"anyOf": [{"type": "integer"}, NULL], "title": "A"}
    parameters = {"properties": {"a": optional, "b": {}, "c": 5}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    typed = {"a": {**optional, "type": "integer"}, "b": {}, "c": 5}
    expected = {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": typed, "required": ["a"]}},
    }
    assert with_types([tool, {"function": 5}, 7]) == [expected, {"function": 5}, 7]
    assert with_types(None) is None
