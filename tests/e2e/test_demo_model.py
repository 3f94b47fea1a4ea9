"""The demo model in this process: the same tokens as mlx-lm's own generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import stream_generate
from mlx_lm.utils import dequantize_model, load_model, load_tokenizer

from mlxpool_server.domain import ChatMessage, ChatPrompt, Layout, ModelSpec, Role, SamplingParams
from mlxpool_server.mlx_backend.loaded_model import MlxModel
from mlxpool_server.mlx_backend.loader import MlxLoader
from mlxpool_server.mlx_backend.memory import MlxMemory
from mlxpool_server.mlx_backend.tokenizer import MlxTokenizer

pytestmark = [pytest.mark.demo_model, pytest.mark.timeout(600)]

GREEDY = SamplingParams(temperature=0.0, seed=0)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=1234)
QUESTIONS = ["Why is the sky blue?", "Hi", "Name three colours and a shape."]
TOKENS = 10


@pytest.fixture(scope="module")
def loader() -> MlxLoader:
    return MlxLoader(prefill_step_tokens=64, default_layout=Layout.FLOAT32)


@pytest.fixture(scope="module")
def spec(demo_folder: Path) -> ModelSpec:
    return ModelSpec("demo", demo_folder)


@pytest.fixture(scope="module")
def model(loader: MlxLoader, spec: ModelSpec) -> Iterator[MlxModel]:
    """Loaded once; its sizes are checked on the way, and that it is given back."""
    memory = MlxMemory()
    memory.clear_cache()
    before = memory.active_bytes()
    model = loader.load(spec, lambda _: None, lambda: False)
    memory.clear_cache()
    allocated = memory.active_bytes() - before
    info = loader.inspect(spec)
    assert info is not None
    assert info.estimated_bytes == pytest.approx(model.resident_bytes, rel=0.05)
    assert model.resident_bytes == pytest.approx(allocated, rel=0.05)
    yield model
    resident_bytes = model.resident_bytes
    del model
    memory.clear_cache()
    # pytest itself may hold a fixture's value a little longer: only the growth is bounded.
    assert memory.active_bytes() <= before + 1.1 * resident_bytes


@pytest.fixture(scope="module")
def tokenizer(loader: MlxLoader, spec: ModelSpec) -> MlxTokenizer:
    return loader.load_tokenizer(spec)


def prompt_of(tokenizer: MlxTokenizer, question: str) -> tuple[int, ...]:
    text = tokenizer.render_chat(ChatPrompt((ChatMessage(Role.USER, question),)))
    return tokenizer.encode(text, add_special_tokens=False)


def tokens_of(batch: Any, slots: dict[int, list[int]], count: int) -> None:
    """Step until every slot has this many tokens; the extra ones of others are dropped."""
    while any(len(tokens) < count for tokens in slots.values()):
        for slot, token in batch.step().tokens:
            if slot in slots and len(slots[slot]) < count:
                slots[slot].append(token)


def alone(model: MlxModel, prompt: tuple[int, ...], sampling: SamplingParams) -> list[int]:
    batch = model.new_runner()
    batch.add(0, prompt, sampling)
    slots: dict[int, list[int]] = {0: []}
    tokens_of(batch, slots, TOKENS)
    batch.close()
    return slots[0]


@pytest.fixture(scope="module")
def reference(demo_folder: Path, tokenizer: MlxTokenizer) -> dict[str, list[int]]:
    """mlx-lm's greedy tokens for each question, from weights it loaded itself."""
    plain = dequantize_model(load_model(demo_folder, lazy=True)[0])
    plain.set_dtype(mx.float32)
    wrapper = load_tokenizer(demo_folder)
    return {
        question: [
            response.token
            for response in stream_generate(
                plain, wrapper, list(prompt_of(tokenizer, question)), max_tokens=TOKENS
            )
        ]
        for question in QUESTIONS
    }


def same(got: list[int], expected: list[int]) -> bool:
    """mlx-lm stops at the end of text, a batch goes on."""
    return len(expected) > 1 and got[: len(expected)] == expected


def test_greedy_alone(
    model: MlxModel, tokenizer: MlxTokenizer, reference: dict[str, list[int]]
) -> None:
    """Token for token."""
    for question in QUESTIONS:
        got = alone(model, prompt_of(tokenizer, question), GREEDY)
        assert same(got, reference[question]), question


def test_greedy_in_a_batch_of_eight(
    model: MlxModel, tokenizer: MlxTokenizer, reference: dict[str, list[int]]
) -> None:
    """Eight rows that join and leave at different steps, sampled ones among them."""
    batch = model.new_runner()
    asked = {slot: QUESTIONS[slot % 3] for slot in range(8)}
    got: dict[int, list[int]] = {slot: [] for slot in asked}
    waiting, running, step = list(asked), set[int](), 0
    while waiting or running:
        if waiting and step % 2 == 0:
            slot = waiting.pop(0)
            # Two of the eight sample; they must not reach the others.
            sampling = replace(SAMPLED, seed=slot) if slot in (2, 5) else GREEDY
            batch.add(slot, prompt_of(tokenizer, asked[slot]), sampling)
            running.add(slot)
        for slot, token in batch.step().tokens:
            got[slot].append(token)
        done = [slot for slot in running if len(got[slot]) >= TOKENS - slot % 3]
        batch.remove(done)
        running.difference_update(done)
        step += 1
    batch.close()
    for slot, question in asked.items():
        if slot not in (2, 5):
            length = min(len(got[slot]), len(reference[question]))
            assert got[slot][:length] == reference[question][:length], (slot, question)


def test_seed_repeats_alone_and_in_a_batch(model: MlxModel, tokenizer: MlxTokenizer) -> None:
    """And another seed differs."""
    prompt = prompt_of(tokenizer, QUESTIONS[0])
    expected = alone(model, prompt, SAMPLED)
    batch = model.new_runner()
    batch.add(1, prompt_of(tokenizer, QUESTIONS[1]), GREEDY)
    batch.add(2, prompt_of(tokenizer, QUESTIONS[2]), replace(SAMPLED, seed=5))
    batch.step()
    batch.add(0, prompt, SAMPLED)
    batch.add(3, prompt, replace(SAMPLED, seed=99))
    slots: dict[int, list[int]] = {0: [], 3: []}
    tokens_of(batch, slots, TOKENS)
    batch.close()
    assert slots[0] == expected
    assert slots[3] != expected


def test_text_survives(tokenizer: MlxTokenizer) -> None:
    """Pieces and streamed text are exact, for what its training hardly saw too."""
    for text in ("Hello, world!", "👋🏽 世界 ñ e\u0301 \0 1234", "  indented\n\n\ttabs  "):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.piece, ids)).decode() == text
        decoder = tokenizer.new_decoder()
        assert "".join(map(decoder.push, ids)) + decoder.finish() == text


def test_every_token_has_bytes(tokenizer: MlxTokenizer) -> None:
    """No id of the vocabulary decodes to nothing."""
    pieces = [tokenizer.piece(index) for index in range(tokenizer.vocab_size)]
    assert all(pieces)
    assert {bytes([byte]) for byte in range(0x20, 0x7F)} <= set(pieces)
