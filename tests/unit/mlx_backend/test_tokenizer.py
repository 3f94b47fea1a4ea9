"""Text to tokens and back, exact to the byte, from any thread."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlxpool_server.domain import ChatMessage, ChatPrompt, Role
from mlxpool_server.errors import InvalidFieldError
from mlxpool_server.mlx_backend.foreign_tokenizer import TokenizerError
from mlxpool_server.mlx_backend.tokenizer import ByteDecoder, MlxTokenizer, SlowDecoder
from tiny_models import write_byte_level, write_sentence_piece
from tiny_models.encoders import write_word_pieces
from tiny_models.tokenizers import EOS

TEXTS = [
    "hello hello",
    "👋🏽 wave 👩‍👩‍👧‍👦",
    "日本語テキスト",
    "e\u0301 combining n\u0303",
    "zero \0 byte",
    "  two  spaces \n\ttabs ",
    "ﷺ ½ \u2581 \ufffd",
    "<0x41> is no byte",
    "\U0010ffff",
]


@pytest.fixture(scope="module", params=[write_byte_level, write_sentence_piece], ids=["bpe", "spm"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> MlxTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    request.param(folder)
    return MlxTokenizer.read(folder, 0, None)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> MlxTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_level(folder)
    return MlxTokenizer.read(folder, 0, None)


def encode(tokenizer: MlxTokenizer, text: str) -> tuple[int, ...]:
    return tokenizer.encode(text, add_special_tokens=False)


def render(tokenizer: MlxTokenizer, *messages: ChatMessage) -> str:
    return tokenizer.render_chat(ChatPrompt(messages))


def is_sentence_piece(tokenizer: MlxTokenizer) -> bool:
    return tokenizer.piece(1) == b"\x00"


def stream(tokenizer: MlxTokenizer, ids: tuple[int, ...]) -> str:
    """The text, token by token; no delta may end inside a character."""
    decoder = tokenizer.new_decoder()
    parts = [decoder.push(token_id) for token_id in ids]
    return "".join([*parts, decoder.finish()])


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_texts_bytes(tokenizer: MlxTokenizer, text: str) -> None:
    """Joined they give the text, after SentencePiece's leading space."""
    pieces = b"".join(tokenizer.piece(token_id) for token_id in encode(tokenizer, text))
    if is_sentence_piece(tokenizer):
        # Its spaces are U+2581, so that one in the text comes back as a space.
        assert pieces.decode() == " " + text.replace("\u2581", " ")
    else:
        assert pieces.decode() == text


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_text(tokenizer: MlxTokenizer, text: str) -> None:
    """Whatever characters its tokens split."""
    expected = text.replace("\u2581", " ") if is_sentence_piece(tokenizer) else text
    assert stream(tokenizer, encode(tokenizer, text)) == expected


@given(text=st.text(max_size=50))
def test_any_text_survives(byte_level: MlxTokenizer, text: str) -> None:
    """Byte-level tokens lose nothing."""
    ids = byte_level.encode(text, add_special_tokens=False)
    if EOS not in text:
        assert stream(byte_level, ids) == text
        assert b"".join(map(byte_level.piece, ids)) == text.encode()


def test_deltas_hold_whole_characters(byte_level: MlxTokenizer) -> None:
    """An emoji's four tokens give nothing, nothing, nothing, the emoji."""
    decoder = byte_level.new_decoder()
    ids = encode(byte_level, "👋")
    assert [decoder.push(token_id) for token_id in ids] == ["", "", "", "👋"]


def test_cut_character_is_replaced_at_the_end(byte_level: MlxTokenizer) -> None:
    """Not dropped."""
    decoder = byte_level.new_decoder()
    assert decoder.push(encode(byte_level, "世")[0]) == ""
    assert decoder.finish() == "\ufffd"


def test_special_tokens_have_no_text(tokenizer: MlxTokenizer) -> None:
    """They have a piece, which is their name."""
    (end,) = encode(tokenizer, EOS)[-1:]
    assert end in tokenizer.eos_token_ids
    assert stream(tokenizer, (end,)) == ""
    assert tokenizer.piece(end) == EOS.encode()


def test_ids_beyond_the_tokenizer(tokenizer: MlxTokenizer) -> None:
    """Models pad their vocabulary: such a token has neither text nor bytes."""
    beyond = tokenizer.vocab_size + 5
    assert tokenizer.piece(beyond) == b""
    assert tokenizer.new_decoder().push(beyond) == ""


def test_vocabulary_is_the_models_where_it_is_known(tmp_path: Path) -> None:
    """It may be padded; without a figure it is the tokenizer's."""
    write_byte_level(tmp_path)
    assert MlxTokenizer.read(tmp_path, 320, None).vocab_size == 320
    assert MlxTokenizer.read(tmp_path, 0, None).vocab_size == 256 + 5 + 1


def test_eos_from_the_model_is_added(tmp_path: Path) -> None:
    """generation_config.json may name several."""
    write_byte_level(tmp_path)
    assert MlxTokenizer.read(tmp_path, 0, [7, 9]).eos_token_ids >= {7, 9, 261}
    assert MlxTokenizer.read(tmp_path, 0, 7).eos_token_ids >= {7}


def test_threads_share_a_tokenizer(tokenizer: MlxTokenizer) -> None:
    """Tokenising, rendering and decoding at once give what they give alone."""
    texts = [text * 20 for text in TEXTS]
    expected = [encode(tokenizer, text) for text in texts]

    def work(index: int) -> bool:
        at = index % len(texts)
        rendered = render(tokenizer, ChatMessage(Role.USER, texts[at]))
        return (
            encode(tokenizer, texts[at]) == expected[at]
            and texts[at] in rendered
            and bool(stream(tokenizer, expected[at]))
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))


# ---------------------------------------------------------------- chat


def test_chat_is_rendered_with_the_models_template(tokenizer: MlxTokenizer) -> None:
    """And opens the assistant's turn."""
    messages = [ChatMessage(Role.SYSTEM, "be brief"), ChatMessage(Role.USER, "hi")]
    assert render(tokenizer, *messages) == "[system]be brief\n[user]hi\n[assistant]"


def test_developer_is_system_where_the_template_is_older(tmp_path: Path) -> None:
    """A template that knows the role gets it."""
    write_byte_level(tmp_path / "old", chat_template="{{ messages[0].role }}")
    write_byte_level(tmp_path / "new", chat_template="{# developer #}{{ messages[0].role }}")
    message = ChatMessage(Role.DEVELOPER, "x")
    assert render(MlxTokenizer.read(tmp_path / "old", 0, None), message) == "system"
    assert render(MlxTokenizer.read(tmp_path / "new", 0, None), message) == "developer"


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no') }}", "{{ messages + 1 }}", "{{ nothing.at.all }}", "{% if %}"],
    ids=["raises", "type error", "undefined", "syntax"],
)
def test_template_that_fails(template: str, tmp_path: Path) -> None:
    """Whatever goes wrong inside it, the caller's messages are refused, not the server broken."""
    write_byte_level(tmp_path, chat_template=template)
    tokenizer = MlxTokenizer.read(tmp_path, 0, None)
    with pytest.raises(InvalidFieldError, match=r"prompt\.chat\.messages"):
        render(tokenizer, ChatMessage(Role.USER, "x"))


def test_role_out_of_order(tokenizer: MlxTokenizer) -> None:
    """The template's own words reach the caller."""
    with pytest.raises(InvalidFieldError, match="roles must alternate"):
        render(tokenizer, ChatMessage(Role.ASSISTANT, "x"))


def test_no_template(tmp_path: Path) -> None:
    """The tokenizer says so; the pool refuses chats then."""
    write_byte_level(tmp_path, chat_template=None)
    assert not MlxTokenizer.read(tmp_path, 0, None).has_chat_template


# ---------------------------------------------------------------- other kinds


def test_tokenizer_of_another_kind(tmp_path: Path) -> None:
    """T5's kind is decoded by transformers, over a growing window; its pieces have spaces."""
    vocab = [("<unk>", 0.0), ("▁hello", -1.0), ("▁world", -1.0), ("▁", -3.0), ("s", -2.0)]
    plain = Tokenizer(models.Unigram(vocab, unk_id=0))
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    plain.decoder = decoders.Metaspace()
    plain.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    tokenizer = MlxTokenizer.read(tmp_path, 0, None)
    ids = encode(tokenizer, "hello worlds")
    assert isinstance(tokenizer.new_decoder(), SlowDecoder)
    assert stream(tokenizer, ids) == "hello worlds"
    assert b"".join(map(tokenizer.piece, ids)) == b" hello worlds"


@given(st.lists(st.binary(max_size=5), max_size=20))
def test_decoder_is_utf8_whatever_the_split(pieces: list[bytes]) -> None:
    """Any bytes, valid or not, decode as a whole would."""
    decoder = ByteDecoder(pieces, frozenset(), trims_first_space=False)
    text = "".join(decoder.push(index) for index in range(len(pieces))) + decoder.finish()
    assert text == b"".join(pieces).decode("utf-8", "replace")


def test_first_space_is_trimmed_once() -> None:
    """Of the output's first token with text, and no other."""
    decoder = ByteDecoder([b"", b" a", b" "], frozenset(), trims_first_space=True)
    assert [decoder.push(index) for index in (0, 1, 1, 2)] == ["", "a", " a", " "]


# ---------------------------------------------------------------- a stranger's tokenizer.json


def edited(folder: Path, **parts: Any) -> Path:
    """A byte-level tokenizer whose tokenizer.json has these parts instead."""
    write_byte_level(folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    return folder


def test_training_leftovers_do_not_touch_prompts(tmp_path: Path) -> None:
    """Truncation would cut a prompt in silence, and padding make any of it."""
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 5000},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    tokenizer = MlxTokenizer.read(edited(tmp_path, truncation=truncation, padding=padding), 0, None)
    assert len(encode(tokenizer, "abcdef")) == 6


def test_a_panic_of_the_tokenizer_is_an_error(tmp_path: Path) -> None:
    """A regular expression that gives up raises what is no Exception: the request is refused."""
    gives_up = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    tokenizer = MlxTokenizer.read(edited(tmp_path, pre_tokenizer=gives_up), 0, None)
    assert encode(tokenizer, "aab")
    with pytest.raises(InvalidFieldError, match="tokenizer fails"):
        encode(tokenizer, "a" * 200 + "b")


@pytest.mark.parametrize("part", ["normalizers", "decoders"])
def test_a_text_that_would_grow_without_end(tmp_path: Path, part: str) -> None:
    """Six rules that make 16 of 1 make 16 million: such a tokenizer is refused when it is read."""
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 16}
    bomb = {"type": "Sequence", part: [rule] * 6}
    folder = edited(tmp_path, **{part.removesuffix("s"): bomb})
    with pytest.raises(TokenizerError, match=r"1\.67772e\+07 characters of one"):
        MlxTokenizer.read(folder, 0, None)


@pytest.mark.parametrize(("size", "is_allowed"), [(18, True), (10_000, False)])
def test_a_table_of_replacements_that_makes_long_texts(
    tmp_path: Path, size: int, is_allowed: bool
) -> None:
    """SentencePiece's make at most 18 characters of one (U+FDFA); a stranger's, any number."""
    trie = bytes(1024)
    table = len(trie).to_bytes(4, "little") + trie + b"a\0" + "é".encode() * size + b"\0"
    rule = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    folder = edited(tmp_path, normalizer={"type": "Sequence", "normalizers": [rule]})
    if is_allowed:
        assert encode(MlxTokenizer.read(folder, 0, None), "hello")
    else:
        with pytest.raises(TokenizerError, match="10000 characters of one"):
            MlxTokenizer.read(folder, 0, None)


def test_a_decoder_with_a_regular_expression(tmp_path: Path) -> None:
    """It would run on the engine's thread, where a slow one holds up every model."""
    rule = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
    folder = edited(tmp_path, decoder={"type": "Sequence", "decoders": [rule]})
    with pytest.raises(TokenizerError, match="regular expression"):
        MlxTokenizer.read(folder, 0, None)


def test_a_panic_while_decoding_is_an_error() -> None:
    """What is no Exception would end the engine's thread, and with it every model's streams."""

    class PanicException(BaseException):
        """As the Rust library's, which cannot be imported."""

    class Panics:
        last_segment = ""

        def add_token(self, token_id: int) -> None:
            raise PanicException

        finalize = partial(add_token, None, 0)

    decoder = SlowDecoder(Panics(), frozenset())
    with pytest.raises(TokenizerError):
        decoder.push(1)
    with pytest.raises(TokenizerError):
        decoder.finish()


def test_no_token_is_longer(tokenizer: MlxTokenizer) -> None:
    """max_token_chars bounds every piece, so that a text's length bounds its tokens from below."""
    pieces = [tokenizer.piece(index) for index in range(tokenizer.vocab_size)]
    assert tokenizer.max_token_chars == max(map(len, pieces))
    for text in ("hello hello hello", "he he he"):
        assert len(encode(tokenizer, text)) * tokenizer.max_token_chars >= len(text)


def test_word_pieces_have_no_longest(tmp_path: Path) -> None:
    """BERT's kind drops spaces and knows a word of any length as one token: nothing is refused."""
    write_word_pieces(tmp_path)
    tokenizer = MlxTokenizer.read(tmp_path, 0, None)
    text = "a" + " " * 10_000 + "z" * 10_000
    assert len(encode(tokenizer, text)) < len(text) / 1000
    assert tokenizer.max_token_chars is None
