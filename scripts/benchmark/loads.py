"""The arrival patterns, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from benchmark.workload import SamplingKind

LoadKind = Literal["closed", "poisson", "prefix", "mixed", "long", "two-models", "slow-reader"]

MAX_STREAMS = 64
POISSON_SHARE = 0.7
MIXED_STREAMS = 32
FEW_STREAMS = 8
TWO_MODELS_STREAMS = 16
QUICK_LOADS = "closed-1,closed-8,sampled-8"
DEFAULT_LOADS = "closed-1,closed-4,closed-8,closed-16,closed-32,closed-64,sampled-16"

HELP = """\
closed-N      N streams, each sends its next request when its last one has ended
sampled-N     the same with temperature 0.8 and top-p 0.95
poisson[-X]   requests arrive at random, at X (0.7) of what the loop can serve
prefix        chats with 2,000 tokens in common: the second turn's first token against the first's
mixed         32 streams greedy and with other sampling parameters in every request, in turns
long          a 4,000-token prompt arrives among 8 streams
two-models    8 streams on each of two models, against 16 on one
slow-reader   8 streams beside a reader that stops reading
"""


@dataclass(frozen=True, slots=True)
class Load:
    name: str
    kind: LoadKind
    streams: int
    sampling: SamplingKind = "greedy"
    # Of the loop's capacity, for poisson.
    share: float = 0.0


def parse_loads(names: str) -> list[Load]:
    """Raises: ValueError for a name that is no load."""
    return [parse_load(name) for name in names.split(",")]


def parse_load(name: str) -> Load:
    stem, _, number = name.partition("-")
    if name in get_args(LoadKind) and name not in ("closed", "poisson"):
        return _named(name)
    try:
        match stem:
            case "closed":
                return Load(name, "closed", _streams(number))
            case "sampled":
                return Load(name, "closed", _streams(number), "sampled")
            case "poisson":
                share = float(number or POISSON_SHARE)
                if share > 0:
                    return Load(name, "poisson", MAX_STREAMS, share=share)
    except ValueError:
        pass
    raise ValueError(f"no load is called {name!r}; there are:\n{HELP}")


def _named(name: str) -> Load:
    match name:
        case "prefix":
            return Load(name, "prefix", 1)
        case "mixed":
            return Load(name, "mixed", MIXED_STREAMS, "mixed")
        case "long":
            return Load(name, "long", FEW_STREAMS)
        case "two-models":
            return Load(name, "two-models", TWO_MODELS_STREAMS)
        case _:
            return Load(name, "slow-reader", FEW_STREAMS)


def _streams(number: str) -> int:
    streams = int(number)
    if not 1 <= streams <= MAX_STREAMS:
        raise ValueError(number)
    return streams
