"""Who has to leave so that others fit: idle models, least recently used first."""

from __future__ import annotations

from collections.abc import Collection

import structlog

from mlxpool_server.domain import LoadPhase, LoadProgress, ModelState
from mlxpool_server.errors import MemoryInUseError, PoolMemoryLimitError
from mlxpool_server.pool.entry import Entry
from mlxpool_server.pool.ledger import Ledger
from mlxpool_server.pool.prompt_caches import PromptCaches
from mlxpool_server.pool.residency import Residency
from mlxpool_server.pool.unloads import Unloads

log = structlog.get_logger(__name__)


class Eviction:
    """Event loop only. Nobody is evicted for what cannot fit, and nobody more than it takes."""

    def __init__(
        self,
        entries: Collection[Entry],
        ledger: Ledger,
        unloads: Unloads,
        prompt_caches: PromptCaches,
    ) -> None:
        self._entries = entries
        self._ledger = ledger
        self._unloads = unloads
        self._prompt_caches = prompt_caches

    def choose_victims(
        self,
        name: str,
        required_bytes: int,
        *,
        residency: Residency | None = None,
        allow_eviction: bool = True,
    ) -> list[Entry]:
        """Who would leave so that `residency`, or a load to come, holds `required_bytes`.

        Raises: PoolMemoryLimitError, and then nobody was evicted.
        """
        held_bytes = self._ledger.held_by(residency)
        evictable = self._evictable() if allow_eviction else []
        missing_bytes = required_bytes - held_bytes
        available_bytes = self._available_bytes(evictable)
        if missing_bytes > max(0, available_bytes):
            raise PoolMemoryLimitError(name, required_bytes, held_bytes + max(0, available_bytes))
        return self._pick(evictable, missing_bytes)

    async def make_room(self, residency: Residency, required_bytes: int) -> None:
        """Evict until `residency` holds `required_bytes`, and no more than that.

        Raises: PoolMemoryLimitError before anybody is evicted.
        """
        victims = self.choose_victims(
            residency.spec.name,
            required_bytes,
            residency=residency,
            allow_eviction=residency.allow_eviction,
        )
        self._reclaim(required_bytes - self._ledger.held_by(residency))
        if victims:
            residency.evicted_models += tuple(victim.spec.name for victim in victims)
            residency.report(LoadProgress(LoadPhase.EVICTING, total_bytes=required_bytes))
            self._evict(victims)
        await self._ledger.hold(residency, required_bytes)

    def start_freeing(self, missing_bytes: int) -> bool:
        """Evict idle models so that as much comes free. False: not possible, nobody was evicted."""
        evictable = self._evictable()
        if missing_bytes > self._available_bytes(evictable):
            return False
        victims = self._pick(evictable, missing_bytes)
        self._reclaim(missing_bytes)
        self._evict(victims)
        return True

    @property
    def is_anyone_moving(self) -> bool:
        """A model comes or goes: what is free will change."""
        residencies = (entry.residency for entry in self._entries)
        moving = (ModelState.LOADING, ModelState.UNLOADING)
        return any(each is not None and each.state in moving for each in residencies)

    async def set_limit(self, limit_bytes: int) -> tuple[str, ...]:
        """Set the pool's limit; return who was evicted for it.

        Raises: MemoryInUseError, and then nothing has changed.
        """
        evictable = self._evictable()
        missing_bytes = self._ledger.next_limit_bytes - limit_bytes
        available_bytes = self._available_bytes(evictable)
        if missing_bytes > max(0, available_bytes):
            in_use_bytes = self._ledger.next_limit_bytes - available_bytes
            raise MemoryInUseError(limit_bytes, in_use_bytes)
        victims = self._pick(evictable, missing_bytes)
        self._reclaim(missing_bytes)
        self._evict(victims)
        await self._ledger.set_limit(limit_bytes)
        return tuple(victim.spec.name for victim in victims)

    def _reclaim(self, missing_bytes: int) -> None:
        """What prompts left behind goes before a model does."""
        self._prompt_caches.start_shrinking(missing_bytes - self._coming_bytes())

    def _evict(self, victims: list[Entry]) -> None:
        for victim in victims:
            log.info("model.evicted", model=victim.spec.name)
            victim.activity.evicted(victim.spec.name)
            self._unloads.start(victim)

    def _evictable(self) -> list[Entry]:
        evictable = [entry for entry in self._entries if entry.is_evictable]
        return sorted(evictable, key=lambda entry: entry.used_at)

    def _pick(self, evictable: list[Entry], missing_bytes: int) -> list[Entry]:
        missing_bytes -= self._coming_bytes() + self._prompt_caches.reclaimable_bytes
        victims: list[Entry] = []
        for entry in evictable:
            if missing_bytes <= 0:
                break
            victims.append(entry)
            missing_bytes -= self._ledger.held_by(entry.residency)
        return victims

    def _coming_bytes(self) -> int:
        """What is free or about to be, less what others wait for already."""
        leaving_bytes = sum(
            self._ledger.held_by(entry.residency)
            for entry in self._entries
            if entry.residency is not None and entry.residency.is_leaving
        )
        leaving_bytes += self._prompt_caches.leaving_bytes
        return self._ledger.unclaimed_bytes + leaving_bytes

    def _available_bytes(self, evictable: list[Entry]) -> int:
        """What could be free if all of these left."""
        reclaimable_bytes = self._prompt_caches.reclaimable_bytes
        return self._coming_bytes() + reclaimable_bytes + self._held(evictable)

    def _held(self, entries: list[Entry]) -> int:
        return sum(self._ledger.held_by(entry.residency) for entry in entries)
