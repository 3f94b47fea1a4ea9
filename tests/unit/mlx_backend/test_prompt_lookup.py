"""Which tokens are guessed, how many, and whether it pays."""

from __future__ import annotations

from mlxpool_server.mlx_backend.drafting.pace import (
    MAX_MISSES,
    MIN_PASSES,
    PAUSE_STEPS,
    DraftPace,
)
from mlxpool_server.mlx_backend.drafting.prompt_lookup import FIRST_WIDTH, PromptLookup


def test_what_followed_before_is_guessed() -> None:
    """The latest place where the last three tokens stood; what followed them there."""
    lookup = PromptLookup([1, 2, 3, 9, 8, 7, 1, 2, 3, 5, 6], 8)
    assert lookup.draft(8) == []
    lookup.extend([1, 2, 3])
    assert lookup.draft(8) == [5, 6, 1]
    lookup.extend([9, 8])
    # Not the three, but the last two.
    assert lookup.draft(1) == [7]
    assert lookup.draft(0) == []


def test_a_circle_is_guessed_round_and_round() -> None:
    """Also further than the tokens that are there."""
    lookup = PromptLookup([7, 1, 2, 1, 2, 1, 2], 8)
    lookup.learn(1, 1)
    assert lookup.draft(8) == [1, 2, 1, 2, 1, 2]


def test_guesses_grow_while_they_are_right() -> None:
    """Doubled up to the most, to one more than was right, and halved when none was."""
    lookup = PromptLookup([1] * 50, 8)
    assert len(lookup.draft(99)) == FIRST_WIDTH
    widths = []
    for num_drafted, num_accepted in [(3, 3), (6, 6), (8, 8), (8, 2), (3, 0), (1, 0), (1, 0)]:
        lookup.learn(num_drafted, num_accepted)
        widths.append(len(lookup.draft(99)))
    assert widths == [6, 8, 8, 3, 1, 1, 1]


def test_drafts_that_do_not_pay_are_paused() -> None:
    """Where a token costs more with them than without; they are tried again, for so many rows."""
    pace = DraftPace()
    for _ in range(MIN_PASSES):
        pace.learn(4, 4, 0.010, has_guesses=False)
        assert pace.is_worth(4)
        pace.learn(4, 5, 0.030, has_guesses=True)
    asked = [pace.is_worth(4) for _ in range(PAUSE_STEPS + 1)]
    assert asked == [False] * PAUSE_STEPS + [True]
    assert pace.is_worth(1)


def test_looking_in_vain_is_given_a_rest() -> None:
    """For longer each time, until somebody has a guess again."""
    pace = DraftPace()

    def rest() -> int:
        for _ in range(MAX_MISSES):
            assert pace.is_worth(1)
            pace.looked(found=False)
        steps = 0
        while not pace.is_worth(1):
            steps += 1
        return steps

    assert [rest() for _ in range(5)] == [8, 16, 32, 64, 64]
    pace.looked(found=True)
    assert rest() == 8


def test_drafts_that_pay_go_on() -> None:
    """A pass may take three times as long when it brings four times the tokens."""
    pace = DraftPace()
    for _ in range(10 * MIN_PASSES):
        pace.learn(1, 1, 0.010, has_guesses=False)
        pace.learn(1, 4, 0.030, has_guesses=True)
        assert pace.is_worth(1)
