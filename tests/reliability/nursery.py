"""Consumers that cost little to kill: `python -m tests.reliability.nursery` forks them from a warm process.

It never opens a store itself, so no driver's thread is alive when it forks.  Orders come as JSON lines:
``{"start": {...}}`` (see `Spec`) is answered by ``{"pid": 4711}``, and ``{"ended": 4711}`` by
``{"status": -9}``, or null while it lives.  When its input ends, it kills what it forked: nothing
outlives who asked for it.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from idemp import Consumer, Message, context, idempotent, open_store, open_transport
from idemp.errors import StoreUnavailable, TransportUnavailable
from tests.orders import Forker
from tests.reliability.history import History, digest
from tests.reliability.witness import WitnessedStore, WitnessedTransport

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Strike:
    """What to do at a step: the ``nth`` time that it is reached with ``id`` (or any) among its messages.

    action: "kill" (kill -9); "stop" (SIGSTOP; somebody else continues it); "raise" what may be raised
    there: by the handler an error, by the store `StoreUnavailable`, by the broker `TransportUnavailable`;
    "call:PORT": connect to that port of this machine, and go on when whoever is there hangs up.
    """

    step: str
    action: str
    nth: int = 1
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One consumer.  ``folder`` gets its history, the ledger of effects, its log, and ``ready.<pid>``.

    What a message's args ask of the handler: ``fails``: raise in so many attempts; ``seconds``: last so long;
    ``poison``: end the process at once, in the middle.
    """

    service: str
    transport: str
    store: str
    folder: str
    in_doubt: str = "retry"
    attempts: int = 5
    prefetch: int = 64
    workers: int = 1
    wait: float = 30.0
    backoff: float = 0.2
    fingerprint: str | None = None
    transaction: bool = False
    strikes: Sequence[Strike] = field(default_factory=tuple)


class Struck(Exception):
    """A strike of the kind "raise", inside the handler."""


ERRORS: Mapping[str, type[Exception]] = {
    **dict.fromkeys(("claim", "takeover", "mark", "release", "park"), StoreUnavailable),
    **dict.fromkeys(("deliver", "ack", "retry", "dlq"), TransportUnavailable),
}
"""What may be raised at a step, by its first word; elsewhere it is the handler's own error."""


class Striker:
    """Carries out strikes, each once."""

    def __init__(self, strikes: Sequence[Strike], history: History) -> None:
        self._left = {strike: strike.nth for strike in strikes}
        self._history = history

    def __call__(self, step: str, ids: Sequence[str]) -> None:
        for strike in [s for s in self._left if s.step == step and (not s.id or s.id in ids)]:
            self._left[strike] -= 1
            if not self._left[strike]:
                del self._left[strike]
                self._history.note("failpoint", "ok", step=step, action=strike.action, ids=list(ids)[:20])
                self._strike(strike)

    def _strike(self, strike: Strike) -> None:
        match strike.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(0.05)  # this thread may get a little further before all are stopped
            case "raise":
                raise ERRORS.get(strike.step.partition(".")[0], Struck)(f"struck at {strike.step}")
            case call if call.startswith("call:"):
                port = int(call.partition(":")[2])
                with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
                    line.recv(1)
            case other:
                raise ValueError(other)


def consume(spec: Spec) -> None:
    """Be one consumer until SIGTERM."""
    if spec.transaction:
        from tests.reliability import inbox

        return inbox.consume(spec)
    folder = Path(spec.folder)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    history = History(folder, "consumer")
    at = Striker(spec.strikes, history)
    ledger = os.open(folder / "ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    store = WitnessedStore(open_store(spec.store), history, at)
    transport = WitnessedTransport(open_transport(spec.transport), history, at)
    consumer = Consumer(
        transport, service=spec.service, prefetch=spec.prefetch, workers=spec.workers, backoff=spec.backoff
    )

    @consumer.on("new_order")
    @idempotent(
        store,
        name=f"{spec.service}.new_order",
        in_doubt=spec.in_doubt,  # type: ignore[arg-type]
        attempts=spec.attempts,
        wait=spec.wait,
        fingerprint=spec.fingerprint,
    )
    def new_order(message: Message) -> str:
        mine = {"k": message.id, "att": context().attempt, "tok": context().fencing_token}
        mine["sha"] = digest(message.encode())
        op = history.number()
        history.note("run", "invoke", op=op, **mine)
        try:
            at("handler.before", [message.id])
            time.sleep(message.args.get("seconds", 0))
            # An effect counts from its first half on.
            os.write(
                ledger, (json.dumps({"t": time.monotonic_ns(), "p": os.getpid(), **mine}) + "\n").encode()
            )
            at("effect.mid", [message.id])
            if message.args.get("poison"):
                os.kill(os.getpid(), signal.SIGKILL)
            history.note("effect", "ok", op=op, **mine)
            at("effect.after", [message.id])
            if message.args.get("fails", 0) >= context().attempt:
                raise ValueError("as told")
        except BaseException as error:
            history.note("run", "fail", op=op, error=str(error), **mine)
            raise
        history.note("run", "ok", op=op, **mine)
        return f"{message.id} at attempt {context().attempt}"

    consumer.run(ready=lambda: (folder / f"ready.{os.getpid()}").touch())
    store.close()
    transport.close()


class Nursery(Forker):
    """The process that forks them."""

    def __init__(self) -> None:
        super().__init__("tests.reliability.nursery")

    def start(self, spec: Spec) -> int:
        """The process id of a new consumer, which may not be ready yet."""
        return int(self._order(start=asdict(spec))["pid"])

    def ended(self, pid: int) -> int | None:
        """How a consumer ended: its exit code, or minus the signal; None while it lives."""
        status: int | None = self._order(ended=pid)["status"]
        return status


def _serve() -> None:
    children: dict[int, int | None] = {}
    for line in sys.stdin:
        match json.loads(line):
            case {"start": spec}:
                spec["strikes"] = [Strike(**strike) for strike in spec["strikes"]]
                pid = _fork(Spec(**spec))
                children[pid] = None  # the number may have been another's before
                answer: dict[str, Any] = {"pid": pid}
            case {"ended": pid}:
                _reap(children, pid)
                answer = {"status": children[pid]}
        print(json.dumps(answer), flush=True)
    for pid in children:
        _reap(children, pid)
        if children[pid] is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _reap(children: dict[int, int | None], pid: int) -> None:
    if children[pid] is None:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            children[pid] = os.waitstatus_to_exitcode(status)


def _fork(spec: Spec) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    # Not back into the loop of orders, whatever happens.
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        _own_output(Path(spec.folder))
        consume(spec)
        os._exit(0)
    except BaseException:
        logging.exception("this consumer is at its end")
        os._exit(70)


def _own_output(folder: Path) -> None:
    said = os.open(folder / f"said.{os.getpid()}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    for stream in (1, 2):
        os.dup2(said, stream)


if __name__ == "__main__":
    _serve()
