"""llguidance's matcher as the engine's guide."""

from __future__ import annotations

from llguidance import LLMatcher

from mlxpool_server.errors import BadConstraintError


class LlGuide:
    """One generation's. Its methods let other Python threads run while they compute."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, field: str) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._field = field
        # What has to come, as the tokenizer itself would write it.
        self._forced: list[int] = []

    def allowed(self) -> bytes:
        if not self._forced and not self._matcher.is_accepting():
            self._forced = self._matcher.compute_ff_tokens()[::-1]
        if self._forced:
            bits = bytearray((self._vocab_size + 7) // 8)
            token_id = self._forced[-1]
            bits[token_id // 8] = 1 << token_id % 8
            return bytes(bits)
        mask = self._matcher.compute_bitmask()
        # An error would look like a text that is complete.
        self._check()
        return mask

    def advance(self, token_id: int) -> None:
        if self._forced and self._forced.pop() != token_id:
            self._forced = []
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise BadConstraintError(self._field, told(self._matcher.get_error()))


def told(error: str) -> str:
    """Return llguidance's words as a caller should see them."""
    error = error.partition("<non-verbose/>")[0].strip()
    return "no text can satisfy it" if error.startswith("NoExtension") else error
