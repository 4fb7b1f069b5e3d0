"""The proxy does to real connections what its methods say, and counts it."""

from __future__ import annotations

import contextlib
import select
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.proxy import Proxy

TIMEOUT = 10.0


class Echo(socketserver.ThreadingTCPServer):
    """Answers each piece with itself, after "quiet" never again; keeps what it heard and how each ended."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Echo)
        self.port: int = self.socket.getsockname()[1]
        self.heard = bytearray()
        self.ends: list[str] = []


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        server, quiet = self.server, False
        assert isinstance(server, Echo)
        try:
            while data := self.request.recv(65536):
                server.heard += data
                quiet = quiet or data == b"quiet"
                if not quiet:
                    self.request.sendall(data)
            server.ends.append("closed")
            self.request.sendall(b"bye")
        except OSError:
            server.ends.append("reset")


@pytest.fixture
def echo() -> Iterator[Echo]:
    """A server."""
    with Echo() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    """A proxy before it."""
    with Proxy(echo.port) as made:
        yield made


@pytest.fixture
def connect(proxy: Proxy) -> Iterator[Callable[[], socket.socket]]:
    """Makes connections to it, which have proved to work."""
    with contextlib.ExitStack() as stack:

        def connected() -> socket.socket:
            made = socket.create_connection(("127.0.0.1", proxy.port), TIMEOUT)
            stack.enter_context(made)
            assert asked(made, b"hello") == b"hello"
            return made

        yield connected


Connect = Callable[[], socket.socket]


def asked(client: socket.socket, question: bytes) -> bytes:
    """The whole answer to it."""
    client.sendall(question)
    return received(client, len(question))


def received(client: socket.socket, size: int) -> bytes:
    """So many bytes, or what came before the end."""
    data = b""
    while len(data) < size and (more := client.recv(size - len(data))):
        data += more
    return data


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + TIMEOUT
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def silent(client: socket.socket, seconds: float = 0.2) -> bool:
    """Whether nothing comes for so long."""
    return not select.select([client], [], [], seconds)[0]


def test_passes_everything_both_ways(proxy: Proxy, connect: Connect, echo: Echo) -> None:
    data = bytes(range(256)) * 4000
    client = connect()
    threading.Thread(target=client.sendall, args=(data,)).start()

    assert received(client, len(data)) == data
    assert echo.heard == b"hello" + data
    assert proxy.counts.connections == 1
    assert proxy.counts.questions == proxy.counts.answers == 5 + len(data)
    assert proxy.counts.cut == 0


def test_an_end_is_passed_on_and_the_other_way_stays(connect: Connect, echo: Echo) -> None:
    client = connect()
    client.shutdown(socket.SHUT_WR)
    assert client.recv(10) == b"bye"
    assert client.recv(10) == b""
    assert echo.ends == ["closed"]


def test_a_reset_is_passed_on(connect: Connect, echo: Echo) -> None:
    client = connect()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    until(lambda: echo.ends == ["reset"])


def test_a_target_that_is_not_there_hangs_up(connect: Connect) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with Proxy(nobody.getsockname()[1]) as proxy:
            with socket.create_connection(("127.0.0.1", proxy.port), TIMEOUT) as client:
                assert client.recv(1) == b""
            assert proxy.counts.connections == 0


def test_cut_resets_all_and_new_ones_come_about(proxy: Proxy, connect: Connect, echo: Echo) -> None:
    one, two = connect(), connect()
    assert proxy.cut() == 2
    for client in (one, two):
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    until(lambda: echo.ends == ["reset", "reset"])
    connect()
    assert proxy.counts.cut == 2


def test_cut_of_one_takes_the_oldest(proxy: Proxy, connect: Connect) -> None:
    one, two = connect(), connect()
    assert proxy.cut(1) == 1
    with pytest.raises(ConnectionResetError):
        one.recv(1)
    assert asked(two, b"still here") == b"still here"


def test_hold_the_questions(proxy: Proxy, connect: Connect, echo: Echo) -> None:
    client = connect()
    proxy.hold(questions=True)
    client.sendall(b"later")
    assert silent(client)
    assert echo.heard == b"hello"
    proxy.release()
    assert received(client, 5) == b"later"


def test_hold_the_answers(proxy: Proxy, connect: Connect, echo: Echo) -> None:
    """On new connections too."""
    client = connect()
    proxy.hold(answers=True)
    client.sendall(b"later")
    until(lambda: echo.heard == b"hellolater")
    assert silent(client)
    with socket.create_connection(("127.0.0.1", proxy.port), TIMEOUT) as new:
        new.sendall(b"me too")
        until(lambda: echo.heard.endswith(b"me too"))
        assert silent(new)
        proxy.release()
        assert received(new, 6) == b"me too"
    assert received(client, 5) == b"later"


def test_hold_both_and_leave(proxy: Proxy, connect: Connect) -> None:
    """The end of a proxy does not wait for what it holds."""
    client = connect()
    proxy.hold(questions=True, answers=True)
    client.sendall(b"never")
    assert silent(client)


def test_half_close_towards_the_target(proxy: Proxy, connect: Connect, echo: Echo) -> None:
    client = connect()
    proxy.half_close("questions")
    assert received(client, 3) == b"bye"
    assert echo.ends == ["closed"]


def test_half_close_towards_the_client(proxy: Proxy, connect: Connect, echo: Echo) -> None:
    client = connect()
    proxy.half_close("answers")
    assert client.recv(1) == b""
    client.sendall(b"are you there?")
    until(lambda: echo.heard.endswith(b"there?"))
    assert client.recv(1) == b""


def test_delay(proxy: Proxy, connect: Connect) -> None:
    client = connect()
    proxy.delay(0.1, jitter=0.05)
    began = time.monotonic()
    assert asked(client, b"slowly") == b"slowly"
    assert time.monotonic() - began >= 2 * 0.05
    proxy.delay(0)
    began = time.monotonic()
    assert asked(client, b"fast") == b"fast"
    assert time.monotonic() - began < 0.1


def test_a_limit_lets_it_drip(proxy: Proxy, connect: Connect) -> None:
    client = connect()
    proxy.limit(20_000)
    began = time.monotonic()
    data = bytes(4000)
    assert asked(client, data) == data
    assert time.monotonic() - began >= 0.75 * 4000 / 20_000


@pytest.mark.parametrize("way", ["questions", "answers"])
def test_flip_a_byte(proxy: Proxy, connect: Connect, echo: Echo, way: str) -> None:
    """The seventh from now on, once."""
    client = connect()
    proxy.flip(way, 7)  # type: ignore[arg-type]
    assert asked(client, b"abcde") == b"abcde"
    assert asked(client, b"fghij") == b"f" + bytes([ord("g") ^ 0xFF]) + b"hij"
    assert asked(client, b"fghij") == b"fghij"
    assert (b"fghijfghij" in echo.heard) == (way == "answers")
    assert proxy.counts.flipped == 1


def test_a_reply_is_lost(proxy: Proxy, connect: Connect, echo: Echo) -> None:
    """The request reaches the target; nobody hears of it; the next one is served."""
    client = connect()
    proxy.lose()
    client.sendall(b"do it")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert echo.heard == b"hellodo it"
    assert (proxy.counts.lost, proxy.counts.cut, proxy.counts.bytes_cut) == (1, 1, 5)
    connect()
    assert proxy.counts.lost == 1


def test_the_replies_of_several_are_lost(proxy: Proxy, connect: Connect) -> None:
    clients = [connect() for _ in range(3)]
    proxy.lose(2)
    for client in clients[:2]:
        client.sendall(b"do it")
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert asked(clients[2], b"do it") == b"do it"
    assert proxy.counts.lost == 2


def test_what_is_too_little_for_a_request_is_answered(proxy: Proxy, connect: Connect) -> None:
    ping, other = connect(), connect()
    proxy.lose(least=100)
    assert asked(ping, b"ping") == b"ping"
    other.sendall(bytes(100))
    with pytest.raises(ConnectionResetError):
        other.recv(1)
    assert asked(ping, b"ping") == b"ping"


def test_a_request_without_an_answer_is_cut_off_too(proxy: Proxy, connect: Connect, echo: Echo) -> None:
    client = connect()
    proxy.lose()
    client.sendall(b"quiet")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert echo.heard == b"helloquiet"
    assert (proxy.counts.lost, proxy.counts.bytes_cut) == (1, 0)


def test_another_process_can_ask_for_it(proxy: Proxy, connect: Connect) -> None:
    """It hangs up when the next reply is as good as lost."""
    client = connect()
    with socket.create_connection(("127.0.0.1", proxy.trigger()), TIMEOUT) as trigger:
        assert trigger.recv(1) == b""
    client.sendall(b"do it")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert proxy.counts.lost == 1


def test_many_connections_at_a_time(proxy: Proxy, connect: Connect) -> None:
    clients = [connect() for _ in range(50)]
    for client in clients:
        client.sendall(b"all at once")
    assert {received(client, 11) for client in clients} == {b"all at once"}
    assert proxy.cut() == 50
