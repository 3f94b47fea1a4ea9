"""Typed values as JSON, one object a line."""

from __future__ import annotations

import dataclasses
import enum
import json
from datetime import datetime


def json_line(value: object, *, event: str = "") -> str:
    r"""Return a value of the client as one line of JSON, with an "event" key if it is named.

    Enums are their names in lower case, times ISO 8601. Bytes are text, with \x escapes for what
    is no UTF-8: a token may split a character.
    """
    if event:
        value = {"event": event, **_fields(value)}
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: object) -> object:
    match value:
        case enum.Enum():
            return value.name.lower()
        case datetime():
            return value.isoformat()
        case bytes():
            return value.decode("utf-8", errors="backslashreplace")
        case _:
            return _fields(value)


def _fields(value: object) -> dict[str, object]:
    # Raises TypeError for anything but a dataclass, as json.dumps expects.
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}  # type: ignore[arg-type] # see above
