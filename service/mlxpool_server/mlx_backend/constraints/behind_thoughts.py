"""A guide that leaves a model its thoughts: what it demands, it demands of what follows them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from mlxpool_server.domain import Channel
from mlxpool_server.engine.backend import Guide, TextDecoder
from mlxpool_server.mlx_backend.channel_sorter import Sorter

# Models put a line or two between a thought and what follows it; the sorter drops them.
MAX_SPACES = 4


@dataclass(frozen=True, slots=True)
class Thoughts:
    """How one generation's thoughts are told from what follows."""

    sorter: Sorter
    decoder: TextDecoder
    # The sorter's states in which the guide begins.
    ends: frozenset[str]
    # The tokens with which the model may begin a thought where its output begins; () : it may not.
    start: tuple[int, ...]
    # Bits as of Guide.allowed: all tokens but those that would end the output, and white space.
    free: bytes
    spaces: bytes
    encode: Callable[[str], Sequence[int]]

    def push(self, token_id: int) -> str:
        """Return what the token holds of the answer behind its thought."""
        parts = self.sorter.push(token_id, self.decoder.push(token_id))
        return "".join(part.text for part in parts if part.channel is Channel.TEXT)


class BehindThoughts:
    """`at_start` guides an output that begins without a thought, `behind` one behind it.

    Both are new, and of the same constraint.
    """

    def __init__(self, at_start: Guide, behind: Guide, thoughts: Thoughts) -> None:
        self._behind = behind
        self._thoughts = thoughts
        self._is_thinking = thoughts.sorter.state not in thoughts.ends
        # Where a thought may begin, what came may be its beginning or the guide's, or both.
        self._start_left = () if self._is_thinking else thoughts.start
        self._begun: list[int] = []
        # None: the guide does not allow what has begun.
        self._guide: Guide | None = None if self._is_thinking else at_start
        self._spaces_left = MAX_SPACES
        self._allowed = b""

    def allowed(self) -> bytes:
        if self._is_thinking:
            return self._thoughts.free
        self._allowed = b"" if self._guide is None else self._guide.allowed()
        if not (self._spaces_left or self._start_left):
            return self._allowed
        bits = int.from_bytes(self._allowed, "little")
        if self._spaces_left:
            bits |= int.from_bytes(self._thoughts.spaces, "little")
        if self._start_left:
            bits |= 1 << self._start_left[0]
        return bits.to_bytes((bits.bit_length() + 7) // 8, "little")

    def advance(self, token_id: int) -> None:
        if self._is_thinking:
            self._think(token_id)
        elif self._start_left and token_id == self._start_left[0]:
            self._begin(token_id)
        elif self._spaces_left and not has_bit(self._allowed, token_id):
            self._spaces_left -= 1
        else:
            self._spaces_left = 0
            self._start_left = ()
            if self._guide is not None:
                self._guide.advance(token_id)

    def _begin(self, token_id: int) -> None:
        self._begun.append(token_id)
        self._start_left = self._start_left[1:]
        self._spaces_left = 0
        if not self._start_left:
            self._is_thinking = True
            for begun in self._begun:
                self._thoughts.push(begun)
        elif self._guide is not None:
            if has_bit(self._allowed, token_id):
                self._guide.advance(token_id)
            else:
                self._guide = None

    def _think(self, token_id: int) -> None:
        answer = self._thoughts.push(token_id)
        if self._thoughts.sorter.state not in self._thoughts.ends:
            return
        self._is_thinking = False
        self._guide = self._behind
        self._spaces_left = MAX_SPACES
        for begun in self._thoughts.encode(answer) if answer else ():
            self._spaces_left = 0
            self._guide.advance(begun)


def as_bits(token_ids: Collection[int], vocab_size: int) -> bytes:
    """As Guide.allowed returns them."""
    bits = bytearray((vocab_size + 7) // 8)
    for token_id in token_ids:
        bits[token_id // 8] |= 1 << token_id % 8
    return bytes(bits)


def has_bit(bits: bytes, token_id: int) -> bool:
    return token_id // 8 < len(bits) and bool(bits[token_id // 8] >> token_id % 8 & 1)
