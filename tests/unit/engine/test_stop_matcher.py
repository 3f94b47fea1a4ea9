"""Stop sequences are found and cut, however the text arrives."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxpool_server.engine.stop_matcher import StopMatcher

# Few letters, so that sequences overlap, nest and repeat.
TEXTS = st.text(alphabet="abc", max_size=30)
SEQUENCES = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)


def _run(chunks: Sequence[str], sequences: Sequence[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(sequences)
    text = "".join(matcher.push(chunk) for chunk in chunks)
    if matcher.matched is None:
        text += matcher.finish()
    return text, matcher.matched


def _reference(text: str, sequences: Sequence[str]) -> tuple[str, str | None]:
    """Letter by letter: the first prefix of the text that ends with a sequence."""
    for end in range(len(text) + 1):
        found = [sequence for sequence in sequences if text[:end].endswith(sequence)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def _split(text: str, cuts: Sequence[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[start:end] for start, end in itertools.pairwise(places)]


@given(TEXTS, SEQUENCES, st.lists(st.integers(0, 30)))
def test_chunks_do_not_matter(text: str, sequences: list[str], cuts: list[int]) -> None:
    """The output and the match are the reference's, however the text is cut into pushes."""
    assert _run(_split(text, cuts), sequences) == _reference(text, sequences)


@given(TEXTS, SEQUENCES, st.lists(st.integers(0, 30)))
def test_no_output_is_taken_back(text: str, sequences: list[str], cuts: list[int]) -> None:
    """What was passed on is, at every moment, the start of the final output."""
    output, _ = _reference(text, sequences)
    matcher = StopMatcher(sequences)
    passed = ""
    for chunk in _split(text, cuts):
        passed += matcher.push(chunk)
        assert output.startswith(passed)


@given(TEXTS, SEQUENCES, TEXTS)
def test_nothing_comes_after_a_match(text: str, sequences: list[str], more: str) -> None:
    """Once a sequence matched, pushes and `finish` give no text and the match stays."""
    matcher = StopMatcher(sequences)
    matcher.push(text)
    matched = matcher.matched
    if matched is not None:
        assert matcher.push(more) == ""
        assert matcher.finish() == ""
        assert matcher.matched == matched


def test_the_start_of_a_sequence_is_held_back() -> None:
    """Text that may become a match waits for the token that decides."""
    matcher = StopMatcher(["</end>"])
    assert matcher.push("so <") == "so "
    assert matcher.push("/e") == ""
    assert matcher.push("go") == "</ego"


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [(["b", "abc"], ("a", "b")), (["ab", "b"], ("", "ab")), ([], ("abc", None))],
)
def test_the_first_end_wins(sequences: list[str], expected: tuple[str, str | None]) -> None:
    """The match that ends first wins, and the longest of those that end together."""
    assert _run(["abc"], sequences) == expected
