"""What befalls the members of the store."""

from __future__ import annotations

import json
import time
import urllib.request
from contextlib import ExitStack, closing, suppress
from functools import partial
from typing import Any

from idemp.errors import StoreUnavailable
from idemp.stores.etcd_client import Client, Compacted, LeaseNotFound, NoSpace
from idemp.stores.etcd_replica import Layout
from tests.chaos.faults.kind import Fault, Kind, Witness
from tests.chaos.ground import NAMESPACE, SESSION
from tests.chaos.schedule import Span
from tests.chaos.stage import Stage, until
from tests.servers.etcd import Member

WAKE = "/chaos/wake"
_PATIENCE = 15.0
"""Seconds; each of these takes some milliseconds."""


def ask(member: Member, path: str, **fields: object) -> Any:
    """What a member answers: under load it may take its time."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = f"http://{member.endpoint}/v3/maintenance/{path}"
    with direct.open(url, json.dumps(fields).encode(), timeout=_PATIENCE) as answer:
        return json.load(answer)


class OfMember(Fault):
    """Meets the leader, or one that is not."""

    def __init__(self, stage: Stage, pick: int, seconds: float, *, leads: bool) -> None:
        super().__init__(stage, pick, seconds)
        self._leads = leads

    def choose(self) -> Member:
        members, leader = self.stage.etcd.cluster.members, self.stage.etcd.cluster.leader()
        self._term = self.stage.term()
        others = [member for number, member in enumerate(members) if number != leader]
        return members[leader] if self._leads else others[self.pick % len(others)]

    def elected(self) -> Witness:
        """Another leader, if it was the leader."""
        grown = until(lambda: self.stage.term() > self._term, _PATIENCE)
        return {"term": [self._term, self.stage.term()]} if grown else None

    def silent(self, member: Member) -> Witness:
        return None if member.serves() else {"silent": member.endpoint}


class Killed(OfMember):
    """kill -9, and a start on the same data."""

    def inject(self) -> None:
        self._member = self.choose()
        self._member.kill()

    def witness(self) -> Witness:
        return self.elected() if self._leads else self.silent(self._member)

    def heal(self) -> None:
        self._member.start()


class Restarted(OfMember):
    """Stopped and started in good order."""

    def inject(self) -> None:
        self._member = self.choose()
        self._member.stop()

    def witness(self) -> Witness:
        return self.silent(self._member)

    def heal(self) -> None:
        self._member.start()


class Paused(OfMember):
    """SIGSTOP for a while."""

    def inject(self) -> None:
        self._member = self.choose()
        self._member.pause()

    def witness(self) -> Witness:
        return self.silent(self._member)

    def heal(self) -> None:
        self._member.resume()


class Stalled(OfMember):
    """Its disk stands still; the leader's makes it answer for leases that are gone (etcd #15247)."""

    def inject(self) -> None:
        self._stack = ExitStack()
        self._member = self.choose()
        self._stack.enter_context(self._member.stalled())
        self._late: Witness = None
        # What is put through it alone is not durable there: so it cannot apply it, nor answer.
        with closing(Client([self._member.endpoint])) as client, suppress(StoreUnavailable):
            began = time.monotonic()
            try:
                client.put(WAKE, b"", timeout=1.0)
            except StoreUnavailable as error:
                self._late = {"put": str(error), "seconds": time.monotonic() - began}

    def witness(self) -> Witness:
        return self._late or (self.elected() if self._leads else None)

    def heal(self) -> None:
        self._stack.close()


class QuorumLost(Fault):
    """Two of three are killed."""

    def inject(self) -> None:
        members = self.stage.etcd.cluster.members
        left = self.pick % len(members)
        self._lost = [member for number, member in enumerate(members) if number != left]
        for member in self._lost:
            member.kill()

    def witness(self) -> Witness:
        try:
            self.stage.etcd.admin.put(WAKE, b"", timeout=0.5)
        except StoreUnavailable as error:
            return {"put": str(error)}
        return None

    def heal(self) -> None:
        for member in self._lost:
            member.launch()
        for member in self._lost:
            member.wait()


class LeaderMoved(Fault):
    """The leader hands over."""

    def inject(self) -> None:
        members, leader = self.stage.etcd.cluster.members, self.stage.etcd.cluster.leader()
        other = members[(leader + 1 + self.pick % 2) % 3]
        self._wanted = ask(other, "status")["header"]["member_id"]
        ask(members[leader], "transfer-leadership", targetID=self._wanted)

    def witness(self) -> Witness:
        def leads() -> bool:
            now = self.stage.etcd.cluster.members[self.stage.etcd.cluster.leader()]
            return bool(ask(now, "status")["header"]["member_id"] == self._wanted)

        return {"leader": self._wanted} if until(leads, _PATIENCE) else None


class Defragmented(Fault):
    """Every member in turn, which stands still meanwhile."""

    def inject(self) -> None:
        self._done = 0
        for member in self.stage.etcd.cluster.members:
            ask(member, "defragment")
            self._done += 1

    def witness(self) -> Witness:
        return {"members": self._done} if self._done == 3 else None


class CompactedNow(Fault):
    """Up to the present: whoever watches from earlier cannot go on."""

    def inject(self) -> None:
        self._revision = self.stage.etcd.admin.put(WAKE, b"").revision
        self.stage.etcd.admin.compact(self._revision)

    def witness(self) -> Witness:
        try:
            self.stage.etcd.admin.compact(self._revision)
        except Compacted as error:
            return {"revision": self._revision, "again": str(error)}
        return None


class Revoked(Fault):
    """An administrator ends every session's lease."""

    def inject(self) -> None:
        pairs = self.stage.etcd.admin.range(Layout(NAMESPACE).sessions, prefix=True).pairs
        self._revoked = 0
        for pair in pairs:
            with suppress(LeaseNotFound):
                self.stage.etcd.admin.lease_revoke(pair.lease)
                self._revoked += 1

    def witness(self) -> Witness:
        return {"leases": self._revoked} if self._revoked else None


class Full(Fault):
    """The alarm of a full database: only reads and deletes are taken."""

    def inject(self) -> None:
        self._member = self.stage.etcd.cluster.members[self.pick % 3]
        self._id = ask(self._member, "status")["header"]["member_id"]
        self._say("ACTIVATE")

    def _say(self, action: str) -> None:
        member = self.stage.etcd.cluster.members[self.stage.etcd.cluster.leader()]
        ask(member, "alarm", action=action, alarm="NOSPACE", memberID=self._id)

    def witness(self) -> Witness:
        try:
            self.stage.etcd.admin.put(WAKE, b"")
        except NoSpace as error:
            return {"put": str(error)}
        return None

    def heal(self) -> None:
        def off() -> bool:
            with suppress(OSError, StoreUnavailable):
                self._say("DEACTIVATE")
                self.stage.etcd.admin.put(WAKE, b"")
                return True
            return False

        until(off, 30)


def _of(fault: type[OfMember], leads: bool, seconds: tuple[float, float], *needs: str, quick: bool) -> Kind:
    return Kind(partial(fault, leads=leads), Span("etcd", seconds), quick, frozenset(needs))


KINDS = {
    "etcd.leader-kill": _of(Killed, True, (1.5, 4.0), quick=True),
    "etcd.follower-kill": _of(Killed, False, (1.0, 4.0), quick=True),
    "etcd.member-restart": _of(Restarted, False, (0.5, 2.0), quick=False),
    "etcd.leader-restart": _of(Restarted, True, (0.5, 2.0), quick=False),
    "etcd.leader-pause": _of(Paused, True, (2.0, 2.5 * SESSION), quick=True),
    "etcd.follower-pause": _of(Paused, False, (1.0, 4.0), quick=False),
    "etcd.leader-stall": _of(Stalled, True, (SESSION, 4 * SESSION), "strace", quick=True),
    "etcd.follower-stall": _of(Stalled, False, (1.0, 2 * SESSION), "strace", quick=False),
    "etcd.quorum-loss": Kind(QuorumLost, Span("etcd", (3.0, 6.0)), quick=True),
    "etcd.move-leader": Kind(LeaderMoved, Span("etcd", (0.5, 1.0)), quick=True),
    "etcd.defragment": Kind(Defragmented, Span("etcd", (0.2, 0.5)), quick=True),
    "etcd.compact": Kind(CompactedNow, Span("etcd", (0.2, 0.5)), quick=True),
    "etcd.revoke": Kind(Revoked, Span("etcd", (0.2, 0.5)), quick=True),
    "etcd.full": Kind(Full, Span("etcd", (2.0, 5.0)), quick=True),
}
