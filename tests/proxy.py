"""A TCP proxy whose connections a test can cut, hold, slow down, garble, or rob of a reply.

A question is what goes to the target, an answer what comes from it.  One asyncio loop in a thread of
its own does the work, so that tests need not be asynchronous; every method may be called from any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

Way = Literal["questions", "answers"]
T = TypeVar("T")

_RESET = struct.pack("ii", 1, 0)  # linger for no time: close sends a reset
_LINGER = 0.02
"""Seconds from the first lost byte of an answer to the reset, so that the request is taken in for sure."""
_SILENCE = 0.25
"""Seconds that a request which has no answer gets until the reset."""
_HURRY = 10.0


@dataclass
class Counts:
    """What it did, for a test to know that its fault has happened.

    cut: connections that were reset.  lost: those of them whose request got through and whose answer did
    not.  flipped: bytes.  bytes_cut: bytes of answers that nobody got.
    """

    connections: int = 0
    cut: int = 0
    lost: int = 0
    flipped: int = 0
    bytes_cut: int = 0
    questions: int = 0
    answers: int = 0


@dataclass(eq=False)
class _Link:
    """A connection: its end at the client and its end at the target."""

    near: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    far: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    pumps: set[asyncio.Task[None]] = field(default_factory=set)
    ended: set[Way] = field(default_factory=set)
    losing: bool = False
    asked: int = 0  # bytes of questions since a reply is to be lost
    over: asyncio.TimerHandle | None = None

    def ends(self, way: Way) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Where bytes that go that way come from, and go to."""
        return (self.near[0], self.far[1]) if way == "questions" else (self.far[0], self.near[1])

    def end(self, way: Way) -> None:
        """Nothing more comes that way."""
        sink = self.ends(way)[1]
        if way not in self.ended and not sink.is_closing():
            sink.write_eof()
        self.ended.add(way)

    def reset(self) -> None:
        """Both ends, with no farewell."""
        for _, writer in (self.near, self.far):
            with contextlib.suppress(OSError):  # it is gone already
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
        for pump in self.pumps:
            pump.cancel()


class Proxy:
    """Forwards a free port of this machine to ``target``, another one.  ``seed``: of the jitter."""

    def __init__(self, target: int, *, seed: int = 0) -> None:
        self.counts = Counts()
        self._targets = itertools.cycle([target])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._dice = random.Random(seed)
        self._servers: list[asyncio.Server] = []
        self._links: dict[_Link, None] = {}
        self._serving: set[asyncio.Task[Any]] = set()
        self._latency, self._jitter, self._rate = 0.0, 0.0, 0
        self._flip: dict[Way, int] = {}
        self._to_lose, self._least = 0, 1

    # ---------------------------------------------------------------- its life

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._wait(self._open())
        return self

    async def _open(self) -> None:
        self._flows: dict[Way, asyncio.Event] = {"questions": asyncio.Event(), "answers": asyncio.Event()}
        self._release()
        self._servers.append(await asyncio.start_server(self._serve, sock=self._listener))

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_HURRY)
        self._loop.close()

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        while self._serving:  # one may have come while we were closing
            self._cut(len(self._links))
            await asyncio.wait(self._serving, timeout=0.1)
        await asyncio.sleep(0)  # the aborted sockets are closed in the loop's next turn

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_HURRY)

    def _do(self, what: Callable[[], T]) -> T:
        """In the loop's thread."""

        async def done() -> T:
            return what()

        return self._wait(done())

    # ---------------------------------------------------------------- what a test may do

    def cut(self, most: int | None = None) -> int:
        """Reset every connection, or ``most`` of them, the oldest first; how many there were."""
        return self._do(lambda: self._cut(len(self._links) if most is None else most))

    def move(self, *targets: int) -> None:
        """From now on new connections go to another port of this machine, or to each of several in turn."""
        self._targets = itertools.cycle(targets)

    def hold(self, *, questions: bool = False, answers: bool = False) -> None:
        """Keep what goes to the target, or what comes from it; connections stay, and new ones come about."""
        self._do(lambda: self._hold(questions, answers))

    def release(self) -> None:
        """Pass on what was kept, and all that follows."""
        self._do(self._release)

    def half_close(self, way: Way) -> None:
        """Say on every connection that nothing more comes that way; the other way goes on."""
        self._do(lambda: self._half_close(way))

    def delay(self, seconds: float, jitter: float = 0.0) -> None:
        """From now on each piece is that late, more or less by up to ``jitter``; 0: none is."""
        self._latency, self._jitter = seconds, jitter

    def limit(self, rate: int) -> None:
        """From now on so many bytes a second each way of each connection; 0: no limit."""
        self._rate = rate

    def flip(self, way: Way, nth: int) -> None:
        """Turn over the bits of the ``nth`` byte (from 1) that goes that way from now on."""
        self._do(lambda: self._flip.update({way: nth}))

    def lose(self, replies: int = 1, least: int = 1) -> None:
        """The next requests reach the target; their replies are thrown away and the connection is reset.

        least: bytes that make a request; what is less, a ping perhaps, is only the beginning of one.
        A request that is not answered is cut off all the same, after a moment.
        """
        self._do(lambda: self._lose(replies, least))

    def trigger(self, replies: int = 1, least: int = 1) -> int:
        """A port: when somebody connects to it, `lose` is called, and then it hangs up."""

        async def called(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._lose(replies, least)
            writer.close()

        async def listen() -> int:
            self._servers.append(await asyncio.start_server(called, "127.0.0.1", 0))
            return int(self._servers[-1].sockets[0].getsockname()[1])

        return self._wait(listen())

    # ---------------------------------------------------------------- in the loop

    def _hold(self, questions: bool, answers: bool) -> None:
        if questions:
            self._flows["questions"].clear()
        if answers:
            self._flows["answers"].clear()

    def _half_close(self, way: Way) -> None:
        for link in self._links:
            link.end(way)

    def _release(self) -> None:
        for flows in self._flows.values():
            flows.set()

    def _lose(self, replies: int, least: int) -> None:
        self._to_lose, self._least = replies, least
        for link in self._links:
            link.asked = 0

    def _cut(self, most: int) -> int:
        links = list(self._links)[:most]
        for link in links:
            del self._links[link]
            link.reset()
        self.counts.cut += len(links)
        return len(links)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            far = await asyncio.open_connection("127.0.0.1", next(self._targets))
        except OSError:
            writer.close()
        else:
            await self._pass_on(_Link((reader, writer), far))
        finally:
            self._serving.discard(task)

    async def _pass_on(self, link: _Link) -> None:
        self._links[link] = None
        self.counts.connections += 1
        link.pumps = {asyncio.create_task(self._pump(link, "questions"))}
        link.pumps.add(asyncio.create_task(self._pump(link, "answers")))
        await asyncio.wait(link.pumps)
        if self._links.pop(link, link) is None:
            for _, writer in (link.near, link.far):
                writer.close()

    async def _pump(self, link: _Link, way: Way) -> None:
        source, sink = link.ends(way)
        try:
            while data := await source.read(65536):
                await self._flows[way].wait()
                if self._latency:
                    await asyncio.sleep(self._latency + self._dice.uniform(-self._jitter, self._jitter))
                data = self._flipped(way, data)
                setattr(self.counts, way, getattr(self.counts, way) + len(data))
                if not self._lost(link, way, data) and way not in link.ended:
                    await self._write(sink, data)
                    if way == "questions" and link.losing and link.over is None:
                        self._lose_soon(link, _SILENCE)
            link.end(way)
        except OSError:
            # Reset by one side: the other is to know.
            if self._links.pop(link, link) is None:
                link.reset()

    async def _write(self, sink: asyncio.StreamWriter, data: bytes) -> None:
        while data:
            size = max(1, self._rate // 50) if self._rate else len(data)
            sink.write(data[:size])
            await sink.drain()
            if self._rate:
                await asyncio.sleep(size / self._rate)
            data = data[size:]

    def _flipped(self, way: Way, data: bytes) -> bytes:
        nth = self._flip.get(way, 0)
        if not nth:
            return data
        self._flip[way] = max(0, nth - len(data))
        if nth > len(data):
            return data
        self.counts.flipped += 1
        return data[: nth - 1] + bytes([data[nth - 1] ^ 0xFF]) + data[nth:]

    # ---------------------------------------------------------------- a reply is lost

    def _lost(self, link: _Link, way: Way, data: bytes) -> bool:
        """Whether these bytes go nowhere."""
        if way == "questions":
            # Decided before the request is out, so that no answer to it slips through.
            if self._to_lose and not link.losing:
                link.asked += len(data)
                link.losing = link.asked >= self._least
                self._to_lose -= link.losing
            return False
        if link.losing:
            self.counts.bytes_cut += len(data)
            self._lose_soon(link, _LINGER)
        return link.losing

    def _lose_soon(self, link: _Link, seconds: float) -> None:
        if link.over is not None:
            if seconds >= link.over.when() - self._loop.time():
                return
            link.over.cancel()
        link.over = self._loop.call_later(seconds, self._end_of, link)

    def _end_of(self, link: _Link) -> None:
        if self._links.pop(link, link) is None:
            self.counts.cut += 1
            self.counts.lost += 1
            link.reset()
