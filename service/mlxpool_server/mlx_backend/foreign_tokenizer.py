"""What a stranger's tokenizer.json may do to a text, and how its failures look."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Real ones at most double a text: spaces become U+2581, and one is put before it.
MAX_GROWTH = 64


class TokenizerError(Exception):
    """The tokenizer failed, or may not be used."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """A panic of the Rust library, which is no Exception, becomes a TokenizerError.

    One comes, for example, of a regular expression that gives up on a text.
    """
    try:
        yield
    except BaseException as error:
        # Its class cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError("its Rust library gave up") from None


def check_growth(tokenizer: Any) -> None:
    """Look at what replaces parts of a text: ten rules that make 16 of 1 fill any memory.

    A decoder may not have a regular expression: tokens become text on the engine's thread, where
    a slow one would hold up every model. Raises: TokenizerError.
    """
    normalizer, decoder = _rule(tokenizer.normalizer), _rule(tokenizer.decoder)
    if _has_regex(decoder):
        raise TokenizerError("its decoder uses a regular expression")
    for rule in (normalizer, decoder):
        if (growth := _growth(rule)) > MAX_GROWTH:
            raise TokenizerError(
                f"it may make {growth:g} characters of one; at most {MAX_GROWTH} are allowed"
            )


def _rule(step: Any) -> dict[str, Any]:
    """As tokenizer.json has it; empty when it has none."""
    rule: dict[str, Any] = {} if step is None else json.loads(step.__getstate__())
    return rule


def _has_regex(rule: Mapping[str, Any]) -> bool:
    match rule:
        case {"type": "Sequence", "decoders": parts}:
            return any(map(_has_regex, parts))
        case {"pattern": {"Regex": _}}:
            return True
    return False


def _growth(rule: Mapping[str, Any]) -> float:
    match rule:
        case {"type": "Sequence", "normalizers": parts} | {"type": "Sequence", "decoders": parts}:
            return math.prod(map(_growth, parts))
        case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
            return max(1.0, len(content) / max(1, len(pattern)))
        case {"type": "Replace", "content": content}:
            # It may match nothing at all, before each character.
            return 1.0 + len(content)
        case {"type": "Prepend", "prepend": text}:
            return 1.0 + len(text)
        case {"type": "Precompiled", "precompiled_charsmap": charsmap}:
            return float(_longest_replacement(charsmap))
    return 1.0


def _longest_replacement(charsmap: str) -> int:
    """Characters: each match is replaced by one of the texts behind its trie, or an end of one.

    SentencePiece's format, in base64: four bytes of the trie's size, the trie, texts that end with
    a zero.
    """
    raw = base64.b64decode(charsmap)
    texts = raw[4 + int.from_bytes(raw[:4], "little") :]
    return max(len(text.decode("utf-8", "replace")) for text in texts.split(b"\0"))
