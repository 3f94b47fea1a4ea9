"""Tokens that were guessed and checked: the same answers, in fewer passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from mlxpool_server.domain import KvQuantization, Layout, ModelSpec, SamplingParams
from mlxpool_server.mlx_backend.drafting.pace import DraftPace
from mlxpool_server.mlx_backend.loaded_model import MlxModel
from mlxpool_server.mlx_backend.loader import MlxLoader
from mlxpool_server.mlx_backend.memory import device_kind
from references.batch_life import Life
from tiny_models import write_model

GREEDY = SamplingParams(temperature=0.0, seed=1)
SAMPLED = SamplingParams(temperature=0.7, top_k=3, repetition_penalty=1.05, seed=5)
# A short one, one with a circle in it, one without, one of several passes (16 tokens each).
PROMPTS = [[1, 2, 3], [4, 5, 6] * 5, list(range(9)), [*range(40), *range(17)]]
NUM_TOKENS = 60
MAX_DRAFTS = 8


def load(folder: Path, drafts: int = MAX_DRAFTS, **changes: Any) -> MlxModel:
    loader = MlxLoader(prefill_step_tokens=16, default_layout=Layout.FLOAT32)
    spec = ModelSpec("tiny", folder, prompt_lookup_tokens=drafts, **changes)
    return loader.load(spec, lambda _: None, lambda: False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of few words, so that even random weights repeat themselves."""
    return write_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def plain(folder: Path) -> MlxModel:
    return load(folder, 0)


@pytest.fixture(scope="module")
def model(folder: Path) -> MlxModel:
    return load(folder)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models are too fast for it to pay."""
    monkeypatch.setattr(DraftPace, "is_worth", lambda *_: True)


def new_life(model: MlxModel) -> Life:
    return Life(model.new_runner(), NUM_TOKENS)


def answers(model: MlxModel, *samplings: SamplingParams) -> Life:
    return Life.of(model.new_runner(), NUM_TOKENS, PROMPTS, *samplings)


@pytest.mark.parametrize(
    "samplings", [(GREEDY,), (GREEDY, SAMPLED), (SAMPLED,)], ids=["greedy", "mixed", "sampled"]
)
def test_nobodys_answer_changes(
    samplings: tuple[SamplingParams, ...], plain: MlxModel, model: MlxModel
) -> None:
    """Token for token what the same batch says without guesses, in fewer steps."""
    expected, got = answers(plain, *samplings), answers(model, *samplings)
    assert got.said == expected.said
    assert expected.num_drafted == 0
    if device_kind() == "cpu" or samplings == (GREEDY,):
        # A GPU samples without numpy, and guesses for greedy rows alone.
        assert got.num_drafted > 0
        assert got.num_steps < expected.num_steps


def test_a_rounded_cache_forgets_as_well(folder: Path, tmp_path: Path) -> None:
    """Keys and values in 8 bits: the same answers with and without guesses."""
    wide = write_model(tmp_path / "wide", head_dim=32)
    rounded = KvQuantization(8, 32)
    expected = answers(load(wide, 0, kv_quantization=rounded), GREEDY)
    got = answers(load(wide, kv_quantization=rounded), GREEDY)
    assert got.said == expected.said
    assert got.num_drafted > 0


def test_no_more_is_guessed_than_is_wanted(model: MlxModel) -> None:
    """The last tokens come without guesses behind them: no place is worked on that is not there."""
    life = new_life(model)
    life.add(0, [5] * 20, GREEDY, max_tokens=10)
    while len(life.got[0]) < 10:
        life.step()
    assert len(life.got[0]) == 10


def test_rows_that_may_be_forced_or_ask_for_scores(model: MlxModel) -> None:
    """Nothing is guessed for the first, and beside the second."""
    life = new_life(model)
    life.add(0, [5] * 20, GREEDY, may_be_forced=True)
    life.finish()
    life.add(2, [6] * 20, GREEDY, top_logprobs=1)
    while not life.got[2]:
        life.step()
    life.add(1, [5] * 20, GREEDY)
    while len(life.got[1]) < NUM_TOKENS // 2:
        life.step()
    assert life.num_drafted == 0


def test_tokens_forced_beside_guesses(plain: MlxModel, model: MlxModel) -> None:
    """A row whose next tokens are given gets them at once; its neighbour's guesses do no harm."""

    def forced(model: MlxModel) -> dict[int, list[int]]:
        life = new_life(model)
        life.add(0, [4, 5, 6] * 5, GREEDY)
        life.add(1, [1, 2, 3], GREEDY, may_be_forced=True)
        while len(life.got[1]) < 5:
            life.step()
        life.batch.force(1, [200, 201])
        return life.finish()

    got = forced(model)
    assert got[1][5:7] == [200, 201]
    assert got == forced(plain)


def test_what_leaves_with_guesses_is_found_again(plain: MlxModel, model: MlxModel) -> None:
    """The prompt cache holds what was said, and nothing that was only guessed."""
    prompt = [4, 5, 6] * 30
    expected = new_life(plain)
    expected.add(0, prompt, GREEDY)
    expected.finish()
    life = new_life(model)
    life.batch.limit_prompt_cache(1 << 24)
    life.add(0, prompt, GREEDY)
    while len(life.got[0]) < NUM_TOKENS // 2:
        life.step()
    life.batch.remove([0])
    said = life.got[0][: NUM_TOKENS // 2 - 5]
    life.add(1, [*prompt, *said], GREEDY)
    life.finish(1)
    assert [*said, *life.got[1]][:NUM_TOKENS] == expected.got[0][:NUM_TOKENS]


@pytest.mark.parametrize("architecture", ["gemma3_text", "mamba", "qwen3_next"])
def test_caches_that_cannot_forget(architecture: str, tmp_path: Path) -> None:
    """A model with windows or recurrent state is served without guesses, and says so."""
    folder = write_model(tmp_path / architecture, architecture)
    with capture_logs() as lines:
        model = load(folder)
    assert [line["event"] for line in lines if line["log_level"] == "warning"] == [
        "model.no_drafts"
    ]
    assert answers(model, GREEDY).num_drafted == 0
