"""Rows under constraints in a batch with others, sampled here and on the device."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from mlxpool_server.domain import Constraint, ConstraintSyntax, Layout, ModelSpec, SamplingParams
from mlxpool_server.engine.backend import Guide
from mlxpool_server.errors import BadConstraintError, MlxpoolError
from mlxpool_server.mlx_backend import mask_maker
from mlxpool_server.mlx_backend.batch import MlxBatch
from mlxpool_server.mlx_backend.loaded_model import MlxModel
from mlxpool_server.mlx_backend.loader import MlxLoader
from mlxpool_server.mlx_backend.tokenizer import MlxTokenizer

GREEDY = SamplingParams(temperature=0.0, seed=1)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, seed=5)
PENALISED = SamplingParams(temperature=0.8, repetition_penalty=1.3, seed=9)
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["he", "hello"]}, "ok": {"type": "boolean"}},
    "required": ["kind", "ok"],
    "additionalProperties": False,
}
CONSTRAINT = Constraint(ConstraintSyntax.JSON_SCHEMA, json.dumps(SCHEMA))
TOKENS = 40


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> MlxTokenizer:
    loader = MlxLoader(prefill_step_tokens=16, default_layout=Layout.FLOAT32)
    return loader.load_tokenizer(ModelSpec("tiny", folder))


@pytest.fixture(params=[True, False], ids=["on host", "on device"])
def batch(model: MlxModel, request: pytest.FixtureRequest) -> Iterator[MlxBatch]:
    batch = model.new_runner()
    batch._samples_on_host = request.param
    yield batch
    batch.close()


def run(batch: MlxBatch, tokenizer: MlxTokenizer, slots: set[int]) -> dict[int, list[int]]:
    """Until each of these slots is at its end, or has TOKENS."""
    got: dict[int, list[int]] = {slot: [] for slot in slots}
    running = set(slots)
    while running:
        output = batch.step()
        assert not output.failed
        for slot, token in output.tokens:
            if slot in running:
                got[slot].append(token)
                if token in tokenizer.eos_token_ids or len(got[slot]) == TOKENS:
                    running.remove(slot)
                    batch.remove([slot])
    return got


def text_of(tokenizer: MlxTokenizer, tokens: list[int]) -> str:
    assert tokens[-1] in tokenizer.eos_token_ids
    return b"".join(map(tokenizer.piece, tokens[:-1])).decode()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, PENALISED])
def test_the_output_is_valid(
    batch: MlxBatch, tokenizer: MlxTokenizer, sampling: SamplingParams
) -> None:
    """A random model's output is JSON of the schema, and it ends where the schema says."""
    batch.add(0, [1, 2, 3], sampling, tokenizer.compile(CONSTRAINT))
    value = json.loads(text_of(tokenizer, run(batch, tokenizer, {0})[0]))
    assert value["kind"] in {"he", "hello"}
    assert isinstance(value["ok"], bool)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, PENALISED])
def test_neighbours_are_not_disturbed(
    batch: MlxBatch, model: MlxModel, tokenizer: MlxTokenizer, sampling: SamplingParams
) -> None:
    """The same tokens as alone, while constrained rows join and leave."""
    alone = model.new_runner()
    alone._samples_on_host = batch._samples_on_host
    alone.add(0, [5, 6], sampling)
    expected = run(alone, tokenizer, {0})[0]
    alone.close()
    got: list[int] = []
    batch.add(0, [5, 6], sampling)
    step = 0
    while len(got) < len(expected):
        if step % 9 == 2:
            batch.add(100 + step, [7] * (step + 1), GREEDY, tokenizer.compile(CONSTRAINT))
        for slot, token in batch.step().tokens:
            if slot == 0:
                got.append(token)
            elif token in tokenizer.eos_token_ids:
                batch.remove([slot])
        step += 1
    assert got[: len(expected)] == expected


def test_a_constrained_row_is_the_same_in_company(batch: MlxBatch, tokenizer: MlxTokenizer) -> None:
    """Whatever its neighbours do, with a seed of its own."""
    batch.add(0, [1, 2], SAMPLED, tokenizer.compile(CONSTRAINT))
    expected = run(batch, tokenizer, {0})[0]
    batch.add(1, [3], PENALISED)
    batch.step()
    batch.add(0, [1, 2], SAMPLED, tokenizer.compile(CONSTRAINT))
    batch.add(2, [9] * 20, GREEDY, tokenizer.compile(CONSTRAINT))
    assert run(batch, tokenizer, {0, 1, 2})[0] == expected


class Failing:
    """Gives up at its second token."""

    def __init__(self, guide: Guide) -> None:
        self._guide = guide

    def allowed(self) -> bytes:
        return self._guide.allowed()

    def advance(self, token_id: int) -> None:
        raise BadConstraintError("constraint", "too complex")


class PanicException(BaseException):
    """As a Rust library raises it: its class cannot be imported."""


class Raising(Failing):
    def __init__(self, guide: Guide, error: BaseException) -> None:
        super().__init__(guide)
        self._error = error

    def advance(self, token_id: int) -> None:
        raise self._error


class Stuck(Failing):
    """Its second token takes until `may_go_on`."""

    def __init__(self, guide: Guide) -> None:
        super().__init__(guide)
        self.may_go_on = threading.Event()

    def advance(self, token_id: int) -> None:
        self.may_go_on.wait(60)


def until_failed(batch: MlxBatch) -> tuple[MlxpoolError, list[int]]:
    """What ends row 0, and what row 1 has by then."""
    tokens: list[int] = []
    while True:
        output = batch.step()
        tokens += [token for slot, token in output.tokens if slot == 1]
        if output.failed:
            ((slot, error),) = output.failed
            assert slot == 0
            batch.remove([0])
            return error, tokens


@pytest.mark.parametrize("error", [ValueError("no"), PanicException("no")])
def test_what_a_guide_raises_ends_its_row_only(
    batch: MlxBatch, tokenizer: MlxTokenizer, error: BaseException
) -> None:
    """A panic of the Rust library, too: the batch and its other rows go on."""
    batch.add(0, [1, 2], GREEDY, Raising(tokenizer.compile(CONSTRAINT), error))
    batch.add(1, [1, 2], GREEDY, tokenizer.compile(CONSTRAINT))
    failure, tokens = until_failed(batch)
    assert isinstance(failure, BadConstraintError)
    json.loads(text_of(tokenizer, tokens + run(batch, tokenizer, {1})[1]))


def test_a_guide_that_is_stuck_ends_its_row_only(
    batch: MlxBatch, tokenizer: MlxTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's thread waits for it for a bounded time; the other rows' masks are made."""
    monkeypatch.setattr(mask_maker, "MAX_MASK_S", 0.2)
    stuck = Stuck(tokenizer.compile(CONSTRAINT))
    batch.add(0, [1, 2], GREEDY, stuck)
    batch.add(1, [1, 2], GREEDY, tokenizer.compile(CONSTRAINT))
    try:
        failure, tokens = until_failed(batch)
        assert "0.2 s" in str(failure)
        json.loads(text_of(tokenizer, tokens + run(batch, tokenizer, {1})[1]))
    finally:
        stuck.may_go_on.set()


def test_a_guide_that_gives_up_fails_alone(batch: MlxBatch, tokenizer: MlxTokenizer) -> None:
    """Its row is named with the reason, and gets no token more; the others go on."""
    batch.add(0, [1, 2], GREEDY, Failing(tokenizer.compile(CONSTRAINT)))
    batch.add(1, [1, 2], GREEDY)
    mine: list[int] = []
    output = batch.step()
    while not output.failed:
        mine += [token for slot, token in output.tokens if slot == 0]
        output = batch.step()
    ((slot, error),) = output.failed
    assert (slot, str(error)) == (0, "constraint: too complex")
    batch.remove([0])
    assert len(mine) <= 1
    assert run(batch, tokenizer, {1})[1]


def test_beside_a_row_whose_tokens_are_given(batch: MlxBatch, tokenizer: MlxTokenizer) -> None:
    """Steps that wait for given tokens mask the other rows all the same."""
    given = [7, 8, 9]
    batch.add(0, [5, 6, 7], GREEDY, tokenizer.compile(CONSTRAINT))
    batch.add(1, [6, 7, 8], GREEDY)
    got: dict[int, list[int]] = {0: [], 1: []}
    while not (got[0] and got[0][-1] in tokenizer.eos_token_ids):
        output = batch.step()
        assert not output.failed
        for slot, token in output.tokens:
            got[slot].append(token)
            if slot == 1 and len(got[1]) in (3, 8):
                batch.force(1, given)
    assert got[1][3:6] == got[1][8:11] == given
    jsonschema.validate(json.loads(text_of(tokenizer, got[0])), SCHEMA)


class Anything:
    """Lets every token come, and its row be one that is chosen late."""

    def allowed(self) -> bytes:
        return b"\xff" * 1024

    def advance(self, token_id: int) -> None:
        """It does not matter which."""


def test_given_tokens_count_for_penalties(batch: MlxBatch) -> None:
    """A row that wants what it has seen wants what was given, beside a constrained one, too."""
    seeking = SamplingParams(temperature=0.0, presence_penalty=-1e4, penalty_context_size=2)
    given = [40, 41]
    batch.add(0, [5, 6, 7], GREEDY, Anything())
    batch.add(1, [6, 7, 8], seeking)
    got: list[int] = []
    while len(got) < 12:
        got += [token for slot, token in batch.step().tokens if slot == 1]
        if len(got) == 4:
            batch.force(1, given)
    assert got[4:6] == given
    assert set(got[6:]) <= set(given)
