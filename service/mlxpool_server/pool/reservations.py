"""Memory for running generations: reserved before they run, for the worst that they can take."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from mlxpool_server.domain import Footprint
from mlxpool_server.errors import PoolMemoryLimitError
from mlxpool_server.pool.eviction import Eviction
from mlxpool_server.pool.ledger import Ledger


@dataclass(slots=True, eq=False)
class Reservation:
    """One generation at its worst: `num_tokens` are the prompt and the longest answer.

    Of texts to embed, `num_tokens` are the longest's and `prompt_tokens` those of all.
    """

    model: str
    footprint: Footprint
    num_tokens: int
    prompt_tokens: int
    # The most tokens of one pass that embeds. None: it generates.
    pass_tokens: int | None = None


@dataclass(slots=True, eq=False)
class _ModelUse:
    """A model's generations; in the ledger it is the holder of their bytes."""

    granted: list[Reservation] = field(default_factory=list)
    waiting: deque[Reservation] = field(default_factory=deque)


class Reservations:
    """Event loop only. A model's generations are served in the order in which they came."""

    def __init__(
        self,
        ledger: Ledger,
        eviction: Eviction,
        *,
        max_batch_size: int,
        prefill_tokens: int,
    ) -> None:
        """`prefill_tokens`: the most prompt tokens that one step works on, all rows together."""
        self._ledger = ledger
        self._eviction = eviction
        self._max_batch_size = max_batch_size
        self._prefill_tokens = prefill_tokens
        self._uses: dict[str, _ModelUse] = {}

    def check_possible(self, wanted: Reservation, weights_bytes: int) -> None:
        """Raises: PoolMemoryLimitError when it would not fit into an otherwise empty pool."""
        required = weights_bytes + self._bytes([wanted])
        if required > self._ledger.next_limit_bytes:
            raise PoolMemoryLimitError(wanted.model, required, self._ledger.next_limit_bytes)

    async def take(
        self, wanted: Reservation, wait_s: Callable[[], float]
    ) -> AsyncGenerator[int, None]:
        """Wait for the bytes; yield the place in line on each change and after `wait_s()`.

        When it ends by itself they are held, until `give_back`.
        Raises: PoolMemoryLimitError when nobody is left whose end could free them.
        """
        use = self._uses.setdefault(wanted.model, _ModelUse())
        use.waiting.append(wanted)
        shown = 0
        try:
            while use.waiting[0] is not wanted or not self._try_grant(use, wanted):
                place = use.waiting.index(wanted) + 1
                # Bytes may come free while the reader holds the last event: look before waiting.
                if place == shown:
                    await self._ledger.changed.wait(wait_s())
                    shown = 0
                else:
                    shown = place
                    yield place
        finally:
            use.waiting.remove(wanted)
            # The next in line may fit, or learn that it is the first now.
            self._ledger.changed.notify()

    def held_bytes(self, model: str) -> int:
        """What the model's generations have reserved, all together."""
        return self._ledger.held_by(self._uses.get(model))

    def wake(self) -> None:
        """Make everyone who waits in `take` look around."""
        self._ledger.changed.notify()

    def give_back(self, reservation: Reservation) -> None:
        """No harm when it was never granted."""
        use = self._uses.get(reservation.model)
        if use is None or reservation not in use.granted:
            return
        use.granted.remove(reservation)
        self._ledger.try_hold(use, self._bytes(use.granted))

    def _try_grant(self, use: _ModelUse, wanted: Reservation) -> bool:
        required = self._bytes([*use.granted, wanted])
        if self._ledger.try_hold(use, required):
            use.granted.append(wanted)
            return True
        missing = required - self._ledger.held_by(use)
        if not self._eviction.start_freeing(missing) and not self._can_wait():
            available = self._ledger.held_by(use) + max(0, self._ledger.unclaimed_bytes)
            raise PoolMemoryLimitError(wanted.model, required, available)
        return False

    def _can_wait(self) -> bool:
        """Somebody's end will free bytes; if all wait for each other, one has to be refused."""
        is_anyone_running = any(use.granted for use in self._uses.values())
        return is_anyone_running or self._eviction.is_anyone_moving

    def _bytes(self, reservations: list[Reservation]) -> int:
        """What these take together: at most a batch and a pass of them run at once."""
        generating = [each for each in reservations if each.pass_tokens is None]
        embedding = [each for each in reservations if each.pass_tokens is not None]
        needed = 0
        if generating:
            num_rows = min(len(generating), self._max_batch_size)
            longest = max(each.num_tokens for each in generating)
            prompts = sum(each.prompt_tokens for each in generating)
            prefill_tokens = min(prompts, self._prefill_tokens)
            needed += generating[-1].footprint.batch_bytes(num_rows, longest, prefill_tokens)
        if embedding:
            longest = max(each.num_tokens for each in embedding)
            most = max(each.pass_tokens or 0 for each in embedding)
            pass_tokens = min(sum(each.prompt_tokens for each in embedding), most)
            needed += embedding[-1].footprint.embedding_bytes(longest, pass_tokens)
        return needed
