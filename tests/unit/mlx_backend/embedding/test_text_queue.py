"""Which texts share a pass: those of like length, of every job in turn."""

from __future__ import annotations

from mlxpool_server.domain import Pooling
from mlxpool_server.mlx_backend.embedding.text_queue import Text, TextQueue


def queue_of(jobs: dict[int, list[int]], *, may_pad: bool = True) -> TextQueue:
    """A queue with texts of these lengths, by job."""
    queue = TextQueue(may_pad=may_pad)
    for slot, lengths in jobs.items():
        queue.add(slot, texts_of(slot, lengths))
    return queue


def texts_of(slot: int, lengths: list[int], pooling: Pooling = Pooling.MEAN) -> list[Text]:
    return [
        Text(slot, place, (0,) * length, pooling, normalize=True)
        for place, length in enumerate(lengths)
    ]


def shape(texts: list[Text]) -> list[tuple[int, int]]:
    """Of each text, whose it is and how long."""
    return [(text.slot, len(text)) for text in texts]


def drained(queue: TextQueue, num_tokens: int) -> list[list[tuple[int, int]]]:
    passes = []
    while texts := queue.take(num_tokens):
        passes.append(shape(texts))
    return passes


def test_like_lengths_share_a_pass() -> None:
    """The longest first; none is padded to more than twice its length."""
    passes = drained(queue_of({1: [50, 90, 100, 45, 70]}), 1000)
    assert passes == [[(1, 100), (1, 90), (1, 70), (1, 50)], [(1, 45)]]


def test_short_texts_share_a_pass_whatever_their_lengths() -> None:
    """A pass is more than its tokens."""
    assert drained(queue_of({1: [1, 32, 8]}), 1000) == [[(1, 32), (1, 8), (1, 1)]]


def test_padding_counts() -> None:
    """Rows times the longest stay within the budget."""
    passes = drained(queue_of({1: [40, 39, 38, 37, 36]}), 100)
    assert [len(texts) for texts in passes] == [2, 2, 1]
    assert all(len(texts) * texts[0][1] <= 100 for texts in passes)


def test_a_text_beyond_the_budget_goes_alone() -> None:
    """It has to go some time."""
    assert drained(queue_of({1: [300, 290]}), 100) == [[(1, 300)], [(1, 290)]]


def test_jobs_take_turns() -> None:
    """One text is not kept waiting by a hundred of another's, and joins them where it fits."""
    queue = queue_of({1: [100] * 6, 2: [500], 3: [100]})
    assert shape(queue.take(200)) == [(1, 100), (1, 100)]
    assert shape(queue.take(200)) == [(2, 500)]
    assert shape(queue.take(200)) == [(3, 100), (1, 100)]
    assert drained(queue, 200) == [[(1, 100), (1, 100)], [(1, 100)]]


def test_long_ones_can_be_left() -> None:
    """While one is in work that is cut, the others' shorter ones come."""
    queue = queue_of({1: [300, 50], 2: [400]})
    assert shape(queue.take(100, longest=100)) == [(1, 50)]
    assert queue.take(100, longest=100) == []
    assert shape(queue.take(100)) == [(2, 400)]


def test_kinds_of_pooling_do_not_mix() -> None:
    """A pass has one kind."""
    queue = TextQueue(may_pad=True)
    queue.add(1, texts_of(1, [10]))
    queue.add(2, texts_of(2, [10], Pooling.CLS))
    assert drained(queue, 100) == [[(1, 10)], [(2, 10)]]


def test_without_padding() -> None:
    """Only texts of one length share a pass."""
    passes = drained(queue_of({1: [9, 10, 9]}, may_pad=False), 100)
    assert passes == [[(1, 10)], [(1, 9), (1, 9)]]


def test_a_job_that_left() -> None:
    """None of its texts comes, and leaving twice is no harm."""
    queue = queue_of({1: [10], 2: [20]})
    queue.remove(2)
    queue.remove(2)
    assert drained(queue, 100) == [[(1, 10)]]
