"""A TCP proxy whose connections a test can cut, or silence in one direction or both."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Self

_RESET = struct.pack("ii", 1, 0)  # linger for no time: close sends a reset


class Proxy:
    """Forwards a free port of this machine to ``target``, another one."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._ended = threading.Event()
        self._asking, self._answering = threading.Event(), threading.Event()  # set while bytes flow that way
        self.release()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._ended.set()
        self._listener.close()
        self.cut()
        self.release()

    def cut(self) -> int:
        """Reset every connection, both ways; how many there were."""
        with self._lock:
            sockets, self._open = self._open, set()
        for end in sockets:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        return len(sockets) // 2

    def hold(self, *, questions: bool = False, answers: bool = False) -> None:
        """Keep what goes to the target, or what comes from it; connections stay, and new ones come about."""
        if questions:
            self._asking.clear()
        if answers:
            self._answering.clear()

    def release(self) -> None:
        """Pass on what was kept, and all that follows."""
        self._asking.set()
        self._answering.set()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            with self._lock:
                self._open |= {near, far}
            if self._ended.is_set():  # it came while we were closing
                self.cut()
            for way in ((near, far, self._asking), (far, near, self._answering)):
                threading.Thread(target=self._pump, args=way, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, flows: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                flows.wait()
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
