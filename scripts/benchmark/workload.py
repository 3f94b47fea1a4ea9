"""What is asked of every target, the same in each, and what is noted of its answers."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

SamplingKind = Literal["greedy", "sampled", "mixed"]

WORDS_FILE = "words.json"
# Streams that all ask for the same length end together, and every prefill comes in one burst.
LENGTH_SPREAD = 0.5


@dataclass(frozen=True, slots=True)
class Sampling:
    """The parameters that every target has. Zero, or one for top_p, is no filter."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None


GREEDY = Sampling()
SAMPLED = Sampling(temperature=0.8, top_p=0.95)


@dataclass(frozen=True, slots=True)
class Word:
    """A token whose text, a space and letters, is read back as that token wherever it stands."""

    id: int
    text: str


@dataclass(frozen=True, slots=True)
class Request:
    model: str
    words: tuple[Word, ...]
    max_tokens: int
    sampling: Sampling = GREEDY

    @property
    def text(self) -> str:
        return "".join(word.text for word in self.words)

    @property
    def ids(self) -> list[int]:
        return [word.id for word in self.words]


@dataclass(slots=True)
class Answer:
    """When which token arrived; all times by `time.perf_counter()`.

    `counts[i]` is the number of tokens that had come at `times[i]`. Where the server does not say
    it with each message, the messages are counted, and `total` brings the number of tokens in the
    end.
    """

    max_tokens: int
    start_s: float
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    total: int | None = None
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        return self.total is not None


class RequestError(Exception):
    """A target did not answer as it was asked to."""


def check_length(request: Request, num_tokens: int) -> None:
    """Raises: RequestError when the answer is not as long as was asked for."""
    if num_tokens != request.max_tokens:
        raise RequestError(f"{num_tokens} tokens instead of {request.max_tokens}")


def read_words(folder: Path) -> list[Word]:
    pairs = json.loads((folder / WORDS_FILE).read_text(encoding="utf-8"))
    return [Word(token_id, text) for token_id, text in pairs]


class RequestSource:
    """Requests by stream and number: every target gets the same ones."""

    def __init__(self, words: list[Word], *, prompt_tokens: int, max_tokens: int) -> None:
        self._words = words
        self._prompt_tokens = prompt_tokens
        self._max_tokens = max_tokens

    @property
    def max_tokens(self) -> int:
        """The mean over many requests."""
        return self._max_tokens

    def request(self, key: str, *, sampling: SamplingKind = "greedy", model: str = "a") -> Request:
        """Return the request of this key: another key, another prompt and length."""
        dice = random.Random(key)  # noqa: S311 - nothing secret
        spread = int(self._max_tokens * LENGTH_SPREAD)
        return Request(
            model=model,
            words=self.words(key, self._prompt_tokens),
            max_tokens=dice.randint(self._max_tokens - spread, self._max_tokens + spread),
            sampling=_sampling(sampling, dice),
        )

    def words(self, key: str, length: int) -> tuple[Word, ...]:
        dice = random.Random(f"words of {key}")  # noqa: S311 - nothing secret
        return tuple(dice.choices(self._words, k=length))


def _sampling(kind: SamplingKind, dice: random.Random) -> Sampling:
    match kind:
        case "greedy":
            return GREEDY
        case "sampled":
            return SAMPLED
        case "mixed":
            return _mixed(dice)


def _mixed(dice: random.Random) -> Sampling:
    """One of millions: no two requests of a run share their parameters."""
    return Sampling(
        temperature=round(dice.uniform(0.3, 1.3), 3),
        top_p=round(dice.uniform(0.8, 1.0), 3),
        top_k=dice.choice([0, 20, 40, 100]),
        min_p=dice.choice([0.0, 0.02, 0.05]),
        repetition_penalty=dice.choice([0.0, 1.1, 1.2]),
        presence_penalty=dice.choice([0.0, 0.3]),
        frequency_penalty=dice.choice([0.0, 0.2]),
        # mlx_lm.server takes seeded requests out of the batch, so only every fourth has one.
        seed=dice.randint(1, 1 << 30) if dice.random() < 0.25 else None,  # noqa: PLR2004
    )
