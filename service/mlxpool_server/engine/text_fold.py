"""One sequence's output as it grows, where all of it is text."""

from __future__ import annotations

from mlxpool_server.domain import GenerationDelta, OutputPart, TokenLogprob
from mlxpool_server.engine.stop_matcher import StopMatcher


class TextFold:
    """What is new since the last delta, and all of it. Every token of every plain row is here."""

    reasoning = ""
    reasoning_tokens = 0
    unread_parts: tuple[OutputPart, ...] = ()

    def __init__(self, matcher: StopMatcher) -> None:
        self._matcher = matcher
        self._all: list[str] = []
        self._new: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._all)

    def push(self, _token_id: int, text: str) -> None:
        self._append(self._matcher.push(text))

    def finish(self, text: str, *, is_cut: bool) -> None:
        """Take the decoder's last text; `is_cut`: the model would have gone on."""
        del is_cut
        self._append(self._matcher.push(text))
        if self._matcher.matched is None:
            self._append(self._matcher.finish())

    def take(
        self,
        completion_tokens: int,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> tuple[GenerationDelta, ...]:
        """The deltas that are new."""
        if not (self._new or token_ids or logprobs):
            return ()
        text = "".join(self._new)
        self._new.clear()
        return (GenerationDelta(text, completion_tokens, token_ids, logprobs),)

    def take_forced(self) -> tuple[int, ...]:
        return ()

    def _append(self, text: str) -> None:
        if text:
            self._all.append(text)
            self._new.append(text)
