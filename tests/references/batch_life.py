"""A batch, and what its rows say while they join and leave."""

from __future__ import annotations

from typing import Any

from mlxpool_server.domain import SamplingParams
from mlxpool_server.mlx_backend.batch import MlxBatch

# No test's rows need so many.
MAX_STEPS = 1000


class Life:
    """`num_tokens`: what each row wants."""

    def __init__(self, batch: MlxBatch, num_tokens: int) -> None:
        self.batch = batch
        self.num_tokens = num_tokens
        self.got: dict[int, list[int]] = {}
        self.cached: dict[int, int] = {}
        self.num_drafted = 0
        self.num_steps = 0

    def add(self, slot: int, prompt: list[int], sampling: SamplingParams, **more: Any) -> None:
        self.got[slot] = []
        self.batch.add(slot, prompt, sampling, **({"max_tokens": self.num_tokens} | more))

    def step(self) -> None:
        output = self.batch.step()
        self.num_steps += 1
        assert self.num_steps < MAX_STEPS
        for slot, token in output.tokens:
            self.got[slot].append(token)
        self.cached.update(output.cached)
        self.num_drafted += sum(count for _, count in output.drafted)

    def finish(self, *slots: int) -> dict[int, list[int]]:
        """Step until these, or all, have what they want; each leaves when it has."""
        left = set(slots or self.got)
        while left:
            self.step()
            done = {slot for slot in left if len(self.got[slot]) >= self.num_tokens}
            self.batch.remove(list(done))
            left -= done
        return self.said

    @property
    def said(self) -> dict[int, list[int]]:
        """No more of each than it wanted."""
        return {slot: tokens[: self.num_tokens] for slot, tokens in self.got.items()}

    @classmethod
    def of(
        cls,
        batch: MlxBatch,
        num_tokens: int,
        prompts: list[list[int]],
        *samplings: SamplingParams,
    ) -> Life:
        """One row joins after the other, while those before it speak; samplings take turns."""
        life = cls(batch, num_tokens)
        for slot, prompt in enumerate(prompts):
            life.add(slot, prompt, samplings[slot % len(samplings)])
            life.step()
            life.step()
        life.finish()
        batch.close()
        return life
