"""A complete byte-level tokenizer of any size, trained on nothing, and the words of one."""

from __future__ import annotations

import itertools
import json
import re
import string
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from benchmark.workload import WORDS_FILE

# Its id is the vocabulary's size, one past the last that the model can produce.
END = "<|never generated|>"
_MAX_WORDS = 4096
_SPACE = "Ġ"


def write_synthetic_tokenizer(folder: Path, vocab_size: int) -> None:
    """GPT-2's kind: all bytes, then pairs of letters, then pairs of pairs until it is full."""
    vocab = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for first, second in _merges():
        if len(vocab) == vocab_size:
            break
        vocab.append(first + second)
        merges.append((first, second))
    tokenizer = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(vocab)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8"
    )


def _merges() -> itertools.chain[tuple[str, str]]:
    letters = string.ascii_lowercase
    pairs = [first + second for first, second in itertools.product(letters, letters)]
    return itertools.chain(
        itertools.product(letters, letters),
        ((_SPACE, pair) for pair in pairs),
        # Words before parts of words: prompts are made of them.
        *(
            ((_SPACE + first, second), (first, second))
            for first, second in itertools.product(pairs, pairs)
        ),
    )


def forbid_end(folder: Path, vocab_size: int) -> None:
    """Make the end of sequence a token that the model cannot produce.

    mlx_lm.server knows no ignore_eos, and every answer has to be as long as was asked for.
    """
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    fillers = [f"<|filler {number}|>" for number in range(tokenizer.get_vocab_size(), vocab_size)]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in fillers])
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    end_id = tokenizer.token_to_id(END)
    if end_id is None or end_id < vocab_size:
        raise ValueError(f"{END} has the id {end_id}, which the model can produce")
    tokenizer.save(str(path))
    _change(folder / "tokenizer_config.json", {"eos_token": END})
    _change(folder / "config.json", {"eos_token_id": [end_id]})
    (folder / "generation_config.json").unlink(missing_ok=True)


def write_words(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = []
    for token_id in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token_id])
        if re.fullmatch(" [a-z]{2,}", text) and tokenizer.encode(text).ids == [token_id]:
            words.append((token_id, text))
    every = max(1, len(words) // _MAX_WORDS)
    (folder / WORDS_FILE).write_text(json.dumps(words[::every]), encoding="utf-8")


def _change(path: Path, changes: dict[str, object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | changes, indent=2), encoding="utf-8")
