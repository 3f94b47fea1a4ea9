"""A first, short batch on a new model: kernels are compiled, and what it cannot do shows.

It runs on the loader's thread, before the model has any users.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from mlxpool_server.domain import Footprint, SamplingParams
from mlxpool_server.errors import MlxpoolError
from mlxpool_server.mlx_backend.batch import MlxBatch
from mlxpool_server.mlx_backend.memory import device_kind
from mlxpool_server.mlx_backend.model_config import one_line

# Rows take turns with these: prompts of different lengths, and both ways to pick a token; half of
# them leave a step before the others.
PROMPT_TOKENS = (1, 2)
SAMPLINGS = (
    SamplingParams(temperature=0.0, seed=0),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=40, repetition_penalty=1.1, seed=0),
)
NUM_TOKENS = (3, 4)
CPU_ROWS = (2,)
# A GPU's kernels are chosen by the number of rows; CUDA's quantised products have one each for up
# to 16, 32 and 64.
GPU_ROWS = (2, 8, 1)
QUANTIZED_ROWS = (2, 8, 32, 64, 1)
# The most prompt tokens of one pass: all rows at once.
WARM_UP_TOKENS = max(PROMPT_TOKENS) * max(QUANTIZED_ROWS)
# Far more than a batch needs for so few tokens a row.
MAX_STEPS = 64


class _NewBatch(Protocol):
    def __call__(self, *, is_batchable: bool) -> MlxBatch: ...


def warm_up_bytes(footprint: Footprint) -> int:
    """What a warm-up takes at its worst, beside the weights."""
    num_rows = max(_batch_sizes(is_quantized=True))
    longest = max(PROMPT_TOKENS)
    return footprint.batch_bytes(num_rows, longest + max(NUM_TOKENS), num_rows * longest)


def warm_up(
    new_batch: _NewBatch,
    *,
    can_batch: bool,
    is_quantized: bool,
    vocab_size: int,
    processors: AbstractContextManager[None],
    check_wanted: Callable[[], None],
) -> str:
    """Return why rows cannot share a batch; empty when they can, or when `can_batch` is False.

    `new_batch` makes a batch whose rows share it, or do not. `processors` is held for each step;
    between two of them `check_wanted` may raise a domain error.
    Raises: what a single row raises, alone.
    """
    problem = ""
    if can_batch:
        try:
            for num_rows in _batch_sizes(is_quantized=is_quantized):
                _run(new_batch(is_batchable=True), num_rows, vocab_size, processors, check_wanted)
        except MlxpoolError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the model's code raises
            problem = f"{type(error).__name__}: {one_line(error)}"
        else:
            return ""
    _run(new_batch(is_batchable=False), 1, vocab_size, processors, check_wanted)
    return problem


def _batch_sizes(*, is_quantized: bool) -> tuple[int, ...]:
    match device_kind():
        case "cpu":
            return CPU_ROWS
        case "cuda" if is_quantized:
            return QUANTIZED_ROWS
        case _:
            return GPU_ROWS


def _run(
    batch: MlxBatch,
    num_rows: int,
    vocab_size: int,
    processors: AbstractContextManager[None],
    check_wanted: Callable[[], None],
) -> None:
    missing = {row: NUM_TOKENS[row // 2 % len(NUM_TOKENS)] for row in range(num_rows)}
    for row in range(num_rows):
        num_tokens = PROMPT_TOKENS[row % len(PROMPT_TOKENS)]
        prompt = [token % max(1, vocab_size) for token in range(num_tokens)]
        batch.add(row, prompt, SAMPLINGS[row % len(SAMPLINGS)])
    try:
        for _ in range(MAX_STEPS):
            check_wanted()
            with processors:
                output = batch.step()
                # What was launched ahead may not run on when the processors are another's.
                batch.settle()
            for slot, _ in output.tokens:
                if slot in missing:
                    missing[slot] -= 1
            done = [slot for slot, left in missing.items() if left <= 0]
            batch.remove(done)
            for slot in done:
                del missing[slot]
            if not missing:
                return
        raise RuntimeError(f"{MAX_STEPS} steps gave too few tokens")
    finally:
        batch.close()
