"""Where in a JSON schema an error is: llguidance says what, not where.

A part of the schema that fails alone with the same words is a better place than the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

# Keywords whose value is a schema, a list of schemas, or schemas by name.
_SCHEMA = (
    "items", "additionalItems", "additionalProperties", "unevaluatedProperties",
    "unevaluatedItems", "contains", "propertyNames", "not", "if", "then", "else",
)  # fmt: skip
_LIST = ("prefixItems", "items", "anyOf", "oneOf", "allOf")
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# A name under $defs that no schema has.
_ROOT = "mlxpool-root"
MAX_CHECKS = 500
MAX_S = 0.5


def find_place(schema: object, error_of: Callable[[object], str]) -> str:
    """Return a JSON pointer ("#/properties/age"); empty when it is the whole schema.

    `error_of`: what is wrong with a schema; empty: nothing.
    """
    error = error_of(schema)
    root = _moved(schema)
    deadline = time.monotonic() + MAX_S
    num_left = MAX_CHECKS
    pointer, here = "", schema
    while True:
        for step, part in _parts(here):
            num_left -= 1
            if num_left < 0 or time.monotonic() > deadline:
                return _shown(pointer)
            if error_of(_alone(part, root)) == error:
                pointer, here = pointer + step, part
                break
        else:
            return _shown(pointer)


def _shown(pointer: str) -> str:
    return f"#{pointer}" if pointer else ""


def _parts(schema: object) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(schema, dict):
        return
    for keyword, value in schema.items():
        if keyword in _SCHEMA and isinstance(value, dict):
            yield f"/{keyword}", value
        elif keyword in _LIST and isinstance(value, list):
            for index, part in enumerate(value):
                if isinstance(part, dict):
                    yield f"/{keyword}/{index}", part
        elif keyword in _BY_NAME and isinstance(value, dict):
            for name, part in value.items():
                if isinstance(part, dict):
                    yield f"/{keyword}/{_escaped(name)}", part


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _alone(part: dict[str, Any], root: object) -> object:
    """A part as a schema of its own: what it refers to comes along."""
    return {**_moved(part), "$defs": {_ROOT: root}}


def _moved(value: Any) -> Any:
    """With references to the root's parts as they are called where `_alone` puts it."""
    if isinstance(value, list):
        return [_moved(each) for each in value]
    if not isinstance(value, dict):
        return value
    moved = {key: _moved(each) for key, each in value.items()}
    reference = value.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = f"#/$defs/{_ROOT}{reference[1:]}"
    return moved
