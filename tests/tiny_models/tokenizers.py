"""Tokenizers of the two usual kinds, trained on nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mlxpool_server.mlx_backend.tokenizer import byte_alphabet

EOS = "<|end|>"
# Users and the assistant take turns, the user first; a system message may come before.
CHAT_TEMPLATE = """\
{%- set turns = messages | rejectattr("role", "equalto", "system") | list -%}
{%- for message in turns -%}
{%- if (message["role"] == "user") != (loop.index0 % 2 == 0) -%}
{{- raise_exception("roles must alternate user/assistant") -}}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
[{{ message["role"] }}]{{ message["content"] }}
{% endfor -%}
{%- if add_generation_prompt -%}[assistant]{%- endif -%}
"""


def write_byte_level(
    folder: Path,
    *,
    chat_template: str | None = CHAT_TEMPLATE,
    special: Sequence[str] = (),
    added: Sequence[str] = (),
    eos: str = EOS,
) -> None:
    """GPT-2's kind: a token for each byte, and a few merges.

    `special` tokens have no text, `added` ones do.
    """
    letters = sorted(byte_alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello")]
    vocab = letters + [first + second for first, second in merges]
    tokenizer = Tokenizer(
        models.BPE(vocab={name: index for index, name in enumerate(vocab)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in added])
    _write(tokenizer, folder, chat_template, eos)


def write_sentence_piece(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Llama 2's kind: spaces as U+2581, unknown characters as bytes."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,!?"]
    merges = [("h", "e"), ("▁", "he")]
    vocab = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocab += [first + second for first, second in merges]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: index for index, name in enumerate(vocab)},
            merges=merges,
            unk_token="<unk>",  # noqa: S106 - a token of another kind
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    _write(tokenizer, folder, chat_template)


def _write(tokenizer: Tokenizer, folder: Path, chat_template: str | None, eos: str = EOS) -> None:
    tokenizer.add_special_tokens([AddedToken(eos, special=True)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
