"""One sequence's output as it grows: what is new since the last delta, and all of it."""

from __future__ import annotations

from collections.abc import Sequence

from mlxpool_server.domain import Channel, GenerationDelta, OutputPart


class _Run:
    """Pieces of one channel that follow each other."""

    __slots__ = ("channel", "pieces", "raw")

    def __init__(self, part: OutputPart) -> None:
        self.channel = part.channel
        self.pieces = [part.text]
        self.raw = part.raw

    def part(self) -> OutputPart:
        return OutputPart(self.channel, "".join(self.pieces), self.raw)


class OutputFold:
    """Runs of text and thoughts grow; each call stands alone."""

    def __init__(self) -> None:
        self._all: list[_Run] = []
        self._new: list[_Run] = []

    @property
    def has_new(self) -> bool:
        return bool(self._new)

    def append(self, part: OutputPart) -> None:
        if part.text or part.raw:
            _append(self._all, part)
            _append(self._new, part)

    def text(self, channel: Channel) -> str:
        """All of a channel's text."""
        return "".join(piece for run in self._all if run.channel is channel for piece in run.pieces)

    def parts_with_calls(self) -> tuple[OutputPart, ...]:
        """The whole output in order, if there are calls in it; otherwise nothing."""
        if not any(run.channel is Channel.CALL for run in self._all):
            return ()
        return tuple(run.part() for run in self._all)

    def take_new(
        self, completion_tokens: int, token_ids: Sequence[int]
    ) -> tuple[GenerationDelta, ...]:
        """A delta for each run since the last time; the ids are the first one's."""
        runs, self._new = self._new, []
        if not runs and token_ids:
            return (GenerationDelta("", completion_tokens, tuple(token_ids)),)
        return tuple(
            delta_of(run.part(), completion_tokens, token_ids if index == 0 else ())
            for index, run in enumerate(runs)
        )


def delta_of(
    part: OutputPart, completion_tokens: int, token_ids: Sequence[int] = ()
) -> GenerationDelta:
    ids = tuple(token_ids)
    match part.channel:
        case Channel.TEXT:
            return GenerationDelta(part.text, completion_tokens, ids)
        case Channel.REASONING:
            return GenerationDelta("", completion_tokens, ids, reasoning=part.text)
        case Channel.CALL:
            return GenerationDelta("", completion_tokens, ids, unread_call=part)


def _append(runs: list[_Run], part: OutputPart) -> None:
    if runs and runs[-1].channel is part.channel is not Channel.CALL:
        runs[-1].pieces.append(part.text)
    else:
        runs.append(_Run(part))
