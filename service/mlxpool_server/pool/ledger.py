"""Who holds how many bytes of the pool. Event loop only."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from mlxpool_server.pool.broadcast import Broadcast


@dataclass(frozen=True, slots=True, eq=False)
class _Claim:
    """A holder that waits for more bytes."""

    holder: object
    num_bytes: int
    granted: asyncio.Future[None]


class Ledger:
    """Bytes are written down before they are allocated; their sum never passes the limit.

    Who wants more than is free waits in line: no late-comer takes what was freed for another.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        # By how much the limit is about to be lowered.
        self._lowering_bytes = 0
        self._held: dict[object, int] = {}
        # Bytes became free, or the limit rose.
        self.changed = Broadcast()
        self._claims: list[_Claim] = []

    @property
    def limit_bytes(self) -> int:
        """The limit in force; one that is being lowered is in force once its bytes are free."""
        return self._limit_bytes

    @property
    def next_limit_bytes(self) -> int:
        return self._limit_bytes - self._lowering_bytes

    @property
    def used_bytes(self) -> int:
        return sum(self._held.values())

    @property
    def unclaimed_bytes(self) -> int:
        """Free bytes that nobody waits for; negative while claims wait for bytes to be freed."""
        return self._free_bytes - sum(claim.num_bytes for claim in self._claims)

    @property
    def _free_bytes(self) -> int:
        return self._limit_bytes - self.used_bytes

    def held_by(self, holder: object) -> int:
        return self._held.get(holder, 0)

    async def hold(self, holder: object, num_bytes: int) -> None:
        """Set what `holder` holds; more than it has now has to be free first.

        The caller has seen to it that enough is on its way, or this waits for ever.
        """
        missing_bytes = num_bytes - self.held_by(holder)
        if missing_bytes <= 0:
            self._set(holder, num_bytes)
            self._grant()
            return
        claim = _Claim(holder, missing_bytes, asyncio.get_running_loop().create_future())
        self._claims.append(claim)
        self._grant()
        try:
            await claim.granted
        finally:
            if claim in self._claims:
                self._claims.remove(claim)
                self._grant()

    def try_hold(self, holder: object, num_bytes: int) -> bool:
        """Set what `holder` holds, if nobody has to wait or be passed over for it."""
        missing_bytes = num_bytes - self.held_by(holder)
        if missing_bytes > max(0, self.unclaimed_bytes):
            return False
        self._set(holder, num_bytes)
        if missing_bytes < 0:
            self._grant()
        return True

    def release(self, holder: object) -> int:
        """Return how many bytes became free."""
        released = self._held.pop(holder, 0)
        self._grant()
        return released

    async def set_limit(self, limit_bytes: int) -> None:
        """Raise it at once; lower it as soon as what is held fits. As with `hold`, see to it."""
        lowering_bytes = self.next_limit_bytes - limit_bytes
        if lowering_bytes <= 0:
            self._limit_bytes -= lowering_bytes
            self._grant()
            return
        reserve = object()
        self._lowering_bytes += lowering_bytes
        try:
            await self.hold(reserve, lowering_bytes)
            self._limit_bytes -= lowering_bytes
        finally:
            self._lowering_bytes -= lowering_bytes
            self.release(reserve)

    def _grant(self) -> None:
        """Serve the line, first come first."""
        while self._claims and self._claims[0].num_bytes <= self._free_bytes:
            claim = self._claims.pop(0)
            self._set(claim.holder, self.held_by(claim.holder) + claim.num_bytes)
            # A waiter who was cancelled in this very moment gives it back by `release`.
            if not claim.granted.done():
                claim.granted.set_result(None)
        self.changed.notify()

    def _set(self, holder: object, num_bytes: int) -> None:
        if num_bytes > 0:
            self._held[holder] = num_bytes
        else:
            self._held.pop(holder, None)
