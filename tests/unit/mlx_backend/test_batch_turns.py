"""Who is next: new prompts, begun ones and running streams, by a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from mlx_lm.utils import load_model

from mlxpool_server.domain import Layout, ModelSpec, SamplingParams
from mlxpool_server.mlx_backend import batch as batch_module
from mlxpool_server.mlx_backend.batch import MlxBatch
from mlxpool_server.mlx_backend.last_rows import LastRows
from mlxpool_server.mlx_backend.loaded_model import MlxModel
from mlxpool_server.mlx_backend.loader import MlxLoader
from mlxpool_server.mlx_backend.model_caches import batch_problem
from mlxpool_server.mlx_backend.prefill_pace import MIN_STALL_S
from references.generation import greedy_alone
from tiny_models import VOCAB_SIZE, write_model

GREEDY = SamplingParams(temperature=0.0, seed=1)
CHUNK = 16
LONG = list(range(250)) * 2


class Clock:
    """Each look at it takes a little time."""

    def __init__(self, tick_s: float = 0.004) -> None:
        self.now = 1000.0
        self.tick_s = tick_s

    def __call__(self) -> float:
        self.now += self.tick_s
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(batch_module, "time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> MlxModel:
    loader = MlxLoader(prefill_step_tokens=CHUNK, default_layout=Layout.FLOAT32)
    spec = ModelSpec("tiny", write_model(tmp_path_factory.mktemp("models") / "llama"))
    return loader.load(spec, lambda _: None, lambda: False)


@pytest.fixture
def batch(llama: MlxModel) -> Iterator[MlxBatch]:
    batch = llama.new_runner()
    yield batch
    batch.close()


def begin(batch: MlxBatch, count: int) -> dict[int, int]:
    """So many long prompts of which some is done; how much, by slot."""
    done: dict[int, int] = {}
    for slot in range(count):
        batch.add(slot, LONG, GREEDY)
    while len(done) < count:
        done |= dict(batch.step().prefilled)
    return done


def test_a_long_prompt_advances_while_short_ones_keep_coming(batch: MlxBatch, clock: Clock) -> None:
    """With a new prompt before every step, each second pass is the long one's."""
    batch.add(0, LONG, GREEDY)
    passes = 0
    for slot in range(1, 1000):
        batch.add(slot, [1, 2, 3], GREEDY)
        output = batch.step()
        passes += bool(output.prefilled)
        batch.remove([each for each, _ in output.tokens if each != 0])
        if 0 in dict(output.tokens):
            break
    else:
        pytest.fail("the long prompt never ended")
    assert passes <= 2 * (len(LONG) // CHUNK + 1) + 1


def test_short_prompts_are_served_while_long_ones_are_worked_on(
    batch: MlxBatch, clock: Clock
) -> None:
    """However many long ones were begun, a new one waits for one pass of theirs at most."""
    begin(batch, 4)
    for slot in range(10, 20):
        batch.add(slot, [1, 2, 3], GREEDY)
        waited = 0
        while True:
            output = batch.step()
            if slot in dict(output.tokens):
                break
            waited += bool(output.prefilled)
        assert waited <= 1
        batch.remove([slot])


def test_begun_prompts_take_turns(batch: MlxBatch, clock: Clock) -> None:
    """Once all are begun, each advances by a chunk before one advances by a second."""
    before = begin(batch, 3)
    done = dict(before)
    for step in range(1, 40):
        done |= dict(batch.step().prefilled)
        advances = [done[slot] - before[slot] for slot in range(3)]
        assert sum(advances) == step * CHUNK
        assert max(advances) - min(advances) <= CHUNK


@pytest.mark.parametrize("tick_s", [0.0005, 0.004, 0.03, 1.0])
def test_streams_go_on_while_prompts_are_worked_on(
    batch: MlxBatch, clock: Clock, tick_s: float
) -> None:
    """Whatever a pass takes: never longer without a token than the pace allows, and a pass."""
    batch.add(0, [1, 2, 3], GREEDY)
    while not batch.step().tokens:
        pass
    batch.step()
    clock.tick_s = tick_s
    for slot in range(1, 4):
        batch.add(slot, LONG, GREEDY)
    # The last step's end, the looks at the clock of the pass that ends it, and the next step.
    said_at, longest_s, advanced = clock.now, 0.0, 0
    for _ in range(40):
        output = batch.step()
        advanced += bool(output.prefilled)
        if 0 in dict(output.tokens):
            longest_s = max(longest_s, clock.now - said_at)
            said_at = clock.now
    assert advanced > 5
    assert longest_s <= batch._pace.target_s(is_decoding=True) + 8 * tick_s


def test_streams_get_a_token_with_each_pass(batch: MlxBatch, clock: Clock) -> None:
    """The streams' next step is under way behind the pass, and one before it is handed out."""
    batch.add(0, [1, 2], GREEDY)
    batch.step()
    batch.step()
    clock.tick_s = 10.0
    batch.add(1, [3, 4], GREEDY)
    output = batch.step()
    assert dict(output.prefilled) == {1: 2}
    assert [slot for slot, _ in output.tokens] == [0, 1]


def test_prompts_go_first_while_nobody_generates(batch: MlxBatch, clock: Clock) -> None:
    """All that waits is worked on before the first step of decoding has to be."""
    batch.add(0, list(range(40)), GREEDY)
    outputs = [batch.step() for _ in range(3)]
    assert [dict(output.prefilled)[0] for output in outputs] == [16, 32, 40]
    assert len(outputs[-1].tokens) == 1


def test_short_prompts_share_a_pass(batch: MlxBatch, clock: Clock) -> None:
    """As many as fit, padding included."""
    for slot, length in enumerate((3, 5, 4, 9)):
        batch.add(slot, list(range(length)), GREEDY)
    # Three of up to five tokens; with the fourth it would be 36.
    passes = [dict(batch.step().prefilled) for _ in range(5)]
    assert [each for each in passes if each] == [{0: 3, 1: 5, 2: 4}, {3: 9}]


def test_removed_prompts_leave_in_every_phase(batch: MlxBatch, clock: Clock) -> None:
    """Waiting, begun, in a group; nothing is held or said of them afterwards."""
    for slot in range(3):
        batch.add(slot, LONG, GREEDY)
    batch.step()
    batch.step()
    batch.remove([0, 2, 77])
    seen = {slot for _ in range(5) for slot, _ in batch.step().prefilled}
    assert seen == {1}
    batch.remove([1])
    assert batch.kv_bytes() == 0
    output = batch.step()
    assert output.tokens == output.prefilled == ()


# ---------------------------------------------------------------- models of one row


class OneRowCache(KVCache):  # type: ignore[misc]
    """Cannot be merged."""

    merge = property()


def caches_of_one_row(kind: Callable[[], Any]) -> Callable[[], list[Any]]:
    return lambda: [kind() for _ in range(4)]


@pytest.mark.parametrize(
    "kind",
    [lambda: QuantizedKVCache(group_size=32, bits=8), OneRowCache],
    ids=["quantised", "without merge"],
)
def test_a_model_that_cannot_be_batched_serves_a_row_at_a_time(
    kind: Callable[[], Any], tmp_path: Path, clock: Clock
) -> None:
    """Several at once, joining and leaving: each gets the tokens that it gets alone."""
    folder = write_model(tmp_path / "m", head_dim=32)
    model, reference = (load_model(folder)[0] for _ in range(2))
    model.make_cache = reference.make_cache = caches_of_one_row(kind)
    assert batch_problem(model)
    batch = MlxBatch(
        LastRows(model), vocab_size=VOCAB_SIZE, is_batchable=False, prefill_tokens=CHUNK
    )
    prompts = [[1, 2, 3], list(range(40)), [9], list(range(100, 117)), LONG[:90]]
    expected = [
        greedy_alone(reference, prompt, 12, caches=reference.make_cache()) for prompt in prompts
    ]
    got: list[list[int]] = [[] for _ in prompts]
    step = 0
    while any(len(tokens) < 12 for tokens in got):
        if step % 3 == 0 and step // 3 < len(prompts):
            batch.add(step // 3, prompts[step // 3], GREEDY)
        for slot, token in batch.step().tokens:
            got[slot].append(token)
        batch.remove([slot for slot, tokens in enumerate(got) if len(tokens) >= 12])
        step += 1
        assert step < 500
    assert sum(len(tokens) for tokens in expected) > 30
    assert [tokens[: len(known)] for tokens, known in zip(got, expected, strict=True)] == expected
    assert batch.kv_bytes() == 0
    mx.clear_cache()


def test_a_model_that_cannot_be_batched_lets_rows_leave(tmp_path: Path, clock: Clock) -> None:
    """Waiting, begun and generating ones."""
    folder = write_model(tmp_path / "m", "llama4")
    loader = MlxLoader(prefill_step_tokens=CHUNK, default_layout=Layout.FLOAT32)
    model = loader.load(ModelSpec("m", folder), lambda _: None, lambda: False)
    batch = model.new_runner()
    expected = greedy_alone(load_model(folder)[0], [5, 6], 8)
    for slot, prompt in enumerate(([5, 6], LONG, [7], LONG)):
        batch.add(slot, prompt, GREEDY)
    got = [token for _ in range(4) for slot, token in batch.step().tokens if slot == 0]
    batch.remove([1, 2, 3])
    while len(got) < 8:
        got += [token for _, token in batch.step().tokens]
    assert len(expected) > 3
    assert got[: len(expected)] == expected
    batch.remove([0])
    assert batch.kv_bytes() == 0


def test_rows_that_leave_one_by_one_leave_at_once(batch: MlxBatch) -> None:
    """Cancelled together, 16 streams would leave 15 copies of the caches behind, all in use."""
    batch.limit_prompt_cache(1 << 24)
    for slot in range(16):
        batch.add(slot, [slot, *range(100)], GREEDY)
    said: set[int] = set()
    while len(said) < 16:
        said |= {slot for slot, _ in batch.step().tokens}
    batch.settle()
    kv_bytes = batch.kv_bytes()
    mx.clear_cache()
    held_bytes = mx.get_active_memory()
    mx.reset_peak_memory()
    for slot in range(15):
        batch.remove([slot])
    tokens = [token for _ in range(3) for token in batch.step().tokens]
    batch.settle()
    assert {slot for slot, _ in tokens} == {15}
    # What it was, what stays of it, and what is kept of the prompts.
    assert mx.get_peak_memory() - held_bytes < 2 * kv_bytes


@pytest.fixture
def gathering(batch: MlxBatch, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> MlxBatch:
    """A batch as on CUDA, with one row that decodes, soon after a pass of 10 ms."""
    monkeypatch.setattr(batch, "_gathers_prompts", True)
    batch.add(0, [1, 2], GREEDY)
    batch.step()
    batch.step()
    clock.tick_s = 0.0
    monkeypatch.setattr(batch._pace, "_pass_s", 0.01)
    return batch


def test_prompts_that_come_soon_after_a_pass_share_the_next(
    gathering: MlxBatch, clock: Clock
) -> None:
    """On CUDA, where a pass over one costs as much as one over both."""
    gathering.add(1, [3, 4], GREEDY)
    assert gathering.step().prefilled == ()
    gathering.add(2, [5, 6], GREEDY)
    clock.now += MIN_STALL_S
    assert gathering.step().prefilled == ((1, 2), (2, 2))


def test_streams_go_on_while_prompts_gather(gathering: MlxBatch) -> None:
    """A step without a pass is a token for every row."""
    gathering.add(1, [3, 4], GREEDY)
    assert [[slot for slot, _ in gathering.step().tokens] for _ in range(2)] == [[0], [0]]


def test_enough_prompts_do_not_wait_for_more(gathering: MlxBatch) -> None:
    """A pass that is full begins at once."""
    for slot in range(1, 1 + batch_module.FULL_PASS):
        gathering.add(slot, [slot, 4], GREEDY)
    assert len(gathering.step().prefilled) == batch_module.FULL_PASS


def test_a_prompt_waits_for_no_one_where_nobody_decodes(gathering: MlxBatch) -> None:
    """There is nothing that a pass of its own could hold up."""
    gathering.remove([0])
    gathering.add(1, [3, 4], GREEDY)
    assert gathering.step().prefilled == ((1, 2),)


def test_a_prompt_whose_beginning_is_cached_does_not_wait(
    gathering: MlxBatch, clock: Clock
) -> None:
    """It goes alone, however many others there are."""
    gathering.limit_prompt_cache(1 << 20)
    gathering.add(1, LONG, GREEDY)
    clock.now += MIN_STALL_S
    while (1, len(LONG)) not in gathering.step().prefilled:
        pass
    gathering.remove([1])
    gathering.step()
    gathering.add(2, [*LONG, 7], GREEDY)
    assert gathering.step().cached


def test_on_a_cpu_prompts_do_not_wait(batch: MlxBatch, clock: Clock) -> None:
    """A pass costs there what its tokens do."""
    batch.add(0, [1, 2], GREEDY)
    batch.step()
    clock.tick_s = 0.0
    batch.add(1, [3, 4], GREEDY)
    assert batch.step().prefilled == ((1, 2),)
