"""Constraints to guides, for one tokenizer: compiled once, kept for the next that ask."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from mlxpool_server.domain import Constraint
from mlxpool_server.errors import BadConstraintError
from mlxpool_server.mlx_backend.constraints.big_stack import on_big_stack
from mlxpool_server.mlx_backend.constraints.grammar import grammar_of, place_of_error
from mlxpool_server.mlx_backend.constraints.guide import LlGuide, told
from mlxpool_server.mlx_backend.foreign_tokenizer import TokenizerError, panics_as_errors

# Compiled ones hold some 20 KB, and a hundred times their source at worst.
MAX_KEPT = 64
MAX_KEPT_BYTES = 1 << 19
# At 1 to 2 kB each, for each generation.
MAX_LEXER_STATES = 50_000


class ConstraintCompiler:
    """Any thread, several at once."""

    def __init__(
        self,
        pieces: Sequence[bytes],
        *,
        special_ids: Sequence[int],
        eos_ids: Sequence[int],
        encode: Callable[[str], tuple[int, ...]],
    ) -> None:
        """`pieces`: the bytes of each token, those of the special ones are never allowed."""
        self._vocab_size = len(pieces)
        self._limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Vocabulary(pieces, special_ids, eos_ids[0], encode)),
            n_vocab=len(pieces),
            eos_token=list(eos_ids),
        )
        self._kept: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    def compile(self, constraint: Constraint) -> LlGuide:
        """Raises: BadConstraintError."""
        with self._lock:
            matcher = self._kept.get(constraint)
            if matcher is not None:
                self._kept.move_to_end(constraint)
        if matcher is None:
            # A chain of rules goes as deep as it is long.
            matcher = on_big_stack(lambda: self._checked_matcher(constraint))
            self._keep(constraint, matcher)
        return LlGuide(matcher.deep_copy(), self._vocab_size, constraint.field)

    def _checked_matcher(self, constraint: Constraint) -> LLMatcher:
        try:
            with panics_as_errors():
                return self._new_matcher(constraint)
        except BadConstraintError:
            raise
        except (TokenizerError, ValueError, RecursionError) as error:
            problem = f"cannot be compiled: {error}"
            raise BadConstraintError(constraint.field, problem) from error

    def _new_matcher(self, constraint: Constraint) -> LLMatcher:
        matcher = self._matcher(grammar_of(constraint))
        if matcher.is_error():
            error = told(matcher.get_error())
            place = place_of_error(
                constraint, lambda grammar: told(self._matcher(grammar).get_error())
            )
            raise BadConstraintError(constraint.field, error, place)
        # What can be seen at the first token is said before it.
        LlGuide(matcher.deep_copy(), self._vocab_size, constraint.field).allowed()
        return matcher

    def _matcher(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)

    def _keep(self, constraint: Constraint, matcher: LLMatcher) -> None:
        with self._lock:
            if constraint in self._kept:
                return
            self._kept[constraint] = matcher
            self._kept_bytes += len(constraint.source)
            while len(self._kept) > MAX_KEPT or self._kept_bytes > MAX_KEPT_BYTES:
                oldest, _ = self._kept.popitem(last=False)
                self._kept_bytes -= len(oldest.source)


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(
        self,
        pieces: Sequence[bytes],
        special_ids: Sequence[int],
        eos_id: int,
        encode: Callable[[str], tuple[int, ...]],
    ) -> None:
        self.tokens = list(pieces)
        self.special_token_ids = [token for token in special_ids if token < len(pieces)]
        self.eos_token_id = eos_id
        self.bos_token_id = None
        self._encode = encode
        special = set(special_ids)
        self._ids = {
            piece: token for token, piece in enumerate(pieces) if piece and token not in special
        }
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        raw = text.encode() if isinstance(text, str) else text
        # Some tokenizers put a space before a text: not before what follows a new line.
        for before in (b"", b"\n"):
            tokens = self._tokens_after(before, raw)
            if tokens is not None:
                return tokens
        return self._greedy(raw)

    def _tokens_after(self, before: bytes, raw: bytes) -> list[int] | None:
        """None: the tokenizer does not write it so."""
        tokens = list(self._encode((before + raw).decode("utf-8", "replace")))
        missing = before
        while tokens and missing:
            piece = self._piece(tokens.pop(0))
            missing = missing.removeprefix(piece)
        return tokens if b"".join(map(self._piece, tokens)) == raw else None

    def _piece(self, token_id: int) -> bytes:
        return self.tokens[token_id] if token_id < len(self.tokens) else b""

    def _greedy(self, raw: bytes) -> list[int]:
        tokens: list[int] = []
        at = 0
        while at < len(raw):
            ends = range(min(len(raw), at + self._longest), at, -1)
            end = next((end for end in ends if raw[at:end] in self._ids), None)
            if end is None:
                # What is left cannot be written: nothing is forced.
                break
            tokens.append(self._ids[raw[at:end]])
            at = end
        return tokens
