"""Health: ``/live`` and ``/ready`` over HTTP, for whoever starts this service anew or sends it work.

live: the consumer's loop turns.  A broker or a store that is away is no reason to be started anew.
ready: the store is open and caught up, and the broker delivers.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from idemp import ConfigError, Consumer

STUCK = 60.0
"""Seconds without a turn of the loop after which it will not turn any more."""
PATIENCE = 5.0
"""Seconds that who is connected may say nothing."""
MOST = 32
"""Connections at a time."""
_PAUSE = 0.1


class Health:
    """Answers on ``port`` of every address; before there is a consumer, it is starting."""

    def __init__(self, port: int) -> None:
        self.consumer: Consumer | None = None
        try:
            self._server = _Server(("", port), self._handler())
        except OSError as error:
            raise ConfigError(f"port {port}: {error.strerror}") from None
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def live(self) -> str:
        """Why it must be started anew; "" if it need not."""
        silent = 0.0 if self.consumer is None else self.consumer.silent()
        return f"its loop has not turned for {silent:.0f} s" if silent > STUCK else ""

    def ready(self) -> str:
        """Why it takes no messages; "" if it does."""
        return "it is starting" if self.consumer is None else self.consumer.trouble()

    def close(self) -> None:
        """Let go of the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(health: Health) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            timeout = PATIENCE

            def do_GET(self) -> None:
                ask = {"/live": health.live, "/ready": health.ready}.get(self.path)
                if ask is None:
                    self.send_error(404)
                    return
                why = ask()
                body = json.dumps({self.path[1:]: not why, "why": why}).encode() + b"\n"
                self.send_response(503 if why else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Every few seconds the same is no news."""

        return Handler


class _Server(ThreadingHTTPServer):
    """A thread for each connection.  One too many ends the oldest: who asks is answered at once."""

    def __init__(self, *about: Any) -> None:
        self._lock = threading.Lock()
        self._open: dict[socket.socket, None] = {}  # in the order in which they came
        super().__init__(*about)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:
            time.sleep(_PAUSE)  # most often it has no file left, and would be asked again at once
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open[request] = None
            if len(self._open) > MOST:
                del self._open[oldest := next(iter(self._open))]
                with suppress(OSError):  # it has gone by itself
                    oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who asked and went away is no news."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)
