"""The converted demo model, as mlx-lm reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_model, load_tokenizer

from mlxpool_server.mlx_backend.demo_model import ensure_demo_model

pytestmark = [pytest.mark.demo_model, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def folder() -> Path:
    return ensure_demo_model(print)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


def test_weights_stay_packed(folder: Path) -> None:
    """Layers load as 4 bits and the embedding as 8, in groups of 32."""
    model, _ = load_model(folder, lazy=True)
    modules = dict(model.named_modules())
    packed = {(layer.bits, layer.group_size) for name, layer in modules.items() if "mlp." in name}
    assert packed == {(4, 32)}
    embedding = modules["model.embed_tokens"]
    assert (embedding.bits, embedding.group_size) == (8, 32)


@pytest.mark.parametrize(
    "text",
    [
        "Hello 👋🏽 ünï 世界\n\tx=1234;  don't",
        "日本語テキスト🎉 3.14159",
        "<|im_start|>user\nHi<|im_end|>\n",
    ],
)
def test_text_survives_tokenization(tokenizer: Any, text: str) -> None:
    """Emoji, CJK, digits and special tokens come back, whole and streamed."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    detokenizer = tokenizer.detokenizer
    detokenizer.reset()
    for token in ids:
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == text


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    """The pre-tokenizer splits numbers into digits, as in training."""
    assert len(tokenizer.encode("2025", add_special_tokens=False)) == 4


def test_streaming_uses_the_byte_pair_detokenizer(tokenizer: Any) -> None:
    """mlx-lm recognises the tokenizer: its fallback decodes the whole line again at each token."""
    assert type(tokenizer.detokenizer).__name__ == "BPEStreamingDetokenizer"


def test_chat_template_renders(tokenizer: Any) -> None:
    """A question becomes a system, a user and an open assistant turn."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
