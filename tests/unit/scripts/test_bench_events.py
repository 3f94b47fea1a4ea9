"""The benchmark's reader of mlx_lm.server's event streams."""

from __future__ import annotations

import asyncio

import pytest

from benchmark.client_mlx_lm import _read
from benchmark.workload import Answer, Request, RequestError

HEAD = b"HTTP/1.0 200 OK\r\nContent-type: text/event-stream\r\n\r\n"
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 3, "prompt_tokens": 5}}\n\n'


def _event(text: bytes) -> bytes:
    return b'data: {"choices": [{"index": 0, "text": "' + text + b'"}]}\n\n'


async def _answer(pieces: list[bytes], max_tokens: int = 3) -> Answer:
    """Feed the pieces one by one, so that each is read before the next comes."""
    reader = asyncio.StreamReader()
    request = Request("a", (), max_tokens)
    answer = Answer(max_tokens, 0.0)
    reading = asyncio.ensure_future(_read(reader, request, answer))
    for piece in pieces:
        reader.feed_data(piece)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    reader.feed_eof()
    await reading
    return answer


async def test_events_with_text_are_counted() -> None:
    """Neither comments nor empty texts are tokens."""
    pieces = [HEAD, b": keepalive 1/2\n\n", _event(b" a") + _event(b""), _event(b" b"), USAGE]
    answer = await _answer(pieces)
    assert (answer.counts, answer.total) == ([1, 2], 3)


async def test_an_event_in_two_pieces_is_one() -> None:
    """Wherever it is cut."""
    event = _event(b" a")
    for cut in range(1, len(event)):
        answer = await _answer([HEAD, event[:cut], event[cut:], USAGE])
        assert answer.counts == [1]


async def test_a_text_that_looks_like_an_event_is_no_second_one() -> None:
    """Its quotes are escaped."""
    answer = await _answer([HEAD, _event(rb"\"text\": \"x"), USAGE])
    assert answer.counts == [1]


async def test_a_short_answer_is_refused() -> None:
    """Three tokens where four were asked for."""
    with pytest.raises(RequestError, match="3 tokens instead of 4"):
        await _answer([HEAD, _event(b" a"), USAGE], max_tokens=4)


async def test_a_stream_without_an_end_is_refused() -> None:
    """The server went away."""
    with pytest.raises(RequestError, match="without its usage"):
        await _answer([HEAD, _event(b" a")])


async def test_an_error_of_the_server_is_shown() -> None:
    """With its status and text."""
    with pytest.raises(RequestError, match="no such model"):
        await _answer([b"HTTP/1.0 404 Not Found\r\n\r\n", b'{"error": "no such model"}'])
