"""Malformed HTTP/2 from raw sockets, one connection after the other, at a bounded rate."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import struct
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from soak import http2
from soak.tally import Tally, Window

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from soak.clients import Crowd

_TIMEOUT_S = 2.0
# Of a flood, in frames. An attacker makes about 1,000 a second: more, on the processors that it
# shares with the server, would measure the attacker.
_FLOOD = 200
_FLOOD_PAUSE_S = 0.2
_BURSTS = 5
_SLOW_BYTE_S = 0.05
_PAUSE_S = 0.05
_MAX_FRAME = (1 << 24) - 1


class Attacker:
    """Connections to one server."""

    def __init__(self, address: str, dice: random.Random) -> None:
        self.dice = dice
        host, _, port = address.rpartition(":")
        self._host, self._port = host, int(port)
        # Kept open, and silent, until the attacker is closed.
        self._held: list[asyncio.StreamWriter] = []

    async def attack(self, attack: Attack) -> None:
        """Whatever the server answers, or that it hangs up, is as it should be."""
        with suppress(OSError):
            await attack(self)

    async def send(self, *parts: bytes, pause_s: float = 0.0) -> None:
        """Write the parts; then read until the server hangs up or has nothing to say."""
        async with self.connection() as (reader, writer):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause_s)
            async with asyncio.timeout(self.dice.uniform(0.0, _TIMEOUT_S / 8)):
                while await reader.read(1 << 16):
                    pass

    async def hold(self, *parts: bytes) -> None:
        """Write the parts and stay, without ever reading or closing."""
        _, writer = await asyncio.open_connection(self._host, self._port)
        self._held.append(writer)
        with suppress(OSError):
            writer.write(b"".join(parts))

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(self._host, self._port)
            try:
                yield reader, writer
            finally:
                # Half of them as a crash would, with what was not sent yet thrown away.
                if self.dice.random() < 0.5:  # noqa: PLR2004 - one of two ways
                    writer.transport.abort()
                writer.close()

    def close(self) -> None:
        for writer in self._held:
            writer.transport.abort()


Attack = Callable[[Attacker], Awaitable[None]]


async def garbage(attacker: Attacker) -> None:
    await attacker.send(attacker.dice.randbytes(attacker.dice.randint(1, 1 << 14)))


async def http1(attacker: Attacker) -> None:
    await attacker.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")


async def tls_hello(attacker: Attacker) -> None:
    await attacker.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(506))


async def half_preface(attacker: Attacker) -> None:
    await attacker.send(http2.PREFACE[: attacker.dice.randint(1, len(http2.PREFACE) - 1)])


async def slow_preface(attacker: Attacker) -> None:
    parts = [bytes([byte]) for byte in http2.hello()]
    await attacker.send(*parts, pause_s=_SLOW_BYTE_S)


async def half_open(attacker: Attacker) -> None:
    """Connected, and never a byte, or not all of the preface, or no settings after it."""
    await attacker.hold(http2.PREFACE[: attacker.dice.choice((0, 0, 10, len(http2.PREFACE)))])


async def half_call(attacker: Attacker) -> None:
    """A call whose message never comes, by a peer that answers no ping."""
    await attacker.hold(http2.hello(), http2.call(1))


async def huge_frames(attacker: Attacker) -> None:
    kind = attacker.dice.choice((http2.DATA, http2.HEADERS, http2.SETTINGS, 0x42))
    frame = http2.frame(kind, bytes(1 << 15), flags=0, stream=1, length=_MAX_FRAME)
    await attacker.send(http2.hello(), http2.call(1), frame)


async def unknown_frames(attacker: Attacker) -> None:
    dice = attacker.dice
    frames = [
        http2.frame(
            dice.randint(0x0B, 0xFF),
            dice.randbytes(dice.randint(0, 64)),
            flags=dice.randint(0, 255),
            stream=dice.randint(0, 9),
        )
        for _ in range(50)
    ]
    await attacker.send(http2.hello(), b"".join(frames))


INVALID = (
    http2.frame(http2.SETTINGS, bytes(5)),
    http2.frame(http2.SETTINGS, bytes(6), flags=http2.ACK),
    http2.frame(http2.SETTINGS, bytes(6), stream=3),
    # A window and a frame larger than may be.
    http2.settings((4, 0xFFFFFFFF)),
    http2.settings((5, 1)),
    http2.frame(http2.WINDOW_UPDATE, bytes(4)),
    http2.frame(http2.WINDOW_UPDATE, b"\x7f\xff\xff\xff") * 2,
    http2.frame(http2.HEADERS, b"\x82", flags=http2.END_HEADERS),
    http2.frame(http2.HEADERS, b"\x82", flags=http2.END_HEADERS, stream=2),
    # Not HPACK: an index of no table, a length without end, a table larger than agreed.
    http2.frame(http2.HEADERS, b"\xfe\xff\xff", flags=http2.END_HEADERS, stream=1),
    http2.frame(http2.HEADERS, b"\x00\x7f" + b"\xff" * 20, flags=http2.END_HEADERS, stream=1),
    http2.frame(http2.HEADERS, b"\x3f\xff\xff\xff\x7f", flags=http2.END_HEADERS, stream=1),
    http2.frame(http2.CONTINUATION, b"\x82", flags=http2.END_HEADERS, stream=1),
    http2.frame(http2.PUSH_PROMISE, bytes(8), flags=http2.END_HEADERS, stream=1),
    http2.frame(http2.RST_STREAM, bytes(4), stream=99),
    http2.frame(http2.RST_STREAM, bytes(3), stream=1),
    http2.frame(http2.DATA, b"x", stream=99),
    http2.frame(http2.DATA, b"\xff", flags=http2.PADDED, stream=1),
    http2.frame(http2.PING, bytes(7)),
    http2.frame(http2.GOAWAY, bytes(2)),
    http2.frame(http2.PRIORITY, bytes(3), stream=1),
    http2.call(1) + http2.call(1),
    http2.call(5) + http2.call(3),
    http2.call(1, "/" + "x" * 100),
    http2.call(1, "not a path"),
    # Messages: longer than may be, compressed by nothing, cut off, no message of ours.
    http2.call(1) + http2.message(1, b"", claimed=0xFFFFFFFF),
    http2.call(1) + http2.message(1, b"x", compressed=1),
    http2.call(1) + http2.message(1, b"x", claimed=100),
    http2.call(1) + http2.message(1, b"\xff" * 50),
)


async def invalid_frames(attacker: Attacker) -> None:
    await attacker.send(http2.hello(), attacker.dice.choice(INVALID))


async def endless_headers(attacker: Attacker) -> None:
    """Headers that go on in one CONTINUATION after the other."""
    more = http2.frame(http2.CONTINUATION, http2.header("x" * 60, "y" * 60) * 8, stream=1)
    await attacker.send(http2.hello(), http2.call(1, flags=0), more * _FLOOD)
    await asyncio.sleep(_FLOOD_PAUSE_S)


async def rst_flood(attacker: Attacker) -> None:
    """CVE-2023-44487: calls that are reset as soon as they are made."""
    streams = range(1, 2 * _FLOOD, 2)
    await attacker.send(
        http2.hello(),
        b"".join(
            http2.call(stream) + http2.frame(http2.RST_STREAM, http2.CANCEL, stream=stream)
            for stream in streams
        ),
    )
    await asyncio.sleep(_FLOOD_PAUSE_S)


async def settings_flood(attacker: Attacker) -> None:
    await _flood_unread(attacker, http2.settings((3, 100)))


async def ping_flood(attacker: Attacker) -> None:
    await _flood_unread(attacker, http2.frame(http2.PING, bytes(8)))


async def window_flood(attacker: Attacker) -> None:
    await _flood_unread(attacker, http2.frame(http2.WINDOW_UPDATE, struct.pack(">I", 1)))


async def _flood_unread(attacker: Attacker, frame: bytes) -> None:
    """Without reading the acknowledgements."""
    async with attacker.connection() as (_, writer):
        writer.write(http2.hello())
        for _ in range(_BURSTS):
            writer.write(frame * _FLOOD)
            await writer.drain()
            await asyncio.sleep(_FLOOD_PAUSE_S)


ATTACKS: tuple[Attack, ...] = (
    garbage, http1, tls_hello, half_preface, slow_preface, half_open, half_call, huge_frames,
    unknown_frames, invalid_frames, endless_headers, rst_flood, settings_flood, ping_flood,
    window_flood,
)  # fmt: skip


class Attackers:
    """`crowd.streams` of them, each with one attack after the other while a window lasts."""

    def __init__(self, crowd: Crowd) -> None:
        self._attackers = [
            Attacker(crowd.address, random.Random(f"attack {crowd.seed} {number}"))  # noqa: S311
            for number in range(crowd.streams)
        ]

    async def open(self) -> None:
        """They connect when they attack."""

    async def run(self, ramp_s: float, seconds: float) -> Tally:
        """`calls` counts the attacks."""
        tally, window = Tally(), Window.of(ramp_s, seconds)

        async def attack(attacker: Attacker, first: int) -> None:
            for number in itertools.count(first):
                if window.is_over:
                    break
                await attacker.attack(ATTACKS[number % len(ATTACKS)])
                tally.calls += 1
                await asyncio.sleep(_PAUSE_S)

        await asyncio.gather(
            *(attack(attacker, 4 * number) for number, attacker in enumerate(self._attackers))
        )
        return tally

    async def close(self) -> None:
        for attacker in self._attackers:
            attacker.close()
