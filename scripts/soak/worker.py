"""`python -m soak.worker CROWD`: one crowd of clients, a process of its own.

Each line on its standard input is a window, `{"ramp_s": …, "seconds": …}` or `{"calls": …}`, and is
answered by a line with the Tally's facts; the end of input ends it. Connections stay open between.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from soak.attack import Attackers
from soak.clients import Connections, Crowd
from soak.vanish import Vanishing

WELL_BEHAVED = ("good", "short")
_NICENESS = 10


def _open(crowd: Crowd) -> Connections | Attackers | Vanishing:
    match crowd.kind:
        case "attacking":
            return Attackers(crowd)
        case "vanishing":
            return Vanishing(crowd)
        case _:
            return Connections(crowd)


async def work(crowd: Crowd) -> None:
    connections = _open(crowd)
    await connections.open()
    print("{}", flush=True)
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            window = json.loads(line)
            if "calls" in window and isinstance(connections, Connections):
                tally = await connections.run_calls(window["calls"])
            else:
                tally = await connections.run(window["ramp_s"], window["seconds"])
            print(json.dumps(tally.facts()), flush=True)
    finally:
        await connections.close()


def main() -> None:
    crowd = Crowd(**json.loads(sys.argv[1]))
    if crowd.kind not in WELL_BEHAVED:
        # Elsewhere they would take none of the server's processors; here, as little as can be.
        os.nice(_NICENESS)
    asyncio.run(work(crowd))


if __name__ == "__main__":
    main()
