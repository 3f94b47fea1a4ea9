"""The client's enums are the contract's."""

from __future__ import annotations

from typing import Any

import pytest

from mlxpool.v1 import memory_service_pb2, model_service_pb2
from mlxpool_client import enums

PAIRS = [
    (enums.ModelState, model_service_pb2.ModelState),
    (enums.Capability, model_service_pb2.ModelCapability),
    (enums.LoadPhase, model_service_pb2.LoadPhase),
    (enums.Role, model_service_pb2.Role),
    (enums.Pooling, model_service_pb2.Pooling),
    (enums.Priority, model_service_pb2.Priority),
    (enums.GenerationPhase, model_service_pb2.GenerationPhase),
    (enums.FinishReason, model_service_pb2.FinishReason),
    (enums.CacheKind, memory_service_pb2.CacheKind),
]


@pytest.mark.parametrize(("ours", "wire"), PAIRS)
def test_names_and_numbers_match_the_contract(ours: type[enums.OpenEnum], wire: Any) -> None:
    """A value added to the contract must be added here; UNKNOWN is UNSPECIFIED."""
    prefix = wire.Name(0).removesuffix("UNSPECIFIED")
    expected = {name.removeprefix(prefix): number for name, number in wire.items()}
    expected["UNKNOWN"] = expected.pop("UNSPECIFIED")
    assert {member.name: member.value for member in ours} == expected


def test_numbers_of_a_newer_server_are_unknown() -> None:
    """A number that this client does not have is UNKNOWN; what is no number is refused."""
    assert enums.FinishReason(99) is enums.FinishReason.UNKNOWN
    with pytest.raises(ValueError, match="stop"):
        enums.FinishReason("stop")
