"""Bytes and seconds, as people write and read them."""

from __future__ import annotations

import argparse
import math
import re

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_STEP = 1024
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]?)(?P<kind>I?B)?", re.IGNORECASE)
_MINUTE_S = 60
_HOUR_S = 3600
_DAY_S = 86400


def format_bytes(count: int) -> str:
    """Return a size in the largest fitting unit: "1.5 GiB"."""
    size = float(count)
    for unit in _UNITS[:-1]:
        if abs(size) < _STEP:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= _STEP
    return f"{size:.1f} {_UNITS[-1]}"


def format_seconds(seconds: float) -> str:
    """Return a duration in one or two units: "12 s", "5 min", "2 h 10 min"."""
    whole = round(seconds)
    if whole < _MINUTE_S:
        return f"{whole} s"
    if whole < _HOUR_S:
        return f"{whole // _MINUTE_S} min"
    if whole < _DAY_S:
        return f"{whole // _HOUR_S} h {whole % _HOUR_S // _MINUTE_S} min"
    return f"{whole // _DAY_S} d"


def byte_size(text: str) -> int:
    """Parse "1073741824", "1GiB", "1G" (1024 each) or "1GB" (1000 each), for argparse."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes or 8GiB")
    is_decimal = (match["kind"] or "").upper() == "B" and match["unit"]
    step = 1000 if is_decimal else _STEP
    power = " KMGT".index(match["unit"].upper() or " ")
    return int(float(match["number"]) * step**power) if power else int(float(match["number"]))


def duration_s(text: str) -> float:
    """Parse seconds, for argparse."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def keep_alive_s(text: str) -> float:
    """Parse seconds or "never", for argparse."""
    return math.inf if text == "never" else duration_s(text)
