"""A small model that guesses for a large one: the same answers, in fewer passes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_model

from mlxpool_server.domain import Layout, ModelSpec, SamplingParams
from mlxpool_server.errors import LoadFailedError
from mlxpool_server.mlx_backend.batch import MlxBatch
from mlxpool_server.mlx_backend.drafting.pace import DraftPace
from mlxpool_server.mlx_backend.drafting.paired_model import PairedModel
from mlxpool_server.mlx_backend.last_rows import LastRows
from mlxpool_server.mlx_backend.loaded_model import MlxModel
from mlxpool_server.mlx_backend.loader import MlxLoader
from references.batch_life import Life
from tiny_models import VOCAB_SIZE, write_model

GREEDY = SamplingParams(temperature=0.0, seed=1)
SAMPLED = SamplingParams(temperature=0.7, top_k=3, repetition_penalty=1.05, seed=5)
# Padding, several chunks (16 tokens each), a single token.
PROMPTS = [[1, 2, 3], list(range(40)), [9], list(range(100, 117))]
NUM_TOKENS = 40


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models are too fast for it to pay."""
    monkeypatch.setattr(DraftPace, "is_worth", lambda *_: True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "main")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer layers, another head size, other weights: it is hardly ever right."""
    folder = tmp_path_factory.mktemp("models") / "draft"
    return write_model(folder, seed=11, num_hidden_layers=2, head_dim=8)


def batch_of(model: LastRows, max_drafts: int) -> MlxBatch:
    return MlxBatch(
        model, vocab_size=VOCAB_SIZE, is_batchable=True, prefill_tokens=16, max_drafts=max_drafts
    )


def plain(folder: Path) -> MlxBatch:
    return batch_of(LastRows(load_model(folder)[0]), 0)


def paired(folder: Path, draft: Path, max_drafts: int = 5) -> MlxBatch:
    models = load_model(folder)[0], load_model(draft)[0]
    sizes = {"vocab_size": VOCAB_SIZE, "draft_vocab_size": VOCAB_SIZE}
    return batch_of(PairedModel(*models, **sizes), max_drafts)


def new_life(batch: MlxBatch) -> Life:
    return Life(batch, NUM_TOKENS)


def life_of(batch: MlxBatch, *samplings: SamplingParams) -> Life:
    return Life.of(batch, NUM_TOKENS, PROMPTS, *samplings)


@pytest.mark.parametrize(
    "samplings", [(GREEDY,), (GREEDY, SAMPLED), (SAMPLED,)], ids=["greedy", "mixed", "sampled"]
)
def test_a_poor_guesser_changes_no_answer(
    samplings: tuple[SamplingParams, ...], folder: Path, other: Path
) -> None:
    """Token for token what the model says without it."""
    expected, got = (life_of(batch, *samplings) for batch in (plain(folder), paired(folder, other)))
    assert got.said == expected.said


def test_a_guesser_that_is_always_right(folder: Path) -> None:
    """The model itself: each pass gives all that was guessed and one token more."""
    expected, got = life_of(plain(folder), GREEDY), life_of(paired(folder, folder), GREEDY)
    assert got.said == expected.said
    # Joins and first tokens come without guesses, and widths begin small.
    assert got.num_drafted > 0.6 * NUM_TOKENS * len(PROMPTS)
    assert got.num_steps < expected.num_steps / 2


def test_a_cached_prefix_serves_both(folder: Path) -> None:
    """A second turn begins where the first ended, with guesses as right as before."""
    batch = paired(folder, folder)
    batch.limit_prompt_cache(1 << 24)
    first = new_life(batch)
    prompt = list(range(50))
    first.add(0, prompt, GREEDY)
    answer = first.finish()[0]
    second = new_life(batch)
    second.add(1, [*prompt, *answer[:20], 7, 8], GREEDY)
    got = second.finish()[1]
    assert second.cached[1] == 70
    alone = new_life(plain(folder))
    alone.add(1, [*prompt, *answer[:20], 7, 8], GREEDY)
    assert got == alone.finish()[1]
    assert second.num_drafted > 0.6 * NUM_TOKENS


def test_rows_that_may_be_forced(folder: Path) -> None:
    """They take one token a pass, beside rows that take several; and what is forced on them."""

    def forced(batch: MlxBatch) -> dict[int, list[int]]:
        life = new_life(batch)
        life.add(0, [4, 5, 6], GREEDY)
        life.add(1, [1, 2, 3], GREEDY, may_be_forced=True)
        while len(life.got[1]) < 5:
            life.step()
        batch.force(1, [200, 201])
        return life.finish()

    got = forced(paired(folder, folder))
    assert got[1][5:7] == [200, 201]
    assert got == forced(plain(folder))


def test_passes_without_guesses_feed_both(folder: Path) -> None:
    """Beside a row that asks for scores nobody guesses; afterwards guesses are as right."""
    life = new_life(paired(folder, folder))
    life.add(0, [4, 5, 6], GREEDY)
    life.add(1, [1, 2, 3], GREEDY, top_logprobs=0)
    while len(life.got[1]) < 10:
        life.step()
    assert life.num_drafted == 0
    life.batch.remove([1])
    before = len(life.got[0])
    while len(life.got[0]) < NUM_TOKENS:
        life.step()
    assert life.num_drafted > 0.5 * (NUM_TOKENS - before)


# ---------------------------------------------------------------- from files


def load(folder: Path, draft: Path) -> MlxModel:
    loader = MlxLoader(prefill_step_tokens=16, default_layout=Layout.FLOAT32)
    spec = ModelSpec("main", folder).with_draft(ModelSpec("small", draft))
    return loader.load(spec, lambda _: None, lambda: False)


def test_both_are_loaded_and_counted(folder: Path, other: Path) -> None:
    """Weights, KV cache and context: as much as both take, as long as both can."""
    loader = MlxLoader(prefill_step_tokens=16, default_layout=Layout.FLOAT32)
    main, small = ModelSpec("main", folder), ModelSpec("small", other)
    infos = [loader.inspect(spec) for spec in (main, small, main.with_draft(small))]
    alone, guesser, both = (info for info in infos if info is not None)
    assert both.estimated_bytes == alone.estimated_bytes + guesser.estimated_bytes
    assert both.footprint == alone.footprint.plus(guesser.footprint)
    model = load(folder, other)
    assert model.resident_bytes == both.estimated_bytes
    batch = model.new_runner()
    life = life_of(batch, GREEDY)
    expected = life_of(plain(folder), GREEDY)
    assert life.said == expected.said


@pytest.mark.parametrize("rows", [VOCAB_SIZE - 30, VOCAB_SIZE + 30])
def test_vocabularies_padded_to_other_sizes(rows: int, folder: Path, tmp_path: Path) -> None:
    """Tokens that only one of the two has are neither guessed nor looked up."""
    draft = write_model(tmp_path / "draft", seed=3, vocab_size=rows, num_hidden_layers=1)
    life = new_life(load(folder, draft).new_runner())
    life.add(0, [VOCAB_SIZE - 1, VOCAB_SIZE - 2, 5], GREEDY)
    got = life.finish()
    alone = new_life(plain(folder))
    alone.add(0, [VOCAB_SIZE - 1, VOCAB_SIZE - 2, 5], GREEDY)
    assert got == alone.finish()


def test_another_tokenizer_is_refused(folder: Path, other: Path, tmp_path: Path) -> None:
    """Its guesses would be other words."""
    draft = tmp_path / "draft"
    shutil.copytree(other, draft)
    file = draft / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(LoadFailedError, match="draft model 'small' has another tokenizer"):
        load(folder, draft)


@pytest.mark.parametrize("is_main", [True, False])
def test_caches_that_cannot_forget_are_refused(is_main: bool, folder: Path, tmp_path: Path) -> None:
    """Windows and recurrent state, of either of the two."""
    mamba = write_model(tmp_path / "mamba", "mamba")
    with pytest.raises(LoadFailedError, match="caches that can forget"):
        load(*((mamba, folder) if is_main else (folder, mamba)))


def test_no_place_behind_the_last_one_is_worked_on(
    folder: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be none: a row at its end narrows the passes of its neighbours."""
    widths: list[tuple[int, int]] = []
    original = PairedModel.all_logits

    def watched(self: PairedModel, tokens: Any, caches: Any, adapters: Any) -> Any:
        # (tokens of the longest row so far, those that come).
        widths.append((max(caches[0].lengths.rows), tokens.shape[1]))
        return original(self, tokens, caches, adapters)

    monkeypatch.setattr(PairedModel, "all_logits", watched)
    life = new_life(paired(folder, other))
    life.add(0, [4, 5, 6], GREEDY, max_tokens=9)
    while len(life.got[0]) < 9:
        life.step()
    assert widths
    # The last token is never fed.
    assert max(length + width for length, width in widths) <= 3 + 9 - 1
