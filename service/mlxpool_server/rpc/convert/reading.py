"""Reads single fields of a request, each with its path for the error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from mlxpool_server.errors import InvalidFieldError, NotImplementedFieldError

T = TypeVar("T")

# The longest Duration protobuf allows: callers write it for "never".
NEVER_S = 315_576_000_000


def number(
    message: Message, path: str, default: float, *, low: float, high: float, open_low: bool = False
) -> float:
    """Read an optional number; `path` ends with the field's name."""
    name = path.rpartition(".")[2]
    if not message.HasField(name):
        return default
    return in_range(float(getattr(message, name)), path, low=low, high=high, open_low=open_low)


def in_range(value: float, path: str, *, low: float, high: float, open_low: bool = False) -> float:
    """Return it. Raises: InvalidFieldError outside the range, and for what is no number."""
    above = value > low if open_low else value >= low
    if not (math.isfinite(value) and above and value <= high):
        bracket = "(" if open_low else "["
        raise InvalidFieldError(path, f"is {value:g}; it has to be in {bracket}{low:g}, {high:g}]")
    return value


def count(message: Message, path: str, default: T, *, low: int) -> int | T:
    """Read an optional int32; `path` ends with the field's name."""
    name = path.rpartition(".")[2]
    if not message.HasField(name):
        return default
    value = int(getattr(message, name))
    if value < low:
        raise InvalidFieldError(path, f"is {value}; it has to be at least {low}")
    return value


def seconds(duration: Duration, path: str) -> float:
    """Read a Duration that may not be negative; the longest one means never: math.inf."""
    value = duration.seconds + duration.nanos / 1e9
    if duration.seconds < 0 or duration.nanos < 0:
        raise InvalidFieldError(path, f"is {value:g} s; it may not be negative")
    return math.inf if duration.seconds >= NEVER_S else value


def choice(value: int, choices: Mapping[Any, T], path: str) -> T:
    """Read an enum; what is not among `choices` comes from a newer client or was left unset."""
    if value not in choices:
        raise InvalidFieldError(path, f"has the unknown or unset value {value}")
    return choices[value]


def refuse(message: Message, prefix: str, *names: str) -> None:
    """Raises: NotImplementedFieldError for the first of these fields that is set."""
    for name in names:
        field = message.DESCRIPTOR.fields_by_name[name]
        is_set = message.HasField(name) if field.has_presence else bool(getattr(message, name))
        if is_set:
            raise NotImplementedFieldError(f"{prefix}{name}")


def check_count(values: Sized, most: int, path: str) -> None:
    """Raises: InvalidFieldError for more entries than that."""
    if len(values) > most:
        raise InvalidFieldError(path, f"has {len(values)} entries; at most {most} are allowed")
