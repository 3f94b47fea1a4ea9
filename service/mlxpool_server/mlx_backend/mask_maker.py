"""Makes the masks of a batch's constrained rows while the device works on their logits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from mlxpool_server.engine.backend import Guide
from mlxpool_server.mlx_backend.row_mask import RowMask

# Masks take milliseconds, and llguidance has limits of its own.
MAX_MASK_S = 3.0

_Job = tuple[RowMask, int | None]


class _MaskedRow(Protocol):
    mask: RowMask | None

    @property
    def token(self) -> int: ...


class MaskMaker:
    """Engine thread only; its own thread lives from the first constrained row on."""

    def __init__(self) -> None:
        self._thread: _MakerThread | None = None

    def begin(self, guide: Guide) -> RowMask:
        """The mask of a row's first token will be there when its prompt is read."""
        mask = RowMask(guide)
        self._submit([(mask, None)])
        return mask

    def advance(self, rows: Sequence[_MaskedRow]) -> None:
        """Begin with the masks of the tokens behind these rows' last; returns at once."""
        jobs = [(row.mask, row.token) for row in rows if row.mask is not None]
        if jobs:
            self._submit(jobs)

    def wait(self, rows: Sequence[_MaskedRow]) -> None:
        """Until the masks of these rows are there: one that takes too long ends its own row."""
        for row in rows:
            mask = row.mask
            while mask is not None and not mask.is_made.wait(MAX_MASK_S):
                self._give_up(mask)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.stop()
            self._thread = None

    def _give_up(self, waited_for: RowMask) -> None:
        """Leave the mask that is being made, and its thread; another makes the others."""
        stuck = self._thread
        making = None if stuck is None else stuck.making
        if stuck is None or making is None:
            waited_for.give_up(MAX_MASK_S)
            return
        stuck.is_left = True
        making.give_up(MAX_MASK_S)
        self._thread = _MakerThread(stuck.jobs)

    def _submit(self, jobs: Sequence[_Job]) -> None:
        for mask, _ in jobs:
            mask.is_made.clear()
        if self._thread is None:
            self._thread = _MakerThread(deque(jobs))
        else:
            self._thread.put(jobs)


class _MakerThread:
    def __init__(self, jobs: deque[_Job]) -> None:
        self.jobs = jobs
        self.making: RowMask | None = None
        # Whoever left it made another of the same jobs.
        self.is_left = False
        self._is_woken = threading.Event()
        self._is_woken.set()
        threading.Thread(target=self._run, name="masks", daemon=True).start()

    def put(self, jobs: Sequence[_Job]) -> None:
        self.jobs.extend(jobs)
        # Once for all of them: waking it costs more than a mask does.
        self._is_woken.set()

    def stop(self) -> None:
        self.is_left = True
        self.jobs.clear()
        self._is_woken.set()

    def _run(self) -> None:
        while not self.is_left:
            self._is_woken.wait()
            self._is_woken.clear()
            while (job := self._next()) is not None:
                self.making, token_id = job
                self.making.make(token_id)
                self.making = None

    def _next(self) -> _Job | None:
        try:
            return None if self.is_left else self.jobs.popleft()
        except IndexError:
            return None
