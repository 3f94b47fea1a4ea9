"""The benchmark's requests are the same for every target, and its words are single tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmark.synthetic_tokenizer import (
    END,
    forbid_end,
    write_synthetic_tokenizer,
    write_words,
)
from benchmark.workload import RequestError, RequestSource, Word, check_length, read_words

VOCAB_SIZE = 4000
WORDS = [Word(index, f" w{index}") for index in range(50)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (folder / "generation_config.json").write_text("{}")
    write_synthetic_tokenizer(folder, VOCAB_SIZE)
    forbid_end(folder, VOCAB_SIZE)
    write_words(folder)
    return folder


def _source() -> RequestSource:
    return RequestSource(WORDS, prompt_tokens=12, max_tokens=40)


def test_a_prompt_has_the_tokens_it_was_made_of(folder: Path) -> None:
    """Who gets its text reads the same tokens as who gets their ids."""
    source = RequestSource(read_words(folder), prompt_tokens=500, max_tokens=10)
    request = source.request("any")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode(request.text).ids == request.ids


def test_the_model_cannot_produce_the_end(folder: Path) -> None:
    """Its id is one past the vocabulary, in the tokenizer and in the config."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    assert tokenizer.token_to_id(END) == VOCAB_SIZE
    assert config["eos_token_id"] == [VOCAB_SIZE]
    assert not (folder / "generation_config.json").exists()


def test_a_key_stands_for_one_request() -> None:
    """Two targets that are asked with the same key get the same; other keys, other requests."""
    assert _source().request("a", sampling="mixed") == _source().request("a", sampling="mixed")
    assert _source().request("a") != _source().request("b")


def test_lengths_vary_around_the_mean() -> None:
    """By half at most, so that streams do not end together."""
    lengths = [_source().request(str(key)).max_tokens for key in range(400)]
    assert (min(lengths), max(lengths)) == (20, 60)
    assert sum(lengths) / len(lengths) == pytest.approx(40, abs=2)


def test_mixed_requests_differ_in_their_parameters() -> None:
    """No two of a hundred share all of them."""
    found = {_source().request(str(key), sampling="mixed").sampling for key in range(100)}
    assert len(found) == 100


def test_a_short_answer_is_an_error() -> None:
    """Fewer tokens than asked for would count as speed."""
    request = _source().request("a")
    check_length(request, request.max_tokens)
    with pytest.raises(RequestError, match=f"3 tokens instead of {request.max_tokens}"):
        check_length(request, 3)
