"""Well-formed random messages of any type, built from its descriptor."""

from __future__ import annotations

from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

MAX_DEPTH = 4
MAX_REPEATED = 4
# Names that mean something to the server are tried more often than others.
TEXTS = (
    "m", "bad", "slow", "?", "", "hello", "user", "gen-1", "\0", "é👋", "../../etc/passwd",
    "mlxpool.v1.ModelService", "x" * 300,
)  # fmt: skip
EDGES = (0, 1, -1, 2, 5, 255, 256, 257, 2**31 - 1, -(2**31), 2**31, 2**32, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))

_F = FieldDescriptor
_RANGES = {
    _F.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    _F.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    _F.CPPTYPE_UINT32: (0, 2**32 - 1),
    _F.CPPTYPE_UINT64: (0, 2**64 - 1),
    _F.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, depth: int = 0) -> Message:
    """Any fields of it, set to anything that the wire can carry."""
    message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if field.cpp_type == _F.CPPTYPE_MESSAGE and depth >= MAX_DEPTH:
            continue
        # Half of the fields, so that a message which is valid but for one is not rare.
        if draw(st.booleans()):
            _fill(draw, message, field, depth)
    return message


def _fill(draw: st.DrawFn, message: Message, field: FieldDescriptor, depth: int) -> None:
    if not field.is_repeated:
        value = draw(_values(field, depth))
        if field.cpp_type == _F.CPPTYPE_MESSAGE:
            getattr(message, field.name).CopyFrom(value)
        else:
            setattr(message, field.name, value)
        return
    target = getattr(message, field.name)
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        key_field, value_field = entry.fields_by_name["key"], entry.fields_by_name["value"]
        for _ in range(draw(st.integers(0, MAX_REPEATED))):
            key = draw(_values(key_field, depth + 1))
            value = draw(_values(value_field, depth + 1))
            if value_field.cpp_type == _F.CPPTYPE_MESSAGE:
                target[key].CopyFrom(value)
            else:
                target[key] = value
        return
    for _ in range(draw(st.integers(0, MAX_REPEATED))):
        value = draw(_values(field, depth))
        if field.cpp_type == _F.CPPTYPE_MESSAGE:
            target.add().CopyFrom(value)
        else:
            target.append(value)


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    kind = field.cpp_type
    if kind == _F.CPPTYPE_MESSAGE:
        return messages(field.message_type, depth + 1)
    if kind == _F.CPPTYPE_BOOL:
        return st.booleans()
    if kind == _F.CPPTYPE_STRING:
        if field.type == _F.TYPE_BYTES:
            return st.binary(max_size=50)
        # The wire carries no lone surrogates.
        return st.sampled_from(TEXTS) | st.text(
            st.characters(exclude_categories=["Cs"]), max_size=50
        )
    if kind in (_F.CPPTYPE_DOUBLE, _F.CPPTYPE_FLOAT):
        width = 64 if kind == _F.CPPTYPE_DOUBLE else 32
        edges = [each for each in FLOATS if width == 64 or abs(each) not in (1e-300, 1e300)]
        return st.sampled_from(edges) | st.floats(width=width)
    low, high = _RANGES[kind]
    named = [each for each in EDGES if low <= each <= high]
    if kind == _F.CPPTYPE_ENUM:
        named = [value.number for value in field.enum_type.values] * 3 + [-1, 99, high]
    return st.sampled_from(named) | st.integers(low, high)
