"""The JSON types of a tool's parameters, for forms of calls that write values as bare text.

Parsers of such forms go by a parameter's `type` alone. Generators of schemas say `anyOf` for what
may be null, and `$ref` for what has a name.
"""

from __future__ import annotations

from collections import deque
from typing import Any

# A type may refer to itself, and a few of them to each other a million times.
_MAX_PARTS = 64
_UNIONS = ("anyOf", "oneOf")
_KINDS_OF_VALUES = {
    type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string",
    list: "array", dict: "object",
}  # fmt: skip


def kinds_of(schema: Any, root: dict[str, Any]) -> list[str]:
    """The types that a value may have, each once; none where they cannot be told.

    `root`: where references start, the schema of all parameters.
    """
    found: dict[str, None] = {}
    waiting = deque([schema])
    for _ in range(_MAX_PARTS):
        if not waiting:
            return list(found)
        part = resolved(waiting.popleft(), root)
        kinds, parts = _own_kinds(part), _parts(part)
        if not kinds and not parts:
            return []
        found.update(dict.fromkeys(kinds))
        waiting.extend([] if kinds else parts)
    return []


def without_null(schema: Any, root: dict[str, Any]) -> tuple[Any, bool]:
    """What a value is when it is not null, and whether it may be."""
    found = resolved(schema, root)
    parts = _parts(found)
    others = [part for part in parts if kinds_of(part, root) != ["null"]]
    if len(others) == 1 and len(parts) > 1:
        beside = {key: value for key, value in found.items() if key not in _UNIONS}
        return {**beside, **resolved(others[0], root)}, True
    kinds, values = found.get("type"), found.get("enum")
    if isinstance(kinds, list) and "null" in kinds:
        left = [kind for kind in kinds if kind != "null"]
        return {**found, "type": left[0] if len(left) == 1 else left}, True
    if isinstance(values, list) and None in values:
        return {**found, "enum": [value for value in values if value is not None]}, True
    return schema, False


def with_types(tools: Any) -> Any:
    """The same tools, whose parameters say their types where these can be told.

    `tools`: as templates know them. Parsers read null by themselves.
    """
    if not isinstance(tools, list):
        return tools
    return [_with_types(tool) for tool in tools]


def resolved(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    """What a reference to one of the parameters' definitions stands for."""
    found = schema
    reference = schema.get("$ref") if isinstance(schema, dict) else None
    if isinstance(reference, str):
        _, _, path = reference.partition("#/")
        found = root
        for part in path.split("/"):
            found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def values_of(schema: dict[str, Any]) -> list[Any]:
    """All that a value may be; none where they are not named one by one."""
    found = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return found if isinstance(found, list) else []


def _with_types(tool: Any) -> Any:
    function = tool.get("function") if isinstance(tool, dict) else None
    parameters = function.get("parameters") if isinstance(function, dict) else None
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    if not (isinstance(function, dict) and isinstance(parameters, dict)):
        return tool
    if not isinstance(properties, dict):
        return tool
    typed = {name: _with_type(schema, parameters) for name, schema in properties.items()}
    return {**tool, "function": {**function, "parameters": {**parameters, "properties": typed}}}


def _with_type(schema: Any, root: dict[str, Any]) -> Any:
    kinds = [kind for kind in kinds_of(schema, root) if kind != "null"]
    if not kinds or not isinstance(schema, dict):
        return schema
    return {**schema, "type": kinds[0] if len(kinds) == 1 else kinds}


def _own_kinds(schema: dict[str, Any]) -> list[str]:
    """Those that it says without its parts."""
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return kinds if all(isinstance(kind, str) for kind in kinds) else []
    return [_KINDS_OF_VALUES[type(value)] for value in values_of(schema)]


def _parts(schema: dict[str, Any]) -> list[Any]:
    parts: Any = next((schema[name] for name in _UNIONS if name in schema), [])
    return parts if isinstance(parts, list) and len(parts) <= _MAX_PARTS else []
