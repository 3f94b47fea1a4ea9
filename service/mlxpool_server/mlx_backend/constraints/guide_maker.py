"""Guides for one tokenizer: of constraints and of forced calls, behind a model's thoughts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from functools import cached_property

from mlxpool_server.domain import ChatPrompt, Constraint
from mlxpool_server.engine.backend import Guide, TextDecoder
from mlxpool_server.mlx_backend import chat_variables, harmony
from mlxpool_server.mlx_backend.channel_sorter import NORMAL, Sorter
from mlxpool_server.mlx_backend.constraints.behind_thoughts import BehindThoughts, Thoughts, as_bits
from mlxpool_server.mlx_backend.constraints.call_grammar import Calls, call_constraint
from mlxpool_server.mlx_backend.constraints.compiler import ConstraintCompiler
from mlxpool_server.mlx_backend.output_format import Family


class GuideMaker:
    """Any thread, several at once."""

    def __init__(
        self,
        pieces: Sequence[bytes],
        *,
        special_ids: Collection[int],
        eos_ids: Sequence[int],
        family: Family,
        encode: Callable[[str], tuple[int, ...]],
        new_decoder: Callable[[], TextDecoder],
    ) -> None:
        """`pieces`: the bytes of each token of the vocabulary; `family`: how the model writes."""
        self._pieces = pieces
        self._special_ids = special_ids
        self._eos_ids = eos_ids
        self._family = family
        self._encode = encode
        self._new_decoder = new_decoder
        self._compiler: ConstraintCompiler | None = None
        self._lock = threading.Lock()

    def guide(
        self, constraint: Constraint | None, chat: ChatPrompt | None, sorter: Sorter | None
    ) -> Guide | None:
        """As Tokenizer.compile; `sorter` is a new one of the chat's, which the guide keeps."""
        if constraint is None and chat is not None and chat.must_call:
            constraint = self._forced_call(chat)
        if constraint is None:
            return None
        guide = self._compiled(constraint)
        thoughts = None if chat is None or sorter is None else self._thoughts(chat, sorter)
        if thoughts is None:
            return guide
        return BehindThoughts(guide, self._compiled(constraint), thoughts)

    def _forced_call(self, chat: ChatPrompt) -> Constraint:
        tools = chat_variables.tools(chat) or []
        named = [tool for tool in tools if tool["function"]["name"] == chat.called_tool]
        calls = Calls(named or tools, is_one=bool(named), marker=self._marker_in_lark)
        return call_constraint(self._family.parser, calls)

    def _marker_in_lark(self, marker: str) -> str:
        return " ".join(f"<[{token_id}]>" for token_id in self._encode(marker))

    def _thoughts(self, chat: ChatPrompt, sorter: Sorter) -> Thoughts | None:
        """None: the output's beginning is the answer's."""
        # In harmony a call is a message of its own, as a thought is.
        is_message = chat.must_call and self._family.parser == harmony.PARSER
        ends = frozenset({harmony.INITIAL if is_message else NORMAL})
        start: tuple[int, ...] = ()
        if not (chat.continue_final_message or chat.enable_reasoning is False):
            start = self._encode(self._family.reasoning_start)
        if sorter.state in ends and not start:
            return None
        return Thoughts(
            sorter=sorter,
            decoder=self._new_decoder(),
            ends=ends,
            start=start,
            free=self._free_bits,
            spaces=self._space_bits,
            encode=self._encode,
        )

    def _compiled(self, constraint: Constraint) -> Guide:
        with self._lock:
            if self._compiler is None:
                self._compiler = ConstraintCompiler(
                    self._pieces,
                    special_ids=sorted(self._special_ids),
                    eos_ids=self._eos_ids,
                    encode=self._encode,
                )
        return self._compiler.compile(constraint)

    @cached_property
    def _free_bits(self) -> bytes:
        vocab_size = len(self._pieces)
        return as_bits(frozenset(range(vocab_size)).difference(self._eos_ids), vocab_size)

    @cached_property
    def _space_bits(self) -> bytes:
        spaces = [token_id for token_id, piece in enumerate(self._pieces) if piece.isspace()]
        return as_bits(spaces, len(self._pieces))
