"""A port for the gateway as operators write it: a `[[gateway]]` table or `MODEL=HOST:PORT`."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from mlxpool_server.domain import GATEWAY_MAX_DURATION_S, GatewayPort
from mlxpool_server.settings.fields import Seconds, TcpAddress


class GatewayTable(BaseModel):
    """One `[[gateway]]` table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    listen: TcpAddress
    max_duration_s: Annotated[Seconds, Field(gt=0)] = GATEWAY_MAX_DURATION_S

    def domain_value(self, _folder: Path) -> GatewayPort:
        return GatewayPort(self.model, self.listen, self.max_duration_s)


def parse_gateway_flag(text: str) -> GatewayPort:
    """Read `MODEL=HOST:PORT`. Raises: ValueError, whose text ends with the remedy."""
    model, equals, listen = text.rpartition("=")
    if not (model and equals and listen):
        raise ValueError("not a gateway port; write MODEL=HOST:PORT")
    return GatewayTable(model=model, listen=listen).domain_value(Path())
