"""GPT-OSS's harmony format: messages with a channel each; mlx-lm has no parser for it.

    <|channel|>analysis<|message|>a thought<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{}<|call|>
    <|start|>assistant<|channel|>final<|message|>the answer<|return|>

Source: https://developers.openai.com/cookbook/articles/openai-harmony
"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from typing import Any

INITIAL = "header"
PARSER = "harmony"
REASONING_START = "<|channel|>analysis<|message|>"
THOUGHT_END = "<|end|>"
# What ends a thought and begins the answer.
REASONING_END = f"{THOUGHT_END}<|start|>assistant<|channel|>final<|message|>"
EDGES = {
    "header": (
        (REASONING_START, "reasoning"),
        ("<|channel|>final<|message|>", "normal"),
        # A preamble, meant for the user.
        ("<|channel|>commentary<|message|>", "normal"),
        # To a function, or to a tool that nobody here has.
        (" to=", "tool"),
        # In a channel of another name, or with a format: <|channel|>final <|constrain|>json.
        ("<|message|>", "normal"),
    ),
    "reasoning": ((THOUGHT_END, "header"),),
    "normal": ((THOUGHT_END, "header"),),
    # <|call|> ends the output; a model that goes on has written this instead.
    "tool": (("<|call|>", "header"), (THOUGHT_END, "header")),
}
_MARKERS = ("<|channel|>", "<|message|>", "<|call|>", "<|return|>")


def is_spoken(vocab: Container[str]) -> bool:
    return all(marker in vocab for marker in _MARKERS)


_CALL = re.compile(r"functions\.(?P<name>[^\s<]+)[^{]*?<\|message\|>(?P<arguments>.*)", re.DOTALL)


def parse_tool_call(text: str, _tools: Any = None) -> dict[str, Any]:
    """Read what follows `to=`. Raises: ValueError."""
    match = _CALL.match(text)
    if match is None:
        raise ValueError("it has no name or no message")
    return {"name": match["name"], "arguments": json.loads(match["arguments"])}
