"""Calls on a thread with a large stack: llguidance goes as deep as a grammar's rules do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

# Of address space: only what is used is taken.
STACK_BYTES = 512 << 20
_lock = threading.Lock()


def on_big_stack(call: Callable[[], T]) -> T:
    """Wait for what `call` returns. Raises: what it raises."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001 - told to the caller, who waits
            done.set_exception(error)

    with _lock:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="constraint", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    return done.result()
