"""Log-probabilities in deltas: with their tokens, whatever happens to the text."""

from __future__ import annotations

import pytest

from fakes.running_engine import FakeClock, sequence_request
from fakes.tokenizer import EOS, FakeTokenizer
from mlxpool_server.domain import GenerationDelta, TokenCandidate, TokenLogprob
from mlxpool_server.engine.backend import TokenScores
from mlxpool_server.engine.delta_buffer import MOST_LOGPROBS, DeltaBuffer
from mlxpool_server.engine.sequence import Sequence

SCORES = TokenScores(-0.5, ((ord("z"), -0.25), (EOS, -2.0)))


def _told(tokens: list[int], **changes: object) -> list[GenerationDelta]:
    request = sequence_request(top_logprobs=2, piece=FakeTokenizer().piece, **changes)
    sequence = Sequence(0, request, FakeClock())
    sequence.start()
    events = [event for token in tokens for event in sequence.accept(token, SCORES)]
    return [event for event in events if isinstance(event, GenerationDelta)]


def test_bytes_of_all_candidates() -> None:
    """The chosen one's and the others'."""
    (delta,) = _told([ord("a")])
    top = (TokenCandidate(ord("z"), b"z", -0.25), TokenCandidate(EOS, b"", -2.0))
    assert delta.logprobs == (TokenLogprob(TokenCandidate(ord("a"), b"a", -0.5), top),)


@pytest.mark.parametrize(
    ("tokens", "stop"),
    [
        ([*b"abc\xc3\xa9", EOS], ()),
        ([*b"abc\xc3\xa9", EOS], ("abd",)),
        ([*b"abc"], ("abc",)),
    ],
    ids=["half characters", "held back", "cut off"],
)
def test_held_back_text(tokens: list[int], stop: tuple[str, ...]) -> None:
    """Each token's come once and at once, though its text waits or is cut off."""
    deltas = _told(tokens, stop_sequences=stop)
    assert [each.chosen.token_id for delta in deltas for each in delta.logprobs] == tokens
    assert [len(delta.logprobs) for delta in deltas] == [1] * len(tokens)
    assert [delta.completion_tokens for delta in deltas] == list(range(1, len(tokens) + 1))


def test_slow_reader() -> None:
    """No joined delta is larger than a message may be; none is lost, and order stays."""
    buffer = DeltaBuffer()
    count = 3 * MOST_LOGPROBS + 1
    for index in range(count):
        logprob = TokenLogprob(TokenCandidate(index, b"x", -1.0))
        buffer.add(GenerationDelta("x", index + 1, logprobs=(logprob,)))
    deltas = [buffer.take() for _ in range(len(buffer))]
    assert [len(delta.logprobs) for delta in deltas] == [MOST_LOGPROBS] * 3 + [1]
    told = [each.chosen.token_id for delta in deltas for each in delta.logprobs]
    assert told == list(range(count))
    assert [delta.completion_tokens for delta in deltas][-1] == count
