"""Random chats for real templates: rendered, or refused with the field that is wrong."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.messages import messages
from fuzz.test_rpcs import PARAMETERS, PROFILE
from mlxpool.v1 import model_service_pb2 as pb
from mlxpool_server.errors import BadConstraintError, InvalidFieldError, NotImplementedFieldError
from mlxpool_server.mlx_backend.tokenizer import MlxTokenizer
from mlxpool_server.rpc.convert.chats import chat_prompt
from model_families import FAMILIES


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MlxTokenizer]:
    return {name: each.read(tmp_path_factory.mktemp("family")) for name, each in FAMILIES.items()}


@PROFILE
@given(data=st.data(), name=st.sampled_from(sorted(FAMILIES)), text=st.text(max_size=20))
def test_chats(
    tokenizers: dict[str, MlxTokenizer], data: st.DataObject, name: str, text: str
) -> None:
    """Whatever tools, calls and variables a chat brings, nothing but its own fields is to blame."""
    chat = data.draw(messages(pb.ChatPrompt.DESCRIPTOR))
    assert isinstance(chat, pb.ChatPrompt)
    for tool in chat.tools:
        tool.name, tool.parameters_json = "add", data.draw(st.sampled_from(PARAMETERS))
    for message in chat.messages:
        message.role = data.draw(st.sampled_from([pb.ROLE_USER, pb.ROLE_ASSISTANT, pb.ROLE_TOOL]))
        for call in message.tool_calls:
            call.arguments_json = data.draw(st.sampled_from(PARAMETERS))
    part = pb.ContentPart(text=text.encode("utf-8", "replace").decode())
    chat.messages.insert(0, pb.ChatMessage(role=pb.ROLE_USER, content=[part]))
    tokenizer = tokenizers[name]
    try:
        prompt = chat_prompt(chat)
        rendered = tokenizer.render_chat(prompt)
        token_ids = tokenizer.encode(rendered, add_special_tokens=False)
    except (InvalidFieldError, NotImplementedFieldError):
        return
    if prompt.must_call and tokenizer.can_force_calls:
        with contextlib.suppress(BadConstraintError):
            assert tokenizer.compile(None, prompt, rendered) is not None
    sorter = tokenizer.new_sorter(prompt, rendered)
    decoder = tokenizer.new_decoder()
    for token_id in token_ids:
        decoded = decoder.push(token_id)
        if sorter is not None:
            sorter.push(token_id, decoded)
