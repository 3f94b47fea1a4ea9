"""Who holds how many bytes of the pool. Event loop only."""

from __future__ import annotations


class Ledger:
    """Bytes are written down before they are allocated; `limit_bytes` bounds their sum."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._held: dict[object, int] = {}

    @property
    def used_bytes(self) -> int:
        return sum(self._held.values())

    @property
    def free_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)

    def held_by(self, holder: object) -> int:
        return self._held.get(holder, 0)

    def hold(self, holder: object, num_bytes: int) -> None:
        """Set what `holder` holds. The caller has made sure that it fits."""
        if num_bytes > 0:
            self._held[holder] = num_bytes
        else:
            self._held.pop(holder, None)

    def release(self, holder: object) -> int:
        """Return how many bytes became free."""
        return self._held.pop(holder, 0)

    def hand_over(self, giver: object, heir: object, num_bytes: int) -> None:
        """Release `giver`, of which up to `num_bytes` go to `heir` and never become free."""
        released = self.release(giver)
        self.hold(heir, self.held_by(heir) + max(0, min(released, num_bytes)))
