"""The first run of a new model, on the loader's thread: what it shows and what it leaves."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from structlog.testing import capture_logs

from fakes.counting_lock import CountingLock
from mlxpool_server.domain import Footprint, Layout, LoadPhase, LoadProgress, ModelSpec
from mlxpool_server.errors import LoadFailedError, LoadSupersededError
from mlxpool_server.mlx_backend import warm_up as warm_up_module
from mlxpool_server.mlx_backend.batch import MlxBatch
from mlxpool_server.mlx_backend.loaded_model import MlxModel
from mlxpool_server.mlx_backend.loader import MlxLoader
from mlxpool_server.mlx_backend.warm_up import PROMPT_TOKENS, warm_up_bytes
from tiny_models import ARCHITECTURES, RARE_ARCHITECTURES, write_model

EVERY_ARCHITECTURE = [*ARCHITECTURES, *RARE_ARCHITECTURES]


def make_loader(**options: Any) -> MlxLoader:
    return MlxLoader(prefill_step_tokens=16, default_layout=Layout.FLOAT32, **options)


def load(folder: Path, **options: Any) -> MlxModel:
    spec = ModelSpec("tiny", folder)
    return make_loader(**options).load(spec, lambda _: None, lambda: False)


def active_bytes() -> int:
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


class Steps:
    """Every step of a batch, and what the next one raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # How many rows each batch was given.
        self.rows: dict[MlxBatch, int] = {}
        self.is_closed: list[MlxBatch] = []
        # A batch of so many rows fails.
        self.failing: frozenset[int] = frozenset()
        self.num_steps = 0
        add, step, close = MlxBatch.add, MlxBatch.step, MlxBatch.close

        def counted_add(batch: MlxBatch, *args: Any) -> None:
            self.rows[batch] = self.rows.get(batch, 0) + 1
            add(batch, *args)

        def counted_step(batch: MlxBatch) -> Any:
            self.num_steps += 1
            output = step(batch)
            if self.rows[batch] in self.failing and not output.prefilled:
                raise ValueError(f"{self.rows[batch]} rows\nare no good")
            return output

        def counted_close(batch: MlxBatch) -> None:
            self.is_closed.append(batch)
            close(batch)

        monkeypatch.setattr(MlxBatch, "add", counted_add)
        monkeypatch.setattr(MlxBatch, "step", counted_step)
        monkeypatch.setattr(MlxBatch, "close", counted_close)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_nothing_stays(architecture: str, tmp_path: Path) -> None:
    """After the load MLX holds the weights and nothing else, whatever the caches."""
    folder = write_model(tmp_path / "tiny", architecture)
    before = active_bytes()
    plain = load(folder, warm_up=False)
    weights_bytes = active_bytes() - before
    del plain
    model = load(folder)
    # A few scalars belong to mlx-lm's compiled functions, not to the model.
    assert active_bytes() - before == pytest.approx(weights_bytes, abs=256)
    assert model.resident_bytes == pytest.approx(weights_bytes, abs=32_768)


def test_rows_of_two_lengths(folder: Path, steps: Steps) -> None:
    """Two rows share a batch; on a CPU nothing more is run."""
    with capture_logs() as logs:
        load(folder)
    assert list(steps.rows.values()) == [2]
    assert steps.is_closed == list(steps.rows)
    assert "model.not_batchable" not in [each["event"] for each in logs]


def test_more_rows_on_a_gpu(folder: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight and one as well: their kernels are others."""
    monkeypatch.setattr(warm_up_module, "device_kind", lambda: "cuda")
    load(folder)
    assert list(steps.rows.values()) == [2, 8, 1]


def test_each_quantised_kernel_of_cuda(
    tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 16, 32 and 64 rows: each takes half a minute to compile, better before than amid."""
    monkeypatch.setattr(warm_up_module, "device_kind", lambda: "cuda")
    folder = write_model(tmp_path / "quantized", quantized=True)
    spec = ModelSpec("tiny", folder, layout=Layout.STORED)
    make_loader().load(spec, lambda _: None, lambda: False)
    assert list(steps.rows.values()) == [2, 8, 32, 64, 1]


def test_it_can_be_turned_off(folder: Path, steps: Steps) -> None:
    """Nothing is run then, and nothing is reserved for it."""
    load(folder, warm_up=False)
    assert steps.rows == {}
    info = make_loader(warm_up=False).inspect(ModelSpec("tiny", folder))
    assert info is not None
    assert info.warm_up_bytes == 0


def test_progress_tells_of_it(folder: Path) -> None:
    """One event, after the weights, with all of them done."""
    seen: list[LoadProgress] = []
    model = make_loader().load(ModelSpec("tiny", folder), seen.append, lambda: False)
    assert [each.phase for each in seen].count(LoadPhase.WARMING_UP) == 1
    assert seen[-1].phase is LoadPhase.WARMING_UP
    assert seen[-1].completed_bytes == model.resident_bytes


def test_processors_are_held_for_each_step(
    folder: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And let go between two of them, for the engine."""
    lock = CountingLock()
    counted_step = MlxBatch.step
    turns: list[int] = []

    def step(batch: MlxBatch) -> Any:
        assert lock.is_held
        turns.append(lock.num_turns)
        return counted_step(batch)

    monkeypatch.setattr(MlxBatch, "step", step)
    load(folder, processors=lock)
    assert len(turns) == steps.num_steps
    assert turns == sorted(set(turns))


# ---------------------------------------------------------------- what it shows


def test_rows_that_cannot_share_a_batch(folder: Path, steps: Steps) -> None:
    """The model is served a row at a time, and a log line says why."""
    steps.failing = frozenset({2})
    before = active_bytes()
    with capture_logs() as logs:
        model = load(folder)
    assert list(steps.rows.values()) == [2, 1]
    assert steps.is_closed == list(steps.rows)
    (line,) = [each for each in logs if each["event"] == "model.not_batchable"]
    assert line["reason"] == "ValueError: 2 rows are no good"
    assert active_bytes() - before == pytest.approx(model.resident_bytes, abs=32_768)
    # Prompts that would share a pass go one by one.
    steps.failing = frozenset()
    batch = model.new_runner()
    for slot in (0, 1):
        batch.add(slot, [1, 2, 3], warm_up_module.SAMPLINGS[0])
    assert [slot for slot, _ in batch.step().prefilled] == [0]
    batch.close()


def test_caches_that_know_one_row(tmp_path: Path, steps: Steps) -> None:
    """Two rows are not even tried."""
    with capture_logs() as logs:
        model = load(write_model(tmp_path / "tiny", "llama4"))
    assert list(steps.rows.values()) == [1]
    assert "ChunkedKVCache" in model.batch_problem
    assert [each["event"] for each in logs].count("model.not_batchable") == 1


def test_model_that_cannot_run_at_all(folder: Path, steps: Steps) -> None:
    """Its load fails, with the reason of the single row, and nothing stays."""
    steps.failing = frozenset({1, 2})
    before = active_bytes()
    with pytest.raises(LoadFailedError) as error:
        load(folder)
    assert error.value.problem == "its first run failed: 1 rows are no good"
    del error
    steps.rows.clear()
    steps.is_closed.clear()
    assert active_bytes() <= before + 32_768


def test_experts_in_16_bits_on_a_cpu(tmp_path: Path) -> None:
    """A kernel that is missing shows at the load, not at the first request."""
    folder = write_model(tmp_path / "tiny", "qwen3_next")
    with pytest.raises(LoadFailedError, match=r"first run failed: .*GatherMM"):
        MlxLoader(prefill_step_tokens=16, default_layout=Layout.BFLOAT16).load(
            ModelSpec("tiny", folder), lambda _: None, lambda: False
        )


def test_cancelled_between_two_steps(folder: Path, steps: Steps) -> None:
    """No further step is begun, and nothing stays."""
    before = active_bytes()
    with pytest.raises(LoadSupersededError):
        make_loader().load(ModelSpec("tiny", folder), lambda _: None, lambda: steps.num_steps == 2)
    assert steps.num_steps == 2
    assert len(steps.is_closed) == 1
    steps.rows.clear()
    steps.is_closed.clear()
    assert active_bytes() <= before + 32_768


# ---------------------------------------------------------------- what it takes


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_it_takes_no_more_than_is_reserved(architecture: str, tmp_path: Path) -> None:
    """MLX's peak during the warm-up stays below the weights and warm_up_bytes."""
    folder = write_model(tmp_path / "tiny", architecture)
    info = make_loader().inspect(ModelSpec("tiny", folder))
    assert info is not None
    before = active_bytes()

    def report(progress: LoadProgress) -> None:
        if progress.phase is LoadPhase.WARMING_UP:
            mx.reset_peak_memory()

    model = make_loader().load(ModelSpec("tiny", folder), report, lambda: False)
    # Activations of a few bytes take a page each; real models have none to speak of.
    assert mx.get_peak_memory() - before <= info.load_bytes + 262_144
    assert model.resident_bytes < info.load_bytes


def test_reserved_bytes_follow_the_footprint() -> None:
    """Two rows of nine tokens, of which a pass works on ten prompt tokens."""
    footprint = Footprint(state_bytes=1000, activation_bytes_per_token=7)
    assert warm_up_bytes(footprint) == 2 * 1000 + 2 * max(PROMPT_TOKENS) * 7
    assert warm_up_bytes(Footprint()) == 0
