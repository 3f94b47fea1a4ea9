"""Sizes and durations for people."""

from __future__ import annotations

import argparse
import math

import pytest

from mlxpool_client.cli import quantities


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 50, "1024.0 TiB"),
    ],
)
def test_sizes_are_written_in_the_largest_unit(count: int, text: str) -> None:
    """A size has one decimal and a binary unit."""
    assert quantities.format_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("17", 17), ("1k", 1024), ("8GiB", 8 << 30), ("1.5G", 3 << 29), ("2 GB", 2 * 10**9)],
)
def test_sizes_are_read_with_units(text: str, count: int) -> None:
    """KiB and K are 1024, KB is 1000."""
    assert quantities.byte_size(text) == count


@pytest.mark.parametrize("text", ["", "-1", "8 apples", "1e9", "GiB"])
def test_other_sizes_are_refused(text: str) -> None:
    """What is no size is a usage error."""
    with pytest.raises(argparse.ArgumentTypeError):
        quantities.byte_size(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (300, "5 min"), (7800, "2 h 10 min"), (200_000, "2 d")],
)
def test_durations_are_written_short(seconds: float, text: str) -> None:
    """A duration has one or two units."""
    assert quantities.format_seconds(seconds) == text


def test_never_is_a_keep_alive() -> None:
    """A keep-alive is seconds or never; a timeout is seconds only."""
    assert quantities.keep_alive_s("never") == math.inf
    assert quantities.keep_alive_s("0") == 0
    for text in ("never", "nan", "inf", "-1", "soon"):
        with pytest.raises(argparse.ArgumentTypeError):
            quantities.duration_s(text)
