"""``explain``: the guarantee in force for a handler, in plain words, and what it costs at a rate."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import click

from idemp.cli.consume import load
from idemp.cli.keys import age
from idemp.cli.options import json_option
from idemp.consumer import Consumer
from idemp.errors import ConfigError
from idemp.once import policy_of
from idemp.pipeline import ATTEMPTS, MAX_DELAY
from idemp.policy import MAX_RESULT, Policy
from idemp.ports import Claim, Claimed, Complete, Store

SAMPLE = 5000
"""Ids that are written to see what one takes."""
_ID = "{:08x}-0000-4000-8000-{:012x}"
"""As long as a UUID, and none like the one before."""


class Explained(NamedTuple):
    """What is told of one handler: (heading, sentences)."""

    name: str
    parts: Sequence[tuple[str, Sequence[str]]]


@click.command()
@click.argument("target", metavar="MODULE:NAME")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Messages a second: what it costs.")
@json_option
def explain(target: str, rate: float | None, as_json: bool) -> None:
    """Say what is guaranteed for a handler, or for each of a Consumer.

    What happens at each point of a crash, how long ids are remembered, what the policy is, and with
    --rate what the ids take: measured here, on a store of the same kind in a temporary folder.
    """
    for explained in _explained(load(target), target, rate):
        if as_json:
            click.echo(json.dumps({"handler": explained.name, **dict(explained.parts)}))
            continue
        click.echo(click.style(explained.name, bold=True))
        for heading, sentences in explained.parts:
            click.echo(f"\n  {heading}")
            for sentence in sentences:
                click.echo(f"    {sentence}")
        click.echo()


def _explained(found: Any, target: str, rate: float | None) -> Iterator[Explained]:
    if isinstance(found, Consumer):
        for kind, policy in found.policies().items():
            yield _one(f"{kind}: {policy.name}" if policy else kind, policy, rate)
    elif callable(found):
        policy = policy_of(found)
        yield _one(policy.name if policy else target, policy, rate)
    else:
        raise ConfigError(f"{target} is neither a Consumer nor a function")


def _one(name: str, policy: Policy | None, rate: float | None) -> Explained:
    if policy is None:
        return Explained(name, _at_least_once())
    parts = [
        ("guarantee", _guarantee(policy)),
        ("crashes", _crashes(policy)),
        ("memory", _memory(policy)),
        ("policy", _policy(policy)),
        ("publishing", _publishing(policy)),
    ]
    if rate is not None:
        parts.append(("cost", _cost(policy, rate)))
    return Explained(name, parts)


# ------------------------------------------------------------------ words


def _at_least_once() -> list[tuple[str, list[str]]]:
    return [
        (
            "guarantee",
            [
                "At least once: it has no @idempotent, so every delivery runs it, duplicates too.",
                "What it did before a crash it does again when the message comes back.",
            ],
        ),
        (
            "policy",
            [
                f"One that raises is tried {ATTEMPTS} times, with growing delays up to {MAX_DELAY:.0f} s,"
                " then its message goes to <queue>.dead.",
                "To have it take effect once: @idempotent(store, name=...).",
            ],
        ),
    ]


def _guarantee(policy: Policy) -> list[str]:
    kind = kind_of(policy.store)
    where = {
        "memory": "in this process only: a restart forgets everything",
        "sqlite": "for all processes of this host; it survives kill -9 and power loss",
        "etcd": "for all hosts; it survives whatever a majority of etcd survives",
        "postgresql": "for all hosts; it survives what the database survives",
        "redis": "for all hosts; it survives kill -9 of the server, and a failover may lose the latest",
    }.get(kind, "as its store promises")
    if policy.transaction:
        return [
            f"Exactly once for what it writes on context().connection, {where}.",
            "Those writes and the record are one transaction: both commit, or neither does.",
            "Whatever else it does, like a mail, may happen again: it runs again when the server rolls back.",
            "While one transaction holds a key, its duplicates wait, and are skipped after it.",
        ]
    return [
        f"Effectively once, {where}.",
        "Once its return is recorded it is never run again for that key within the retention.",
        "While one process runs a key, no other does.",
        "A crash between run and record is never hidden: the key is in doubt, and the policy decides.",
    ]


def _crashes(policy: Policy) -> list[str]:
    if policy.transaction:
        return [
            "before the commit: nothing of it is left; the message comes again and runs",
            "after the commit, before the acknowledgement: the message comes again and is skipped",
            "the commit's reply is lost: a new transaction finds it done, or free, and nothing is guessed",
            "the message kills its process each time: once it was delivered before, each attempt is counted,"
            " and after the last it is parked",
        ]
    doubt = {
        "retry": "it runs again, so an effect without a key of its own may happen twice",
        "park": "it is parked for a person (idemp doubt), and does not run again by itself",
    }
    decided = doubt.get(
        str(policy.in_doubt), "your resolver is asked: happened, not happened, or unknown (parked)"
    )
    found = [
        "before the claim: nothing happened; the message comes again and runs",
        f"after the claim, before the record: in doubt once the session is dead; then {decided}",
        "after the record, before the acknowledgement: the message comes again and is skipped",
        "the store's reply is lost: it is asked what became of it, never guessed",
        "stopped for longer than its session, and goes on: its late record is refused (ClaimLost)",
    ]
    if kind_of(policy.store) == "memory":
        found[2] = "after the record: a restart forgets it, so the message comes again and runs again"
    return found


def _memory(policy: Policy) -> list[str]:
    kept = policy.store.retention
    found = [
        f"Ids are remembered for {age(kept)} ({kept:.0f} s), longer if any process of this store says so.",
        "An older message is parked, not run, unless it is done: see idemp doubt and idemp dead list.",
        "What is in doubt or parked stays until a person decides (idemp resolve).",
    ]
    if kind_of(policy.store) == "etcd":
        found.append(
            "Each replica carries all ids of the namespace in its memory, and hears all its traffic."
        )
    return found


def _policy(policy: Policy) -> list[str]:
    busy = {
        "wait": f"a duplicate waits up to {policy.wait:g} s for the answer of the first",
        "defer": "a duplicate of one that runs comes back later",
        "raise": "a duplicate of one that runs raises KeyBusy",
    }[policy.on_busy]
    in_doubt = (
        policy.in_doubt
        if isinstance(policy.in_doubt, str)
        else getattr(policy.in_doubt, "__name__", "a function")
    )
    permanent = ", ".join(kind.__name__ for kind in policy.permanent)
    result = f"the result, up to {MAX_RESULT // 1024} KiB" if policy.codec else "no result"
    read = "what key= reads" if policy.read_key else "the message's id"
    return [
        f"key: {policy.name}/ and {read}",
        f"busy: {busy}",
        f"in doubt: {in_doubt}",
        f"attempts: {policy.attempts}, then parked"
        + (f"; {permanent} park at once" if permanent else "")
        + "; PermanentFailure always does",
        f"kept: {result}"
        + (
            ", and a fingerprint: another payload under the same key is a conflict"
            if policy.read_fingerprint
            else ""
        ),
    ]


def _publishing(policy: Policy) -> list[str]:
    if policy.transaction:
        return [
            "context().publish() puts a message into the outbox, in the same transaction.",
            "idemp relay, or a Relay in the process, sends it and waits until the broker has it safe.",
            "A relay that dies in between sends it again, under the same id.",
        ]
    return [
        "context().publish() sends at once, in a consumer; the record waits until the broker has it safe.",
        "What an attempt that raised or died has sent stays sent; the next repeats it, under the same id.",
    ]


# ------------------------------------------------------------------ cost


def kind_of(store: Store) -> str:
    """``sqlite`` of a `SqliteStore`; the module is its technology."""
    return type(store).__module__.rpartition(".")[2]


def _cost(policy: Policy, rate: float) -> list[str]:
    kept, kind = policy.store.retention, kind_of(policy.store)
    measured = _size(policy, kind)
    if measured is None:
        return [f"what an id takes in {kind} is not known before it remembers some"]
    size, how = measured
    ids = rate * kept
    return [
        f"{rate:g} a second for {age(kept)} are {ids:,.0f} ids".replace(",", " "),
        f"{size:.0f} bytes an id {how}: {_bytes(ids * size)} when the retention has passed once",
    ]


def _size(policy: Policy, kind: str) -> tuple[float, str] | None:
    """Bytes that one id takes, and where.  Without results: those are as long as they are."""
    keys = [f"{policy.name}/{_ID.format(number * 2654435761 % 2**32, number)}" for number in range(SAMPLE)]
    match kind:
        case "sqlite":
            return _in_file(keys), f"in the file, measured with {SAMPLE} that have no result"
        case "memory":
            return _in_memory(keys), f"in the process, measured with {SAMPLE} that have no result"
        case "etcd":
            return _in_journal(
                keys
            ), "in the journal, for as long as etcd keeps it; its own overhead comes on top"
        case "postgresql":
            from idemp.stores.postgresql_doctor import taken as in_postgresql

            found = in_postgresql(policy.store.place)  # type: ignore[attr-defined]
            return found and (found[0], f"in tables and indexes, by the {found[1]} that are remembered now")
        case "redis":
            from idemp.stores.redis_doctor import taken as in_redis

            found = in_redis(policy.store.at)  # type: ignore[attr-defined]
            return found and (found[0], f"in its memory, by {found[1]} that are remembered now")
    return None


def _in_file(keys: Sequence[str]) -> float:
    from idemp.stores.sqlite import SqliteStore

    with tempfile.TemporaryDirectory(prefix="idemp-explain-") as folder:
        path = Path(folder) / "seen.db"
        sizes = []
        for some in ([], keys):
            with closing(SqliteStore(str(path), retention=3600.0, session_ttl=10.0)) as store:
                _fill(store, some)
            sizes.append(path.stat().st_size)  # when it is closed its log is folded into it
        return (sizes[1] - sizes[0]) / len(keys)


def _in_memory(keys: Sequence[str]) -> float:
    from idemp.stores.memory import MemoryStore

    with closing(MemoryStore(retention=3600.0)) as store:
        tracemalloc.start()
        try:
            _fill(store, [key.encode().decode() for key in keys])  # copies, which count
            return tracemalloc.get_traced_memory()[0] / len(keys)
        finally:
            tracemalloc.stop()


def _in_journal(keys: Sequence[str]) -> float:
    from idemp.stores.records import LINES, encode

    claims = [Claim(key) for key in keys]
    done = [Complete(key, LINES + line, b"null") for line, key in enumerate(keys)]
    return (len(encode(0.0, claims)) + len(encode(0.0, done))) / len(keys)


def _fill(store: Store, keys: Sequence[str]) -> None:
    claims = store.apply([Claim(key) for key in keys])
    done = zip(keys, claims, strict=True)
    store.apply([Complete(key, claim.token) for key, claim in done if isinstance(claim, Claimed)])


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
