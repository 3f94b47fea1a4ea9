"""Memory for what earlier prompts left in the KV cache: an allotment a model, taken back first."""

from __future__ import annotations

from dataclasses import dataclass

from mlxpool_server.engine.engine import Engine
from mlxpool_server.errors import MlxpoolError
from mlxpool_server.pool.ledger import Ledger
from mlxpool_server.pool.tasks import Tasks


@dataclass(slots=True, eq=False)
class _Allotment:
    """The holder of the bytes in the ledger."""

    model: str
    # What it is to be, and what the engine keeps to.
    target_bytes: int = 0
    engine_bytes: int = 0
    is_changing: bool = False


class PromptCaches:
    """Event loop only. Bytes are held before the engine may use them, and until it let them go."""

    def __init__(self, ledger: Ledger, engine: Engine, tasks: Tasks, share: float) -> None:
        """`share`: of the pool's limit, what one model may keep at most."""
        self._ledger = ledger
        self._engine = engine
        self._tasks = tasks
        self._share = share
        self._allotments: dict[str, _Allotment] = {}

    @property
    def reclaimable_bytes(self) -> int:
        """What `start_shrinking` could free."""
        return sum(each.target_bytes for each in self._allotments.values())

    @property
    def leaving_bytes(self) -> int:
        """What is being freed."""
        return sum(
            max(0, self._ledger.held_by(each) - each.target_bytes)
            for each in self._allotments.values()
        )

    def top_up(self, model: str) -> None:
        """Give a loaded model what it may have, if nobody needs it: half of what is free."""
        allotment = self._allotments.setdefault(model, _Allotment(model))
        wanted = int(self._ledger.next_limit_bytes * self._share)
        grown = allotment.target_bytes + max(0, self._ledger.unclaimed_bytes) // 2
        target = min(wanted, grown)
        if allotment.is_changing or target <= allotment.target_bytes:
            return
        if self._ledger.try_hold(allotment, target):
            allotment.target_bytes = target
            self._start_change(allotment)

    def start_shrinking(self, num_bytes: int) -> None:
        """Free up to so many bytes, the largest allotments first."""
        for allotment in sorted(self._allotments.values(), key=lambda each: -each.target_bytes):
            taken = min(max(0, num_bytes), allotment.target_bytes)
            if not taken:
                return
            num_bytes -= taken
            allotment.target_bytes -= taken
            self._start_change(allotment)

    def release(self, model: str) -> None:
        """The model is gone, and what it kept with it."""
        allotment = self._allotments.pop(model, None)
        if allotment is not None:
            self._ledger.release(allotment)

    async def clear(self) -> int:
        """Forget all prompts; return how many bytes they took."""
        freed = 0
        for allotment in list(self._allotments.values()):
            freed += self._engine.stats(allotment.model).prompt_cache_bytes
            await self._engine.limit_prompt_cache(allotment.model, 0)
            await self._engine.limit_prompt_cache(allotment.model, allotment.target_bytes)
        return freed

    def _start_change(self, allotment: _Allotment) -> None:
        if not allotment.is_changing:
            allotment.is_changing = True
            self._tasks.start(self._change(allotment))

    async def _change(self, allotment: _Allotment) -> None:
        try:
            while self._is_current(allotment) and allotment.engine_bytes != allotment.target_bytes:
                target = allotment.target_bytes
                await self._engine.limit_prompt_cache(allotment.model, target)
                allotment.engine_bytes = target
                if self._is_current(allotment):
                    self._ledger.try_hold(allotment, max(target, allotment.target_bytes))
            # What was taken back before the engine heard of it is held all the same.
            if self._is_current(allotment):
                self._ledger.try_hold(allotment, allotment.target_bytes)
        except MlxpoolError:
            # The engine does not run: it keeps nothing.
            if self._is_current(allotment):
                self.release(allotment.model)
        finally:
            allotment.is_changing = False

    def _is_current(self, allotment: _Allotment) -> bool:
        """False: the model is gone, and its name may be another stay's by now."""
        return self._allotments.get(allotment.model) is allotment
