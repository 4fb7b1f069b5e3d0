"""The inbox beside what people write: a consumer that inserts a row and commits, message by message.

Both take the same messages from a queue that is full already and put each into one table, durably; the
plain one remembers nothing.  The rounds alternate, and the median of their ratios is told.
"""

from __future__ import annotations

import statistics
import uuid

import click

from bench.cells import Setting
from bench.contenders import INSERT, Job, database
from bench.stack import Stack, contend, fill, stack
from idemp import Message

STORES = ("sqlite", "postgresql")


def measure(messages: int, rounds: int) -> None:
    """Print messages a second of each, and how many times as fast the inbox is."""
    with stack(("postgresql",)) as servers:
        for name in STORES:
            found = []
            for number in range(rounds):
                order = ("insert", "inbox") if number % 2 == 0 else ("inbox", "insert")
                rates = {kind: _round(servers, name, kind, messages) for kind in order}
                found.append((rates["inbox"], rates["insert"]))
            inbox, plain = (statistics.median(each) for each in zip(*found, strict=True))
            ratio = statistics.median(mine / theirs for mine, theirs in found)
            click.echo(f"{name:12} inbox {inbox:8.0f}/s   insert and commit {plain:8.0f}/s   {ratio:5.2f} x")


def _round(servers: Stack, store: str, contender: str, count: int) -> float:
    """Messages a second.  Raises `SystemExit` if the table does not have each once."""
    url, queue = servers.store(store), f"b{uuid.uuid4().hex[:10]}-queue"
    ids = [uuid.uuid4().hex for _ in range(count)]
    fill(servers.broker, queue, [Message(each, "new_order", {"cents": 500}) for each in ids])
    with database(url) as connection:
        connection.execute("DROP TABLE IF EXISTS effect")
        connection.execute("CREATE TABLE effect (id TEXT)")
        connection.commit()
    [span] = contend(Job(Setting(contender=contender), servers.broker, queue, 0, count, url))
    with database(url) as connection:
        rows = connection.execute("SELECT id FROM effect").fetchall()
    if sorted(row[0] for row in rows) != sorted(ids):
        raise SystemExit(f"void: {contender} on {store} has {len(rows)} rows of {count}: {INSERT}")
    return count / (span["ended"] - span["began"])
