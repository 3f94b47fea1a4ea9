"""One sequence in a model's batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlxpool_server.engine.backend import TokenScores
from mlxpool_server.errors import MlxpoolError
from mlxpool_server.mlx_backend.adapters.adapter import Adapter
from mlxpool_server.mlx_backend.row_mask import RowMask
from mlxpool_server.mlx_backend.sampling.row import SampledRow


@dataclass(slots=True, eq=False)
class Row:
    """`slot` is the engine's name for it."""

    slot: int
    prompt: tuple[int, ...]
    sampled: SampledRow
    # Prompt tokens that are in its cache.
    num_done: int = 0
    # Those of them that were there before it came.
    num_cached: int = 0
    generated: list[int] = field(default_factory=list)
    # None: any token may come.
    mask: RowMask | None = None
    # What comes next, whatever is sampled.
    forced: list[int] = field(default_factory=list)
    # None: nobody asked for log-probabilities.
    top_logprobs: int | None = None
    # Those of the last token, until they are told.
    scores: TokenScores | None = None
    # No more are wanted of it; 0: nobody said, and none is guessed.
    max_tokens: int = 0
    may_be_forced: bool = False
    # None: the model as it is.
    adapter: Adapter | None = None
    # What who guesses knows about it.
    guesser: object = None
    # How many of its last step's tokens, the first ones, were drafts.
    num_drafted: int = 0

    @property
    def prefix_owner(self) -> int:
        """Whose prompts can share what theirs left in the caches."""
        return 0 if self.adapter is None else self.adapter.number

    @property
    def num_left(self) -> int:
        return len(self.prompt) - self.num_done

    @property
    def is_plain_greedy(self) -> bool:
        return self.sampled.is_plain_greedy and self.mask is None

    @property
    def failure(self) -> MlxpoolError | None:
        """Why it alone cannot go on."""
        return None if self.mask is None else self.mask.error

    @property
    def token(self) -> int:
        """The last one that was generated."""
        return self.generated[-1]

    def accept(self, token: int) -> None:
        """Take the token that was sampled, or the one that has to come in its place."""
        if self.forced:
            token = self.forced.pop(0)
        self.generated.append(token)
        self.sampled.accept(token)


def adapters_of(rows: Sequence[Row]) -> list[Adapter | None]:
    return [row.adapter for row in rows]
