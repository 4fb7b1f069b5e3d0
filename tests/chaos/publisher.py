"""The publisher of a run: `python -m tests.chaos.publisher`, with its settings and orders on its input.

It makes new ids at a steady rate, sends some of them more than once, and sends the same id again whenever it
cannot know what became of it.  First comes its `Settings` as a line of JSON, then orders: {"n": 1, "order":
"garbage", "count": 5}, answered by {"n": 1, "ok": 5, "fail": 0} when the broker has had its word on each;
{"n": 2, "order": "finish"} ends it when nothing is open.  It ends when its input does.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from idemp import Message, open_transport
from idemp.errors import TransportUnavailable
from idemp.message import Properties
from idemp.ports import Publication, Sent, Transport
from tests.reliability.history import History, digest
from tests.service import ROOT

PATIENCE = 5.0
"""Seconds without the broker's word after which the connection is made anew."""
MOST = 400
"""Publications in one turn, so that what was held up does not come all at once."""
OUT = 3000
"""Publications that wait for the broker's word."""
COPIES = (1, 1, 1, 1, 1, 1, 1, 2, 2, 3)
"""How often an id is sent: one of these."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """transport: where to publish.  rate: new ids a second.  name: what its ids begin with."""

    transport: str
    folder: str
    rate: float
    seed: int
    name: str
    exchange: str = "events"


class Item(NamedTuple):
    """Something to send; ``order``: whose, 0 is nobody's."""

    id: str
    publication: Publication
    order: int = 0


@dataclass
class Answer:
    """What an order waits for."""

    left: int
    told: Counter[str] = field(default_factory=Counter)


class Publisher:
    """Sends, and settles with its history what became of it."""

    def __init__(self, settings: Settings, orders: queue.SimpleQueue[dict[str, Any] | None]) -> None:
        self._settings, self._orders = settings, orders
        self._history = History(Path(settings.folder), "publisher")
        self._dice = random.Random(f"{settings.seed} {settings.name}")
        self._numbers = itertools.count(1)
        self._later: list[tuple[float, int, Item]] = []
        self._next: deque[Item] = deque()
        self._out: dict[int, tuple[int, Item, float]] = {}
        self._answers: dict[int, Answer] = {}
        self._finish = 0
        self._recent: deque[Message] = deque(maxlen=200)
        self._transport: Transport = open_transport(settings.transport)
        self._connected = False

    def run(self) -> None:
        begun, made = time.monotonic(), 0
        while True:
            with suppress(queue.Empty):
                while True:
                    order = self._orders.get_nowait()
                    if order is None:
                        return
                    self._take(order)
            now = time.monotonic()
            due = 0 if self._finish else int((now - begun) * self._settings.rate) - made
            for _ in range(min(due, MOST)):
                self._usual(now)
                made += 1
            while self._later and (self._later[0][0] <= now or self._finish):
                self._next.append(heapq.heappop(self._later)[2])
            if self._finish and not (self._next or self._out or self._answers):
                print(json.dumps({"n": self._finish, "ok": made}), flush=True)
                return
            self._turn(now)

    def _turn(self, now: float) -> None:
        try:
            if not self._connected:  # before anything is noted as sent
                self._transport.connect()
                self._connected = True
            batch = [self._next.popleft() for _ in range(min(len(self._next), MOST, OUT - len(self._out)))]
            self._send(batch, now)
            for event in self._transport.poll(0.02):
                if isinstance(event, Sent):
                    self._sent(event)
            if self._out and now - next(iter(self._out.values()))[2] > PATIENCE:
                raise TransportUnavailable("the broker says nothing")
        except TransportUnavailable:
            self._lose()

    def _send(self, batch: list[Item], now: float) -> None:
        if not batch:
            return
        ops = [self._history.number() for _ in batch]
        lines = [
            {"f": "publish", "op": op, "k": item.id, "sha": digest(item.publication.body)}
            for op, item in zip(ops, batch, strict=True)
        ]
        self._history.note_all({**line, "type": "invoke"} for line in lines)
        try:
            numbers = self._transport.send([item.publication for item in batch])
        except TransportUnavailable:
            numbers = [-op for op in ops]  # some may be on their way
            raise
        finally:
            self._out.update(
                (number, (op, item, now)) for number, op, item in zip(numbers, ops, batch, strict=True)
            )

    def _sent(self, event: Sent) -> None:
        op, item, _ = self._out.pop(event.number)
        if event.error and not event.unroutable:
            self._note("info", op, item)
            self._next.append(item)
            return
        told = "fail" if event.error else "ok"
        self._note(told, op, item)
        answer = self._answers.get(item.order)
        if answer is not None:
            answer.left -= 1
            answer.told[told] += 1
            if not answer.left:
                del self._answers[item.order]
                print(json.dumps({"n": item.order, **answer.told}), flush=True)

    def _note(self, type: str, op: int, item: Item) -> None:
        self._history.note("publish", type, op=op, k=item.id, sha=digest(item.publication.body))

    def _lose(self) -> None:
        """Nobody knows what became of what is out: the same again, on a new connection."""
        out, self._out = self._out, {}
        self._history.note_all(
            {"f": "publish", "type": "info", "op": op, "k": item.id, "sha": digest(item.publication.body)}
            for op, item, _ in out.values()
        )
        self._next.extendleft(reversed([item for _, item, _ in out.values()]))
        self._connected = False
        time.sleep(0.3)

    # ---------------------------------------------------------------- messages

    def _id(self, kind: str) -> str:
        return f"{self._settings.name}/{kind}/{next(self._numbers)}"

    def _message(self, kind: str, **args: Any) -> Message:
        return Message(self._id(kind), "new_order", {"cents": self._dice.randrange(100_000), **args})

    def _publication(self, message: Message, key: str = "") -> Publication:
        exchange = "" if key else self._settings.exchange
        return Publication(message.encode(), message.properties(), exchange, key or "orders.new")

    def _usual(self, now: float) -> None:
        args: dict[str, Any] = {}
        match self._dice.random():
            case luck if luck < 0.02:
                args = {"fails": self._dice.choice((1, 1, 2))}
            case luck if luck < 0.05:  # so that a pause or a kill finds a handler at work
                args = {"seconds": 0.05}
        message = self._message("order", **args)
        self._recent.append(message)
        item = Item(message.id, self._publication(message))
        self._next.append(item)
        for _ in range(self._dice.choice(COPIES) - 1):
            self._put_off(item, now + self._dice.uniform(0.0, 4.0))

    def _put_off(self, item: Item, at: float) -> None:
        heapq.heappush(self._later, (at, next(self._numbers), item))

    def _take(self, order: dict[str, Any]) -> None:
        number, count = order["n"], order.get("count", 1)
        if order["order"] == "finish":
            self._finish = number
            return
        items = list(self._ordered(order["order"], count, number, order.get("seconds", 0.0)))
        self._answers[number] = Answer(len(items))
        self._next.extend(items)

    def _ordered(self, order: str, count: int, number: int, seconds: float) -> list[Item]:
        def items(message: Message, times: int = 1, key: str = "") -> list[Item]:
            return [Item(message.id, self._publication(message, key), number)] * times

        match order:
            case "poison":
                made = [items(self._message("poison", poison=True)) for _ in range(count)]
            case "slow":
                made = [items(self._message("slow", seconds=seconds)) for _ in range(count)]
            case "held":
                made = [items(self._message("held", seconds=seconds), 3) for _ in range(count)]
            case "raising":
                made = [items(self._message("raising", fails=2)) for _ in range(count)]
            case "hopeless":
                made = [items(self._message("hopeless", fails=99)) for _ in range(count)]
            case "storm":
                made = [items(self._message("storm"), 25) for _ in range(count)]
            case "repeats":
                made = [items(message) for message in self._dice.choices(self._recent, k=count)]
            case "unroutable":
                made = [items(self._message("unroutable"), key=f"nobody-{number}") for _ in range(count)]
            case "conflict":
                made = [self._conflict(number) for _ in range(count)]
            case "garbage":
                made = [[self._garbage(number)] for _ in range(count)]
            case other:
                raise ValueError(other)
        return [item for several in made for item in several]

    def _conflict(self, number: int) -> list[Item]:
        """The same id with two bodies."""
        one = self._message("conflict")
        two = Message(one.id, one.type, {"cents": -1})
        return [Item(one.id, self._publication(each), number) for each in (one, two)]

    def _garbage(self, number: int) -> Item:
        id = self._id("garbage")
        body = self._dice.choice((b"", b"{", b"[1, 2]", b"\xff\xfe", b'{"id": 7}', b'{"type": "what"}' * 3))
        properties = Properties(message_id=id, timestamp=time.time())
        return Item(id, Publication(body, properties, self._settings.exchange, "orders.new"), number)


# ------------------------------------------------------------------ from outside


class Publishing:
    """A publisher as a process; when it is killed, the next one has ids of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._orders = itertools.count(1)
        self._lock = threading.Lock()
        self._generation = itertools.count(1)
        self.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        self._answers: dict[int, dict[str, int]] = {}
        settings = asdict(self._settings)
        settings["name"] = f"{self._settings.name}{next(self._generation)}"
        with (Path(self._settings.folder) / "publisher.said").open("ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.publisher"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        self._tell(settings)
        threading.Thread(target=self._listen, args=(self._process, self._answers), daemon=True).start()

    def _tell(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()

    def _listen(self, process: subprocess.Popen[str], answers: dict[int, dict[str, int]]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                answer = json.loads(line)
                answers[answer.pop("n")] = answer

    def order(self, order: str, **facts: Any) -> int:
        """Its number, for `answer`."""
        number = next(self._orders)
        self._tell({"n": number, "order": order, **facts})
        return number

    def answer(self, number: int, timeout: float) -> dict[str, int] | None:
        """What came of an order; None if it did not come in time."""
        end = time.monotonic() + timeout
        while number not in self._answers:
            if time.monotonic() > end:
                return None
            time.sleep(0.05)
        return self._answers[number]

    def kill(self) -> int:
        """Its end, by kill -9; its exit code."""
        self._process.kill()
        return self._end()

    def close(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._end()

    def _end(self) -> int:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        return self._process.wait(30)


def _orders(into: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    for line in sys.stdin:
        into.put(json.loads(line))
    os._exit(0)  # whoever asked is gone


def main() -> None:
    settings = Settings(**json.loads(sys.stdin.readline()))
    orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_orders, args=(orders,), daemon=True).start()
    Publisher(settings, orders).run()


if __name__ == "__main__":
    main()
