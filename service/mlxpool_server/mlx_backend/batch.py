"""mlx-lm's continuous batching behind the engine's BatchRunner."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import mlx.nn as nn
from mlx_lm.generate import BatchGenerator

from mlxpool_server.domain import SamplingParams
from mlxpool_server.engine.backend import StepOutput
from mlxpool_server.mlx_backend.sampling import make_processors, make_sampler


class MlxBatch:
    """Engine thread only."""

    def __init__(
        self,
        model: nn.Module,
        *,
        vocab_size: int,
        max_batch_size: int,
        prefill_rows: int,
        prefill_step_tokens: int,
    ) -> None:
        self._vocab_size = vocab_size
        self._generator = BatchGenerator(
            model,
            # The engine decides when a sequence ends: mlx-lm copies the KV cache of one it ends.
            max_tokens=sys.maxsize,
            completion_batch_size=max_batch_size,
            prefill_batch_size=prefill_rows,
            prefill_step_size=prefill_step_tokens,
        )
        # All this gives back is Metal's wired limit, which MlxMemory owns: mlx-lm would reset what
        # a caller has set.
        self._generator.close()
        self._uid_of: dict[int, int] = {}
        self._slot_of: dict[int, int] = {}

    def add(self, slot: int, prompt: Sequence[int], sampling: SamplingParams) -> None:
        (uid,) = self._generator.insert(
            [list(prompt)],
            samplers=[make_sampler(sampling, self._vocab_size)],
            logits_processors=[make_processors(sampling)],
        )
        self._uid_of[slot] = uid
        self._slot_of[uid] = slot

    def remove(self, slots: Sequence[int]) -> None:
        uids = [self._uid_of.pop(slot) for slot in slots]
        for uid in uids:
            del self._slot_of[uid]
        self._generator.remove(uids)

    def step(self) -> StepOutput:
        prefilled, generated = self._generator.next()
        return StepOutput(
            tokens=tuple((self._slot_of[each.uid], each.token) for each in generated),
            prefilled=tuple((self._slot_of[each.uid], each.progress[0]) for each in prefilled),
        )

    def kv_bytes(self) -> int:
        return int(self._generator.prompt_cache_nbytes)

    def close(self) -> None:
        self._generator.remove(list(self._slot_of))
        self._uid_of.clear()
        self._slot_of.clear()
        self._generator.close()
