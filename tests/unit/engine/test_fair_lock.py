"""Two threads that take turns."""

from __future__ import annotations

import threading

from mlxpool_server.engine.fair_lock import FairLock

DEADLINE_S = 10


def test_who_waits_is_next() -> None:
    """However soon the one who let go asks again."""
    lock = FairLock()
    order: list[str] = []

    def wait_for_it() -> None:
        with lock:
            order.append("waiter")

    waiter = threading.Thread(target=wait_for_it)
    with lock:
        waiter.start()
        while not lock.is_wanted:
            pass
    with lock:
        order.append("again")
    waiter.join(DEADLINE_S)
    assert order == ["waiter", "again"]


def test_nobody_wants_it() -> None:
    """Neither while it is free nor while one thread holds it."""
    lock = FairLock()
    assert not lock.is_wanted
    with lock:
        assert not lock.is_wanted


def test_given_back_after_an_error() -> None:
    """The other thread's work goes on."""
    lock = FairLock()
    try:
        with lock:
            raise ValueError
    except ValueError:
        pass
    with lock:
        assert not lock.is_wanted
