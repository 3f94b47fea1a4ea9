"""One sequence's output as it grows, where a sorter tells answer, thoughts and calls apart."""

from __future__ import annotations

from dataclasses import replace

from mlxpool_server.domain import Channel, GenerationDelta, OutputPart, TokenLogprob
from mlxpool_server.engine.backend import ChannelSorter
from mlxpool_server.engine.stop_matcher import StopMatcher


class ChannelFold:
    """As TextFold, by channel. Counts the thoughts' tokens, and ends them at a limit."""

    def __init__(
        self,
        matcher: StopMatcher,
        sorter: ChannelSorter,
        max_reasoning_tokens: int | None = None,
        reasoning_end: tuple[int, ...] = (),
    ) -> None:
        self._matcher = matcher
        self._sorter = sorter
        self._max_reasoning_tokens = max_reasoning_tokens
        self._reasoning_end = reasoning_end
        self.reasoning_tokens = 0
        # Those that are to come: a thought is ended once.
        self._num_forced = 0
        self._all: list[OutputPart] = []
        self._new: list[OutputPart] = []

    @property
    def text(self) -> str:
        return self._joined(Channel.TEXT)

    @property
    def reasoning(self) -> str:
        return self._joined(Channel.REASONING)

    @property
    def unread_parts(self) -> tuple[OutputPart, ...]:
        """The whole output in order, if there are calls in it."""
        has_calls = any(part.channel is Channel.CALL for part in self._all)
        return tuple(self._all) if has_calls else ()

    def push(self, token_id: int, text: str) -> None:
        was_reasoning = self._sorter.is_reasoning
        parts = self._sorter.push(token_id, text)
        if self._num_forced:
            self._num_forced -= 1
        elif was_reasoning and self._sorter.is_reasoning:
            self.reasoning_tokens += 1
        self._sort(parts)

    def finish(self, text: str, *, is_cut: bool) -> None:
        """Take the decoder's last text; `is_cut`: the model would have gone on."""
        self._sort(self._sorter.finish(text, is_cut=is_cut))
        if self._matcher.matched is None:
            self._append_text(self._matcher.finish())

    def take(
        self,
        completion_tokens: int,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> tuple[GenerationDelta, ...]:
        """The deltas that are new; ids and log-probabilities are the first one's."""
        parts, self._new = self._new, []
        first = GenerationDelta("", completion_tokens, token_ids, logprobs)
        if not parts:
            return (first,) if token_ids or logprobs else ()
        others = GenerationDelta("", completion_tokens)
        return tuple(
            _with_part(others if index else first, part) for index, part in enumerate(parts)
        )

    def take_forced(self) -> tuple[int, ...]:
        """The tokens that have to come next, because a thought is at its limit; once each."""
        limit = self._max_reasoning_tokens
        if limit is None or self._num_forced or self.reasoning_tokens < limit:
            return ()
        if not self._sorter.is_reasoning:
            return ()
        self._num_forced = len(self._reasoning_end)
        return self._reasoning_end

    def _sort(self, parts: tuple[OutputPart, ...]) -> None:
        """Stop sequences are looked for in the answer's text, not in thoughts and calls."""
        for part in parts:
            if self._matcher.matched is not None:
                return
            if part.channel is Channel.TEXT:
                self._append_text(self._matcher.push(part.text))
            else:
                self._append_text(self._matcher.finish())
                self._append(part)

    def _append_text(self, text: str) -> None:
        if text:
            self._append(OutputPart(Channel.TEXT, text))

    def _append(self, part: OutputPart) -> None:
        self._all.append(part)
        self._new.append(part)

    def _joined(self, channel: Channel) -> str:
        return "".join(part.text for part in self._all if part.channel is channel)


def _with_part(delta: GenerationDelta, part: OutputPart) -> GenerationDelta:
    match part.channel:
        case Channel.TEXT:
            return replace(delta, text=part.text)
        case Channel.REASONING:
            return replace(delta, reasoning=part.text)
        case Channel.CALL:
            return replace(delta, unread_call=part)
