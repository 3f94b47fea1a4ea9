"""Quantities as operators write them: sizes ("8GiB"), seconds ("never") and plain counts."""

from __future__ import annotations

import math
import re

_UNIT_BYTES = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"(?P<number>\d{1,30}(?:\.\d{1,30})?)\s*(?P<unit>[A-Za-z]*)", re.ASCII)


def parse_bytes(value: object) -> int:
    """Read a size: a number of bytes, or a number with B, KB … TB (1000) or KiB … TiB (1024).

    Raises: ValueError, whose text ends with the remedy.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    unit_bytes = _UNIT_BYTES.get(match["unit"].lower()) if match else None
    if match is None or unit_bytes is None:
        raise ValueError("not a size; write bytes, or a unit as in 8GiB (1024) or 8GB (1000)")
    if "." not in match["number"]:
        # Kept out of floating point, which is exact up to 2**53 only.
        return int(match["number"]) * unit_bytes
    return int(float(match["number"]) * unit_bytes)


def parse_keep_alive(value: object) -> float:
    """Read a keep-alive in seconds; "never" (never expires) is math.inf, 0 unloads when idle.

    Raises: ValueError, whose text ends with the remedy.
    """
    if isinstance(value, str) and value.strip().lower() == "never":
        return math.inf
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]  # what is no number raises
    except (OverflowError, TypeError, ValueError):
        seconds = math.nan
    if math.isnan(seconds) or seconds < 0:
        raise ValueError('not a keep-alive; write seconds, 0 (unload when idle) or "never"')
    return seconds


def reject_bool(value: object) -> object:
    """Pass anything but a bool on: pydantic would read true as the number 1.

    Raises: ValueError.
    """
    if isinstance(value, bool):
        raise ValueError("not a number; write a number, not true or false")  # noqa: TRY004  # pydantic reads ValueError only
    return value
