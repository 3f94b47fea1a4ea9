"""A model that answers with a script, at the pace a test sets."""

from __future__ import annotations

import itertools
import math
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence

from fakes.tokenizer import EOS
from mlxpool_server.domain import SamplingParams, Vector
from mlxpool_server.engine.backend import (
    EmbeddingJob,
    Guide,
    LoadedAdapter,
    StepOutput,
    TokenScores,
)
from mlxpool_server.errors import MlxpoolError

Script = Callable[[Sequence[int]], Iterator[int]]


def echo(prompt: Sequence[int]) -> Iterator[int]:
    """Answer with the prompt, then end."""
    yield from prompt
    while True:
        yield EOS


def endless(prompt: Sequence[int]) -> Iterator[int]:
    """Repeat the prompt for ever."""
    while True:
        yield from prompt


class FakeModel:
    """`steps` None: run freely. Otherwise each step waits for one release of the semaphore."""

    def __init__(
        self,
        *,
        resident_bytes: int = 100,
        script: Script = echo,
        is_stepped: bool = False,
        num_drafted: int = 0,
    ) -> None:
        self.resident_bytes = resident_bytes
        self.script = script
        # So many tokens more in a step, as if all drafts were right.
        self.num_drafted = num_drafted
        self.steps = threading.Semaphore(0) if is_stepped else None
        # Set while a step waits for its release.
        self.is_waiting = threading.Event()
        # Raised by the next call, once each.
        self.step_errors: list[BaseException] = []
        self.runner_errors: list[Exception] = []
        self.add_errors: list[Exception] = []
        self.remove_errors: list[Exception] = []
        self.pass_errors: list[BaseException] = []
        # By slot: why it alone cannot go on, told by the next step.
        self.slot_errors: dict[int, MlxpoolError] = {}
        self.close_errors: list[Exception] = []
        self.batches: list[FakeBatch] = []
        self.embedders: list[FakeEmbedder] = []
        # False: nothing is known of its hidden states.
        self.can_embed = True

    def new_embedder(self) -> FakeEmbedder | None:
        if not self.can_embed:
            return None
        self.embedders.append(FakeEmbedder(self))
        return self.embedders[-1]

    def new_runner(self) -> FakeBatch:
        _raise_next(self.runner_errors)
        self.batches.append(FakeBatch(self))
        return self.batches[-1]

    def wait_for_step(self) -> None:
        """Engine thread."""
        if (steps := self.steps) is not None:
            self.is_waiting.set()
            steps.acquire()
            self.is_waiting.clear()

    def run_freely(self) -> None:
        """Let the step that waits go, and all that follow."""
        steps, self.steps = self.steps, None
        if steps is not None:
            steps.release()


class FakeBatch:
    """Prefills a slot in its first step, then gives one token a step."""

    def __init__(self, model: FakeModel) -> None:
        self.model = model
        self.is_closed = False
        self.prompt_cache_limit_bytes = 0
        self.slots: dict[int, Iterator[int]] = {}
        self.prompts: dict[int, Sequence[int]] = {}
        self.samplings: dict[int, SamplingParams] = {}
        self.guides: dict[int, Guide | None] = {}
        self.top_logprobs: dict[int, int | None] = {}
        self.num_drafted: dict[int, int] = {}
        # In the order in which they joined.
        self.joined: list[Sequence[int]] = []
        self.adapters: list[LoadedAdapter | None] = []
        self.largest = 0
        self.num_steps = 0
        self.threads: set[str] = set()

    def add(
        self,
        slot: int,
        prompt: Sequence[int],
        sampling: SamplingParams,
        guide: Guide | None = None,
        top_logprobs: int | None = None,
        *,
        max_tokens: int = 0,
        may_be_forced: bool = False,
        adapter: LoadedAdapter | None = None,
    ) -> None:
        _raise_next(self.model.add_errors)
        self.joined.append(prompt)
        self.slots[slot] = self.model.script(prompt)
        self.prompts[slot] = prompt
        self.samplings[slot] = sampling
        self.guides[slot] = guide
        self.top_logprobs[slot] = top_logprobs
        self.adapters.append(adapter)
        self.num_drafted[slot] = 0 if may_be_forced else min(self.model.num_drafted, max_tokens)
        self.largest = max(self.largest, len(self.slots))

    def remove(self, slots: Sequence[int]) -> None:
        _raise_next(self.model.remove_errors)
        for slot in slots:
            del self.slots[slot]
            self.prompts.pop(slot, None)

    def force(self, slot: int, token_ids: Sequence[int]) -> None:
        self.slots[slot] = itertools.chain(token_ids, self.slots[slot])

    def step(self) -> StepOutput:
        self.model.wait_for_step()
        self.num_steps += 1
        self.threads.add(threading.current_thread().name)
        _raise_next(self.model.step_errors)
        prefilled = tuple((slot, len(prompt)) for slot, prompt in self.prompts.items())
        fresh = set(self.prompts)
        self.prompts.clear()
        tokens = tuple(
            (slot, next(script))
            for slot, script in self.slots.items()
            if slot not in fresh
            for _ in range(1 + self.num_drafted[slot])
        )
        drafted = tuple((slot, self.num_drafted[slot]) for slot in self.slots if slot not in fresh)
        failed, self.model.slot_errors = tuple(self.model.slot_errors.items()), {}
        scores = {
            slot: _scores(token, count)
            for slot, token in tokens
            if (count := self.top_logprobs[slot]) is not None
        }
        return StepOutput(
            tokens=tokens, drafted=drafted, prefilled=prefilled, failed=failed, scores=scores
        )

    def settle(self) -> None:
        """Nothing runs ahead here."""

    def limit_prompt_cache(self, num_bytes: int) -> None:
        self.prompt_cache_limit_bytes = num_bytes

    def prompt_cache_bytes(self) -> int:
        """Always full."""
        return self.prompt_cache_limit_bytes

    def kv_bytes(self) -> int:
        return 10 * len(self.slots)

    def close(self) -> None:
        self.is_closed = True
        self.slots.clear()
        _raise_next(self.model.close_errors)


class FakeEmbedder:
    """A text a pass: its vector is its length and its first token."""

    def __init__(self, model: FakeModel) -> None:
        self.model = model
        self.jobs: dict[int, EmbeddingJob] = {}
        # All that ever came.
        self.asked: list[EmbeddingJob] = []
        self.vectors: dict[int, list[Vector]] = {}
        self.threads: set[str] = set()
        # Of each pass, whether nothing else was waiting.
        self.were_alone: list[bool] = []
        # How many steps streams had had before it.
        self.steps_before: list[int] = []

    def add(self, slot: int, job: EmbeddingJob) -> None:
        _raise_next(self.model.add_errors)
        self.jobs[slot] = job
        self.asked.append(job)
        self.vectors[slot] = []

    def remove(self, slot: int) -> None:
        self.jobs.pop(slot, None)
        self.vectors.pop(slot, None)

    def step(self, *, is_alone: bool) -> list[tuple[int, tuple[Vector, ...]]]:
        self.model.wait_for_step()
        self.threads.add(threading.current_thread().name)
        self.were_alone.append(is_alone)
        self.steps_before.append(sum(batch.num_steps for batch in self.model.batches))
        _raise_next(self.model.pass_errors)
        slot, job = next(iter(self.jobs.items()))
        done = self.vectors[slot]
        text = job.texts[len(done)]
        done.append(array("f", [len(text), text[0]]))
        if len(done) < len(job.texts):
            return []
        self.remove(slot)
        return [(slot, tuple(done))]

    def kv_bytes(self) -> int:
        return 5 * len(self.jobs)

    def close(self) -> None:
        self.jobs.clear()
        self.vectors.clear()


def _scores(token: int, count: int) -> TokenScores:
    """The chosen one is the likeliest; the words before it follow, each half as likely."""
    logprobs = [-math.log(2) * (place + 1) for place in range(count)]
    words = [max(0, token - place) for place in range(count)]
    return TokenScores(-math.log(2), tuple(zip(words, logprobs, strict=True)))


def _raise_next(errors: list[Exception] | list[BaseException]) -> None:
    if errors:
        raise errors.pop(0)
