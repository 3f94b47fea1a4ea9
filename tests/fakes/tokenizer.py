"""Every byte is a token; 256 ends the text."""

from __future__ import annotations

import codecs
import threading
from collections.abc import Sequence

from mlxpool_server.domain import ChatMessage, Role
from mlxpool_server.errors import InvalidFieldError

EOS = 256
VOCAB_SIZE = 257


class FakeDecoder:
    """`fails_on`: the token that it cannot decode."""

    def __init__(self, fails_on: int | None = None) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._fails_on = fails_on

    def push(self, token_id: int) -> str:
        if token_id == self._fails_on:
            raise RuntimeError("cannot decode")
        return "" if token_id == EOS else self._utf8.decode(bytes([token_id]))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class FakeTokenizer:
    """`may_encode` cleared: encoding waits until it is set."""

    def __init__(self, *, has_chat_template: bool = True) -> None:
        self.has_chat_template = has_chat_template
        self.vocab_size = VOCAB_SIZE
        self.max_token_chars = 1
        self.eos_token_ids = frozenset({EOS})
        self.may_encode = threading.Event()
        self.may_encode.set()
        self.is_encoding = threading.Event()
        self.threads: set[str] = set()

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        self.threads.add(threading.current_thread().name)
        self.is_encoding.set()
        if not self.may_encode.wait(timeout=30):
            raise TimeoutError("the test never let encode go on")
        return tuple(text.encode())

    def render_chat(self, messages: Sequence[ChatMessage]) -> str:
        if messages[0].role is Role.ASSISTANT:
            raise InvalidFieldError("prompt.chat.messages", "the user has to begin")
        return "".join(f"<{message.role.value}>{message.text}" for message in messages)

    def piece(self, token_id: int) -> bytes:
        self.threads.add(threading.current_thread().name)
        return b"" if token_id == EOS else bytes([token_id])

    def new_decoder(self) -> FakeDecoder:
        return FakeDecoder()
