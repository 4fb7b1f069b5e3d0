"""What is measured: one factor at a time around a base point.

The base point: fresh ids, 200 bytes, a classic queue, a handler that does nothing, one replica.  Each
contender has its strongest honest setting: plain and the seed's way a prefetch of 256 with an
acknowledgement each, as people write it; those that acknowledge many at once 2048.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

PREFETCH = 256
"""Of those that acknowledge message by message."""
FAR = 2048
"""Of those that acknowledge many at once: a batch that is under way must not use it up."""
STORES = ("sqlite", "etcd", "redis", "postgresql")
IDEMP = frozenset(STORES)


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """How a contender runs, and on what.

    ids: fresh, duplicates (done by the same process just before), again (done by another before it) or
    half (each id twice).  milliseconds, workers: what the handler takes, and in how many threads.
    share: of a round's messages, where a contender is slow.  tracking: the event log, "" for none.
    tallies: the file in which the audit counts, "" for none.
    """

    contender: str
    ids: str = "fresh"
    size: int = 200
    prefetch: int = 0
    quorum: bool = False
    milliseconds: float = 0.0
    workers: int = 1
    replicas: int = 1
    share: float = 1.0
    tracking: str = ""
    tallies: str = ""

    def window(self) -> int:
        """The prefetch in force."""
        return self.prefetch or (PREFETCH if self.contender in ("plain", "seed", "insert") else FAR)


class Cell(NamedTuple):
    """One figure of the table.  ``over``: the cells that it is divided by."""

    name: str
    setting: Setting
    over: tuple[str, ...] = ()


def cells() -> list[Cell]:
    """All of them, those that others are divided by first."""
    found: list[Cell] = []

    def add(factor: str, *names: str, **more: object) -> None:
        bases = [name for name in names if name in ("plain", "ceiling")]
        for name in names:
            over = tuple(f"{factor}: {base}" for base in bases if base != name)
            setting = msgspec.convert({"contender": name, **more, **_slow(name, more)}, Setting)
            found.append(Cell(f"{factor}: {name}", setting, over))

    add("base", "plain", "ceiling", "seed", *STORES)
    for words, kind in (
        ("duplicates, warm", "duplicates"),
        ("duplicates, after a restart", "again"),
        ("half duplicates", "half"),
    ):
        ceiling = "base: ceiling"
        if kind == "duplicates":
            # Of a queue that is twice as long, from which the broker delivers more slowly.
            ceiling = f"{words}: ceiling"
            found.append(Cell(ceiling, Setting(contender="ceiling", ids=kind)))
        found += [
            Cell(f"{words}: {name}", Setting(contender=name, ids=kind), (ceiling,))
            for name in ("sqlite", "etcd")
        ]
    add("1 ms, 16 threads", "plain", "etcd", milliseconds=1.0, workers=16)
    add("10 ms, 16 threads", "plain", "etcd", milliseconds=10.0, workers=16)
    add("20 kB", "plain", "ceiling", "etcd", size=20_000, share=0.25)
    add("prefetch 50", "plain", "etcd", prefetch=50)
    add("prefetch 1024", "plain", "etcd", prefetch=1024)
    add("quorum queue", "plain", "ceiling", "etcd", quorum=True)
    add("2 replicas", "plain", "etcd", replicas=2)
    return found


def _slow(name: str, more: dict[str, object]) -> dict[str, object]:
    """Fewer messages where each takes long, so that a round stays short."""
    if name == "seed":
        return {"share": 0.1}
    return {"share": 0.2} if more.get("milliseconds") else {}
