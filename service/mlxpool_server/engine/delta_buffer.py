"""What a stream's reader has not been told yet, joined to as few deltas as its channels allow."""

from __future__ import annotations

from collections import deque

from mlxpool_server.domain import GenerationDelta, OutputPart, TokenLogprob

# A message may have 4 MiB: so many tokens, with 20 alternatives each, stay below.
MOST_LOGPROBS = 128


class DeltaBuffer:
    """Deltas of one channel that follow each other become one; a call stands alone."""

    def __init__(self) -> None:
        self._runs: deque[_Run] = deque()

    def __len__(self) -> int:
        """How many deltas there are to take."""
        return len(self._runs)

    def add(self, delta: GenerationDelta) -> None:
        runs = self._runs
        if not (runs and runs[-1].takes(delta)):
            runs.append(_Run())
        runs[-1].add(delta)

    def take(self) -> GenerationDelta:
        """Raises: IndexError when there is none."""
        return self._runs.popleft().delta()


class _Run:
    """Deltas without a channel, which have ids only, join any."""

    __slots__ = ("_call", "_completion_tokens", "_logprobs", "_reasoning", "_text", "_token_ids")

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._call: OutputPart | None = None
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._completion_tokens = 0

    def takes(self, delta: GenerationDelta) -> bool:
        """Whether it still has one channel, and its order and size, with this delta."""
        if self._logprobs and len(self._logprobs) + len(delta.logprobs) > MOST_LOGPROBS:
            return False
        if delta.text:
            return not (self._reasoning or self._call)
        if delta.reasoning:
            return not (self._text or self._call)
        return delta.unread_call is None or not (self._text or self._reasoning or self._call)

    def add(self, delta: GenerationDelta) -> None:
        if delta.text:
            self._text.append(delta.text)
        elif delta.reasoning:
            self._reasoning.append(delta.reasoning)
        elif delta.unread_call is not None:
            self._call = delta.unread_call
        if delta.token_ids:
            self._token_ids.extend(delta.token_ids)
        if delta.logprobs:
            self._logprobs.extend(delta.logprobs)
        self._completion_tokens = delta.completion_tokens

    def delta(self) -> GenerationDelta:
        return GenerationDelta(
            "".join(self._text),
            self._completion_tokens,
            tuple(self._token_ids),
            tuple(self._logprobs),
            reasoning="".join(self._reasoning),
            unread_call=self._call,
        )
