"""One OpenAI chat request through the gateway, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai

from replicas.fleet import Fleet

ANSWER_TIMEOUT_S = 300.0


@dataclass(slots=True)
class Asked:
    """`ended_at` and `asked_at` are instants of time.perf_counter."""

    asked_at: float = field(default_factory=time.perf_counter)
    first_s: float | None = None
    ended_at: float = 0.0
    text: str = ""
    # Empty: the answer has none, or did not come to its end.
    finish_reason: str = ""
    problem: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_s(self) -> float:
        return self.ended_at - self.asked_at

    def count(self, usage: Any) -> None:
        self.prompt_tokens = usage.prompt_tokens
        self.cached_tokens = usage.prompt_tokens_details.cached_tokens


def client(fleet: Fleet) -> openai.OpenAI:
    """It retries nothing: what the gateway does is what is seen."""
    return openai.OpenAI(
        base_url=f"{fleet.gateway.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_TIMEOUT_S
    )


def ask(
    fleet: Fleet,
    text: str,
    *,
    max_tokens: int,
    stream: bool = True,
    look: Callable[[int], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Asked:
    """Ask greedily for exactly so many tokens.

    Of a stream `look` gets the number of chunks so far, `tell` the text of each.
    """
    asked = Asked()
    request: dict[str, Any] = {
        "model": fleet.model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "extra_body": {"ignore_eos": True},
    } | options
    try:
        with client(fleet) as opened:
            if stream:
                _read(opened, request, asked, look, tell)
            else:
                answer = _create(opened)(**request)
                asked.text = answer.choices[0].message.content or ""
                asked.finish_reason = answer.choices[0].finish_reason
                asked.count(answer.usage)
    except openai.APIError as error:
        asked.problem = f"{type(error).__name__}: {error}"
    asked.ended_at = time.perf_counter()
    return asked


def _create(opened: openai.OpenAI) -> Any:
    # Its overloads know no request that is put together.
    return opened.chat.completions.create


def _read(
    opened: openai.OpenAI,
    request: dict[str, Any],
    asked: Asked,
    look: Callable[[int], None],
    tell: Callable[[str], None],
) -> None:
    num_chunks = 0
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with _create(opened)(**request, **options) as chunks:
        for chunk in chunks:
            if chunk.usage:
                asked.count(chunk.usage)
            for choice in chunk.choices:
                asked.finish_reason = choice.finish_reason or asked.finish_reason
                if choice.delta.content:
                    asked.first_s = asked.first_s or time.perf_counter() - asked.asked_at
                    asked.text += choice.delta.content
                    num_chunks += 1
                    tell(choice.delta.content)
                    look(num_chunks)
