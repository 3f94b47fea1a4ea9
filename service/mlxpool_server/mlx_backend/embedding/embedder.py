"""A model's texts on their way to vectors, a pass at a time."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlxpool_server.domain import Pooling, Vector
from mlxpool_server.engine.backend import EmbeddingJob
from mlxpool_server.mlx_backend.blas_threads import ThreadTuner
from mlxpool_server.mlx_backend.embedding.bodies import Body
from mlxpool_server.mlx_backend.embedding.pooling import normalized, pooled, summed
from mlxpool_server.mlx_backend.embedding.text_queue import Text, TextQueue
from mlxpool_server.mlx_backend.host_arrays import as_numpy
from mlxpool_server.mlx_backend.prefill_pace import PrefillPace

# How often freed buffers go back to the system: hardly two passes have one shape.
CLEAR_CACHE_PASSES = 64
_PASSES = "embedding"


@dataclass(slots=True)
class _Job:
    vectors: list[Vector | None]
    num_missing: int


@dataclass(slots=True)
class _CutText:
    """A text that is too long for one pass, and what of it is done."""

    text: Text
    caches: list[Any]
    num_done: int = 0
    # What its vector is made of.
    found: mx.array | None = field(default=None)

    def step(self, body: Body, num_tokens: int) -> mx.array | None:
        """Work on up to `num_tokens` more; the vector, (1, size), when that was the end."""
        part = self.text.tokens[self.num_done : self.num_done + num_tokens]
        hidden = body.hidden(mx.array([part]), [len(part)], self.caches)
        match self.text.pooling:
            case Pooling.MEAN:
                more = summed(hidden, [len(part)])
                self.found = more if self.found is None else self.found + more
            case Pooling.CLS if self.found is not None:
                pass
            case Pooling.CLS | Pooling.LAST_TOKEN:
                self.found = pooled(hidden, [len(part)], self.text.pooling)
        mx.eval(self.found, [cache.state for cache in self.caches])
        self.num_done += len(part)
        if self.num_done < len(self.text) or self.found is None:
            return None
        is_mean = self.text.pooling is Pooling.MEAN
        return self.found / len(self.text) if is_mean else self.found


class MlxEmbedder:
    """Engine thread only. A step waits for its pass, so that nothing of it runs on behind."""

    def __init__(self, body: Body, max_tokens: int, threads: ThreadTuner | None = None) -> None:
        """`max_tokens`: of one pass, padding included.

        `threads` chooses how many a CPU's matrix products get.
        """
        self._body = body
        self._pace = PrefillPace(max_tokens)
        self._threads = threads
        self._queue = TextQueue(may_pad=body.may_pad)
        self._jobs: dict[int, _Job] = {}
        self._cut: _CutText | None = None
        self._was_cut = False
        self._num_passes = 0

    def add(self, slot: int, job: EmbeddingJob) -> None:
        self._jobs[slot] = _Job([None] * len(job.texts), len(job.texts))
        self._queue.add(
            slot,
            (
                Text(slot, place, tokens, job.pooling, job.normalize)
                for place, tokens in enumerate(job.texts)
            ),
        )

    def remove(self, slot: int) -> None:
        self._jobs.pop(slot, None)
        self._queue.remove(slot)
        if self._cut is not None and self._cut.text.slot == slot:
            self._cut = None

    def step(self, *, is_alone: bool) -> list[tuple[int, tuple[Vector, ...]]]:
        if self._threads is not None:
            self._threads.begin(_PASSES)
        started_at = time.monotonic()
        limit = self._pace.num_tokens(is_decoding=not is_alone)
        texts, vectors, num_tokens = self._pass(limit)
        duration_s = time.monotonic() - started_at
        self._pace.learn_pass(num_tokens, duration_s)
        if self._threads is not None:
            self._threads.end(_PASSES, duration_s / max(1, num_tokens))
        self._num_passes += 1
        if self._num_passes % CLEAR_CACHE_PASSES == 0:
            mx.clear_cache()
        return self._completed(texts, vectors)

    def kv_bytes(self) -> int:
        return 0 if self._cut is None else sum(cache.nbytes for cache in self._cut.caches)

    def close(self) -> None:
        self._jobs.clear()
        self._queue.clear()
        self._cut = None

    def _pass(self, limit: int) -> tuple[list[Text], np.ndarray | None, int]:
        """The texts that it completed, their vectors, and how many tokens it worked on."""
        texts: list[Text] = []
        # A text in parts keeps nobody waiting, and is kept waiting by nobody.
        if self._cut is None or self._was_cut:
            self._was_cut = False
            longest = limit if self._cut is not None else None
            texts = self._queue.take(limit, longest)
        if texts and self._body.can_cut and len(texts[0]) > limit:
            (text,) = texts
            self._cut = _CutText(text, self._body.new_caches())
            texts = []
        if texts:
            return texts, self._vectors(texts), len(texts) * len(texts[0])
        if self._cut is None:
            return [], None, 0
        self._was_cut = True
        cut, before = self._cut, self._cut.num_done
        vector = cut.step(self._body, limit)
        if vector is None:
            return [], None, cut.num_done - before
        self._cut = None
        return [cut.text], as_numpy(vector), cut.num_done - before

    def _vectors(self, texts: Sequence[Text]) -> np.ndarray:
        longest = len(texts[0])
        pad = self._body.pad_id
        tokens = mx.array([[*text.tokens, *([pad] * (longest - len(text)))] for text in texts])
        lengths = [len(text) for text in texts]
        hidden = self._body.hidden(tokens, lengths)
        return as_numpy(pooled(hidden, lengths, texts[0].pooling))

    def _completed(
        self, texts: Sequence[Text], vectors: np.ndarray | None
    ) -> list[tuple[int, tuple[Vector, ...]]]:
        """Write them down; return the jobs that lack nothing more."""
        if vectors is None:
            return []
        unit = normalized(vectors)
        completed = []
        for row, text in enumerate(texts):
            job = self._jobs[text.slot]
            numbers = unit[row] if text.normalize else vectors[row]
            vector: Vector = array("f")
            vector.frombytes(numbers.astype(np.float32).tobytes())
            job.vectors[text.place] = vector
            job.num_missing -= 1
            if not job.num_missing:
                del self._jobs[text.slot]
                completed.append((text.slot, tuple(each for each in job.vectors if each)))
        return completed
