"""Stands in for the image of Graphite and statsd in compose_check.py: counts, and answers as they do."""

import http.server
import json
import socketserver
import threading
from collections import Counter
from urllib.parse import parse_qs, urlsplit

counts: Counter[str] = Counter()


class Statsd(socketserver.DatagramRequestHandler):
    """``name:1|c``, one a line."""

    def handle(self) -> None:
        for line in self.rfile.read().decode().splitlines():
            name, _, value = line.partition(":")
            if value.endswith("|c"):
                counts[f"stats_counts.{name}"] += int(value[:-2])


class Administration(socketserver.StreamRequestHandler):
    """``health`` is all that it is asked."""

    def handle(self) -> None:
        self.rfile.readline()
        self.wfile.write(b"health: up\n")


class Web(http.server.BaseHTTPRequestHandler):
    """``/render?format=json``: all that was counted, as one point."""

    def do_GET(self) -> None:
        [target] = parse_qs(urlsplit(self.path).query).get("target", [""])
        self.send_response(200)
        self.end_headers()
        if target in counts:
            self.wfile.write(json.dumps([{"target": target, "datapoints": [[counts[target], 0]]}]).encode())
        else:
            self.wfile.write(b"[]")


if __name__ == "__main__":
    everywhere = "0.0.0.0"
    for server in (
        socketserver.UDPServer((everywhere, 8125), Statsd),
        socketserver.ThreadingTCPServer((everywhere, 8126), Administration),
        http.server.ThreadingHTTPServer((everywhere, 80), Web),
    ):
        threading.Thread(target=server.serve_forever).start()
