"""What both services are made of: HTTP beside two loops, one that takes events and one that sends them."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from example2.database import Database
from example2.settings import Settings, read
from idemp import Consumer, Message, Reader, Relay, open_log, open_transport
from idemp.errors import IdempError, Unavailable
from idemp.transports.redis_streams import RedisStreamsTransport

log = logging.getLogger("example2")

PAUSE = 1.0
"""Seconds before a loop that could not start, or that ended, is started anew."""
GRACE = 10.0
"""Seconds that the loops get to end."""

Handler = Callable[[Message], None]


class Loops:
    """Takes the events of ``stream`` for ``service``, and relays what its own database has to say.

    rebuild: whether a database that has read nothing yet reads the whole stream first.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        service: str,
        stream: str,
        handlers: Mapping[str, Handler],
        prepare: Callable[[], None],
        *,
        rebuild: bool,
    ) -> None:
        self.state: dict[str, str] = {"consumer": "starting", "relay": "starting"}
        self.counts: dict[str, int] = {}
        self._settings, self._database, self._service = settings, database, service
        self._stream, self._handlers, self._prepare, self._rebuild = stream, handlers, prepare, rebuild
        self._stopping = threading.Event()
        self._stops: dict[str, Callable[[], None]] = {}
        self._prepared = threading.Event()
        self._claimed = 0
        self._looking = threading.Lock()
        self._eye: RedisStreamsTransport | None = None
        self._threads = [
            threading.Thread(target=self._keep_up, args=("consumer", self._consume), daemon=True),
            threading.Thread(target=self._keep_up, args=("relay", self._relay), daemon=True),
        ]

    def start(self) -> None:
        """Start both."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let both end: what runs is finished and acknowledged."""
        self._stopping.set()
        for stop in list(self._stops.values()):
            stop()
        for thread in self._threads:
            thread.join(GRACE)
        if self._eye is not None:
            self._eye.close()

    def _keep_up(self, name: str, work: Callable[[], None]) -> None:
        """Run ``work`` until the service is stopped, whatever happens to it."""
        while not self._stopping.is_set():
            try:
                work()
            except Exception as error:
                level = logging.WARNING if isinstance(error, Unavailable) else logging.ERROR
                log.log(level, "%s: %s ended: %s", self._service, name, error, exc_info=level > 30)
                self.state[name] = str(error)
                self._stopping.wait(PAUSE)
        self.state[name] = "stopped"

    def _consume(self) -> None:
        """First from the start of the stream, if nothing was ever read; then by the group."""
        if not self._prepared.is_set():
            self._prepare()
            self._prepared.set()
        if self._rebuild:
            self._read_all()
        with closing(self._transport()) as transport:
            consumer = Consumer(
                transport, service=self._service, exchange=self._stream, grace=GRACE / 2, meter=self
            )
            for kind, handler in self._handlers.items():
                consumer.on(kind)(handler)
            self._stops["consumer"] = consumer.stop
            if self._stopping.is_set():
                return
            consumer.run(ready=lambda: self.state.update(consumer="running"))

    def _read_all(self) -> None:
        with closing(open_log(self._settings.log(self._stream))) as stream:
            reader = Reader(stream, self._database.store, name=self._service, meter=self)
            for kind, handler in self._handlers.items():
                reader.on(kind)(handler)
            self._stops["consumer"] = reader.stop
            if reader.position():
                return
            self.state["consumer"] = "reading the stream from its start"
            if end := stream.end():
                reader.run(until=end)

    def _relay(self) -> None:
        if not self._prepared.wait(0.1):
            return
        with closing(self._transport()) as transport:
            transport.declare(f"{self._service}-queue.dead")
            relay = Relay(self._database.store, transport, service=self._service, meter=self)
            self._stops["relay"] = relay.stop
            if not self._stopping.is_set():
                self.state["relay"] = "running"
                relay.run()

    def _transport(self) -> RedisStreamsTransport:
        transport = open_transport(self._settings.transport())
        assert isinstance(transport, RedisStreamsTransport)
        return transport

    # ---------------------------------------------------------------- as a meter

    def count(self, name: str, n: int = 1) -> None:
        """See `idemp.ports.Meter`."""
        self.counts[name] = self.counts.get(name, 0) + n

    def time(self, name: str, seconds: float) -> None:
        """See `idemp.ports.Meter`."""

    def level(self, name: str, value: float) -> None:
        """See `idemp.ports.Meter`."""

    def close(self) -> None:
        """See `idemp.ports.Meter`."""

    # ---------------------------------------------------------------- readiness

    def look(self) -> dict[str, Any]:
        """How the loops are, and how far behind.  ``ready``: both run and Redis answers."""
        about: dict[str, Any] = {"ready": False, "loops": dict(self.state), "counts": dict(self.counts)}
        try:
            about |= self._lag()
            about["outbox"] = self._database.store.backlog()._asdict()
        except IdempError as error:
            return about | {"why": str(error)}
        about["ready"] = all(state == "running" for state in self.state.values())
        return about

    def _lag(self) -> dict[str, Any]:
        with self._looking:
            if self._eye is None:
                self._eye = self._transport()
                self._eye.connect()
            try:
                waiting = self._eye.look(f"{self._service}-queue")
                dead = self._eye.depth(f"{self._service}-queue.dead")
            except IdempError:
                self._eye.close()
                self._eye = None
                raise
        if waiting is None:
            return {"lag": None, "dead": dead}
        return {"lag": waiting.ready, "pending": waiting.out, "delayed": waiting.delayed, "dead": dead}


class _AlwaysJson:
    """A body is JSON whatever its header says, as the first seed takes it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            others = [each for each in scope["headers"] if each[0] != b"content-type"]
            scope = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
        await self._app(scope, receive, send)


def make(title: str, loops: Loops, database: Database) -> FastAPI:
    """An application with what both have: status, readiness, and errors as the seed words them."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        loops.start()
        yield
        loops.stop()
        database.close()

    app = FastAPI(title=title, lifespan=life)
    app.add_middleware(_AlwaysJson)

    @app.get("/status", response_class=PlainTextResponse)
    def status() -> str:
        """Whether the process answers."""
        return "OK"

    @app.get("/ready", responses={503: {"description": "Not ready, and why"}})
    def ready() -> JSONResponse:
        """Whether the loops run; lag and what was set aside."""
        about = loops.look()
        return JSONResponse(about, 200 if about["ready"] else 503)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if request.url.path == "/auth/login":
            return Response(status_code=400)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return PlainTextResponse(f"Invalid data: {where} {first['msg']}".replace("  ", " "), 400)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return PlainTextResponse(str(error.detail), error.status_code, headers=error.headers)

    @app.exception_handler(Unavailable)
    async def away(_: Request, error: Unavailable) -> Response:
        return PlainTextResponse(f"{error}; try again", 503, headers={"Retry-After": "1"})

    return app


def main(service: str, port: int, build: Callable[[Settings], FastAPI]) -> int:
    """Serve until SIGTERM or SIGINT; the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        settings = read(os.environ, service, port)
        app = build(settings)
    except IdempError as error:
        print(f"{service}: {error}", file=sys.stderr)
        return 2
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, log_level="warning", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn raises it anew when all is over: that is no failure
    server.run()
    return 0 if server.started else 2
