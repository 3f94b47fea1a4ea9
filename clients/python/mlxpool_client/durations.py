"""Seconds to and from the wire's Duration."""

from __future__ import annotations

import math

from google.protobuf.duration_pb2 import Duration

# The longest Duration the contract's JSON allows, about 10,000 years: "never".
_MAX_S = 315_576_000_000


def to_duration(seconds: float, name: str) -> Duration:
    """Return `seconds` as a Duration; math.inf becomes the longest one, which means never.

    Raises: ValueError, with `name` in its text, for a negative or undefined number.
    """
    if math.isnan(seconds) or seconds < 0:
        raise ValueError(f"{name} must be 0 or more seconds, not {seconds}")
    if seconds >= _MAX_S:
        return Duration(seconds=_MAX_S)
    whole = int(seconds)
    # Rounding must not carry into a second: 999_999_999 is the field's limit.
    nanos = min(round((seconds - whole) * 1e9), 999_999_999)
    return Duration(seconds=whole, nanos=nanos)


def optional_duration(seconds: float | None, name: str) -> Duration | None:
    """Return None for None, else `to_duration`."""
    return None if seconds is None else to_duration(seconds, name)


def to_seconds(duration: Duration) -> float:
    """Return a Duration as seconds."""
    return duration.seconds + duration.nanos / 1e9
