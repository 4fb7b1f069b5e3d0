"""The world around the machine: etcd, replicas, the network between them and its faults.

One function gives all that can happen next: `successors`.  A world is a tuple of tuples, so that a
search can remember it.  Revisions count appends only; a token is a revision and a line.

Two ways for a replica to know that it has everything up to a revision, by ``Config.head``:
the tails of all sessions (with `X session n` for those that are gone), or the version of one key
``head`` that every append puts, which numbers the appends without gaps.

Taken as atomic: an import, a snapshot, the birth of a session.  Lost requests need no rule of their
own: what was not answered is sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

from tests.model.machine import (
    LINES,
    NOBODY,
    SOUND,
    Entry,
    Keys,
    Line,
    Mutants,
    Outcome,
    State,
    below,
    open_keys,
    show_token,
    step,
)


class Violation(Exception):
    """A property does not hold.  ``prop``: its number."""

    def __init__(self, prop: str, text: str) -> None:
        super().__init__(f"({prop}) {text}")
        self.prop = prop


# ------------------------------------------------------------------ the world


class Append(NamedTuple):
    """One transaction's worth of records, and the bucket, session and seq of its log key.

    clock: the writer's.  snap: the pages that it wrote before, with S.
    """

    session: int
    seq: int
    bucket: int
    lines: tuple[Line, ...]
    clock: int = 0
    snap: Keys = ()

    def __str__(self) -> str:
        """As in a trace."""
        return f"{self.session}:{self.seq}@b{self.bucket}[{', '.join(map(str, self.lines))}]"


Log = tuple[Append, ...]
Tails = tuple[tuple[int, int], ...]


class Server(NamedTuple):
    """etcd.  ``log`` keeps what was deleted: it is the history that the checks compare with."""

    log: Log = ()
    gone: tuple[int, ...] = ()  # revisions whose log key was deleted
    sessions: tuple[int, ...] = ()
    tails: Tails = ()
    bucket: int = 0
    floor: int = 0
    snaps: tuple[tuple[int, Keys], ...] = ((0, ()),)
    clock: int = 0
    born: int = 0  # sessions so far


class Out(NamedTuple):
    """A replica's append in flight.

    rev: 0 until answered, then the revision up to which everything must be known first.
    tails: as read there.  refused: it will never apply.  outcomes: once it was applied in its place.
    """

    append: Append
    rev: int = 0
    tails: Tails = ()
    refused: bool = False
    outcomes: tuple[Outcome, ...] | None = None


class Replica(NamedTuple):
    """A process.  ``sid`` NOBODY: it crashed.

    base, state, tails: everything up to revision ``base`` is known, ``state`` is the fold of it.
    known: later revisions applied on top, in order.  cursor: the watch has brought so much.
    alive: sessions as last read.  jobs, by key: token of the handler that runs; < 0 after its Q.
    """

    sid: int
    seq: int = 0
    base: int = 0
    state: State = State()
    tails: Tails = ()
    known: tuple[int, ...] = ()
    cursor: int = 0
    alive: tuple[int, ...] = ()
    out: Out | None = None
    jobs: tuple[int, ...] = ()
    left: int = 0  # appends that it may still compose


class Faults(NamedTuple):
    """What may still go wrong.

    expiry: of a session whose process goes on.  lost: replies.  copy: of a sent append, which the
    server gets any time later.  drop, again: watch events, lost or brought (again) out of order.
    imports: at any time.
    """

    crash: int = 0
    expiry: int = 0
    lost: int = 0
    copy: int = 0
    drop: int = 0
    again: int = 0
    imports: int = 0

    def less(self, name: str) -> Faults:
        """One of them used up."""
        return self._replace(**{name: getattr(self, name) - 1})


class Witness(NamedTuple):
    """What the checks remember of a key.

    starts: of the handler, that neither a doubt nor a release excuses.  since: revision of the last F.
    stood: a D was applied since then.  done: the clock of the last one.
    """

    starts: int = 0
    since: int = 0
    stood: bool = False
    done: int = -1


class World(NamedTuple):
    """Everything.  ``net``: copies of appends on their way, each with "was answered: never"."""

    server: Server
    replicas: tuple[Replica, ...]
    net: tuple[tuple[Append, bool], ...]
    faults: Faults
    seen: tuple[Witness, ...]


class Config(NamedTuple):
    """What a search explores.

    verbs: records that each process writes; always X, and D for what it runs.  appends: how many.
    batch: lines in one append, 1 or 2.  buckets: the highest.  ticks: of the clock; the retention is one.
    restart: a crashed process comes back.  head: see the module.
    history: appends, each with its process, that everybody knows of already.
    """

    name: str
    verbs: tuple[str, ...] = ("CT", "CT")
    appends: tuple[int, ...] = (2, 2)
    keys: int = 1
    batch: int = 1
    buckets: int = 0
    ticks: int = 0
    faults: Faults = Faults()
    restart: bool = False
    head: bool = False
    history: tuple[tuple[int, tuple[Line, ...]], ...] = ()
    mutants: Mutants = SOUND

    def has(self, mutant: str) -> bool:
        """Whether the protocol is weakened so."""
        return mutant in self.mutants


def first(config: Config) -> World:
    """The beginning: every process has a session, and knows the history."""
    count = len(config.verbs)
    sids = tuple(range(count))
    tails = tuple((sid, 0) for sid in sids)
    idle = (0,) * config.keys
    writers = [index for index, _ in config.history]
    replicas = tuple(
        Replica(sid, tails=tails, alive=sids, jobs=idle, left=config.appends[sid] + writers.count(sid))
        for sid in sids
    )
    server = Server(sessions=sids, tails=tails, born=count)
    world = World(server, replicas, (), config.faults, (Witness(),) * config.keys)
    for index, lines in config.history:
        world = exchange(config, send(config, world, index, lines), index, False)
        for reader in range(count):
            while world.replicas[reader].cursor < len(world.server.log):
                world = watch(config, world, reader)
            world = look(config, world, reader) if reader != index else decide(config, world, index)
    return world


# ------------------------------------------------------------------ folds


@lru_cache(maxsize=1 << 16)
def truth(log: Log, mutants: Mutants) -> tuple[State, tuple[Outcome, ...]]:
    """The state after all of ``log``, and the outcomes of its last append."""
    if not log:
        return State(), ()
    state, _ = truth(log[:-1], mutants)
    last = log[-1]
    return step(state, len(log), last.session, last.lines, last.clock, mutants)


@lru_cache(maxsize=1 << 16)
def imported(server: Server, mutants: Mutants) -> State:
    """What one reads at this revision: the snapshot of the floor, and the log from there."""
    floor = server.floor
    if "import_below_floor" in mutants:
        floor = 0
    state = State(keys=dict(server.snaps).get(server.floor, ()), bucket=max(floor - 1, 0))
    for rev, append in enumerate(server.log, 1):
        if rev not in server.gone and append.bucket >= floor:
            state, _ = step(state, rev, append.session, append.lines, append.clock, mutants)
    return state


def view(config: Config, log: Log, me: Replica) -> State:
    """Memory: everything known, gaps or not."""
    state = me.state
    for rev in me.known:
        append = log[rev - 1]
        state, _ = step(state, rev, append.session, append.lines, append.clock, config.mutants)
    return state


def answers_done(config: Config, log: Log, me: Replica, key: int) -> bool:
    """Whether a duplicate is skipped without a round trip: a D is true by itself, unless it is late."""
    entry = me.state.get(key)
    believed = entry is not None and entry.status == "done"
    for rev in me.known:
        for line in log[rev - 1].lines:
            if line.key == key and line.verb == "D":
                believed = believed or not line.late or config.has("late_done_believed")
            elif line.key == key and line.verb == "F":
                believed = False
    return believed


# ------------------------------------------------------------------ the server


def guard(config: Config, server: Server, append: Append) -> bool:
    """The compares of an append's transaction."""
    me, verb = append.session, append.lines[0].verb
    head = append.lines[0]
    tails = dict(server.tails)
    if me not in server.sessions:
        return False
    if config.has("key_absent_guard"):  # V3
        for rev, other in enumerate(server.log, 1):
            if other[:3] == append[:3] and rev not in server.gone:
                return False
    elif not config.has("no_tail_guard") and tails[me] != append.seq - 1:
        return False
    bucket = append.bucket - 1 if verb == "E" else append.bucket
    if (
        not config.has("no_bucket_guard")
        and server.bucket != bucket
        and not (verb == "E" and config.has("e_twice"))
    ):
        return False
    match verb:
        case "X":
            last = tails.get(head.key)
            same = last is not None if config.has("x_without_last") or config.head else last == head.n
            return same and head.key not in server.sessions
        case "S":
            return all(bucket != head.key for bucket, _ in server.snaps)
        case "B":
            if config.has("b_unsure") and all(bucket != head.key for bucket, _ in server.snaps):
                return False
            return server.floor == head.n or config.has("floor_back")
    return True


def put(config: Config, world: World, append: Append) -> World | None:
    """The transaction; None if it was refused.  Checks what must hold of the order itself."""
    server = world.server
    if not guard(config, server, append):
        return None
    if any(a.session == append.session and a.seq == append.seq for a in server.log):
        raise Violation("IV", f"{append} is applied, and one with its seq was before")
    log = (*server.log, append)
    before, _ = truth(server.log, config.mutants)
    after, outcomes = truth(log, config.mutants)
    tails = dict(server.tails)
    tails[append.session] = append.seq
    line = append.lines[0]
    server = server._replace(log=log)
    if line.verb == "X":
        tails.pop(line.key, None)
    elif line.verb == "E":
        server = server._replace(bucket=line.key)
    elif line.verb == "S":
        server = server._replace(snaps=tuple(sorted((*server.snaps, (line.key, append.snap)))))
    elif line.verb == "B":
        server = server._replace(floor=line.key)
    server = server._replace(tails=tuple(sorted(tails.items())))
    seen = tuple(
        _witness(world, key, note, append.lines, outcomes, before, after)
        for key, note in enumerate(world.seen)
    )
    world = world._replace(server=server, seen=seen)
    check_import(config, world)
    return world


def _witness(
    world: World,
    key: int,
    note: Witness,
    lines: tuple[Line, ...],
    outcomes: tuple[Outcome, ...],
    before: State,
    after: State,
) -> Witness:
    """The key's witness after an append, which must not undo a done."""
    excused = lines[0].verb == "B"
    for line, outcome in zip(lines, outcomes, strict=True):
        if line.verb in "XESB" or line.key != key:
            continue
        if (line.verb, outcome.word) in (("T", "claimed"), ("R", "applied")):
            note = note._replace(starts=0)
        elif line.verb == "F" and outcome.word == "applied":
            note = Witness(since=len(world.server.log) + 1)
            excused = True
    old, new = before.get(key), after.get(key)
    if new is not None and new.status == "done" and (old is None or old.status != "done"):
        note = note._replace(stood=True, done=world.server.clock)
    if old is not None and old.status == "done" and (new is None or new.status != "done"):
        if not excused:
            raise Violation("II", f"done of key {key} is undone")
        if lines[0].verb == "B":
            if world.server.clock - note.done < 1:
                raise Violation("II", f"done of key {key} is dropped within the retention")
            note = note._replace(starts=0)
    return note


def check_import(config: Config, world: World) -> None:
    """(III) Who imports now has what a complete replica has."""
    server = world.server
    if not server.bucket and not server.gone:
        return
    there, here = truth(server.log, config.mutants)[0], imported(server, config.mutants)
    if here != there:
        raise Violation("III", f"an import now gives {show(here)}, a live replica has {show(there)}")


def show(state: State) -> str:
    """A state in a few words."""
    words = []
    for key, entry in state.keys:
        who = f" by s{entry.session}" if entry.session != NOBODY else ""
        words.append(f"{key} {entry.status}{who} token {show_token(entry.token)} #{entry.attempt}")
    floor = f" floor {state.floor} opened {[o.bucket for o in state.opened]}" if state.bucket else ""
    return f"<{'; '.join(words) or 'nothing'} @b{state.bucket}{floor}>"


# ------------------------------------------------------------------ what a replica knows


def learn(config: Config, world: World, me: Replica, revs: Iterator[int] | tuple[int, ...]) -> Replica:
    """Appends came, by the watch or fetched: each goes to its place, and once."""
    new = [rev for rev in revs if rev > me.base and rev not in me.known]
    if not new:
        return me
    order = (*me.known, *new)
    if not config.has("late_at_end"):  # V2
        order = tuple(sorted(order))
    return settle(config, world, me._replace(known=order))


def complete(config: Config, log: Log, me: Replica, rev: int, tails: Tails) -> bool:
    """Whether nothing up to ``rev`` is missing, as far as the replica can tell."""
    if config.head:
        return sum(1 for known in me.known if known <= rev) == rev - me.base
    need = dict(tails)
    have = set()
    for known in me.known:
        append = log[known - 1]
        if known <= rev:
            have.add((append.session, append.seq))
            if append.lines[0].verb == "X" and not config.has("x_without_last"):  # V1
                need[append.lines[0].key] = append.lines[0].n
    had = dict(me.tails)
    return all(
        (session, seq) in have
        for session, last in need.items()
        for seq in range(had.get(session, 0) + 1, last + 1)
    )


def settle(config: Config, world: World, me: Replica) -> Replica:
    """Move the base up to where everything is known."""
    log = world.server.log
    if config.head:
        rev = me.base
        while rev + 1 in me.known:
            rev += 1
        if rev > me.base:
            me = advance(config, world, me, rev, None)
    out = me.out
    if out and out.rev:
        if me.base < out.rev and complete(config, log, me, out.rev, out.tails):
            me = advance(config, world, me, out.rev, out.tails)
        if me.base >= out.rev and out.refused:
            me = me._replace(out=None)
    return me


def advance(config: Config, world: World, me: Replica, rev: int, tails: Tails | None) -> Replica:
    """Fold up to ``rev``, which must be all there is; the outcomes of the own append are kept."""
    log = world.server.log
    for missing in range(me.base + 1, rev + 1):
        if missing not in me.known:
            append = log[missing - 1]
            dead = append.session not in world.server.sessions
            raise Violation("VIII" if dead else "III", f"thinks it is complete to {rev}, lacks {append}")
    state, out = me.state, me.out
    for known in me.known:
        if known <= rev:
            append = log[known - 1]
            state, outcomes = step(state, known, append.session, append.lines, append.clock, config.mutants)
            if out and (append.session, append.seq) == (me.sid, out.append.seq) and not out.refused:
                out = out._replace(outcomes=outcomes)
    there = truth(log[:rev], config.mutants)[0]
    if state != there:
        raise Violation("III", f"at revision {rev} it has {show(state)}, the truth is {show(there)}")
    later = tuple(known for known in me.known if known > rev)
    return me._replace(
        base=rev, state=state, known=later, out=out, tails=me.tails if tails is None else tails
    )


def import_all(config: Config, world: World, me: Replica) -> Replica:
    """Read everything at one revision, and forget what memory said."""
    server = world.server
    rev = len(server.log)
    state = imported(server, config.mutants)
    if config.has("import_mixed") and rev and rev not in server.gone:
        older = server._replace(log=server.log[:-1], bucket=0)
        state = imported(older, config.mutants)
    me = me._replace(base=rev, state=state, tails=server.tails, known=(), cursor=rev, alive=server.sessions)
    there = truth(server.log, config.mutants)[0]
    if state != there:
        raise Violation("III", f"the import gives {show(state)}, the truth is {show(there)}")
    if me.out and me.out.refused:
        me = me._replace(out=None)
    return me


def from_memory(me: Replica, append: Append) -> tuple[Outcome, ...]:
    """Outcomes of an own append that an import swallowed: what stands in its name."""
    outcomes = []
    taken: set[int] = set()
    for line in append.lines:
        entry = me.state.get(line.key)
        word = "lost"
        if line.verb in "CT" and entry and entry.session == me.sid and entry.status == "claimed":
            if abs(me.jobs[line.key]) != entry.token and entry.token not in taken:
                taken.add(entry.token)
                word = "claimed"
        elif line.verb == "D":
            done = entry is not None and entry.status == "done" and entry.token == line.token
            word = "applied" if done or not line.late else "lost"
        elif line.verb == "Q":
            word = "applied"
        outcomes.append(Outcome(word, entry.token if entry else 0, entry.attempt if entry else 0))
    return tuple(outcomes)


# ------------------------------------------------------------------ what a replica may write


def choices(config: Config, world: World, me: Replica, verbs: str) -> Iterator[tuple[Line, ...]]:
    """Everything sensible that it may compose now, by its own memory."""
    log = world.server.log
    memory = view(config, log, me)
    singles: list[Line] = []
    for key in range(config.keys):
        entry = memory.get(key)
        singles += _key_lines(config, world, me, verbs, key, entry)
    for line in singles:
        yield (line,)
    if config.batch > 1:
        for index, line in enumerate(singles):
            for other in singles[index + 1 :]:
                yield (line, other)
            if line.verb in "CD":
                yield (line, Line("C", line.key))
    buried = {line.key for rev in me.known for line in log[rev - 1].lines if line.verb == "X"}
    for session, last in me.tails:
        if session not in me.alive and session != me.sid and session not in buried:
            yield (Line("X", session, n=last),)
    if "E" in verbs and me.state.bucket < config.buckets:
        yield (Line("E", me.state.bucket + 1),)
    if "S" in verbs or "B" in verbs:
        now = world.server.clock
        for opened in memory.opened if config.has("snapshot_with_gaps") else me.state.opened:
            if "S" in verbs and (opened.clock < 0 or config.has("retention_from_e")):
                yield (Line("S", opened.bucket),)
            early = opened.clock >= 0 and config.has("b_early")
            unsure = config.mutants & {"b_without_snapshot", "b_unsure"}
            there = any(bucket == opened.bucket for bucket, _ in world.server.snaps)
            if "B" in verbs and (early or unsure or (there and 0 <= opened.clock < now)):
                yield (Line("B", opened.bucket, n=me.state.floor),)


def _key_lines(
    config: Config, world: World, me: Replica, verbs: str, key: int, entry: Entry | None
) -> Iterator[Line]:
    job = me.jobs[key]
    if job > 0:
        yield Line("D", key, job)
        if "R" in verbs:
            yield Line("R", key, job, n=entry.attempt if entry else 1)
        for verb in "PQ":
            if verb in verbs:
                yield Line(verb, key, job)
        return
    if job < 0 and entry and entry.status in ("doubt", "parked") and entry.token == -job:
        if "T" in verbs and config.batch > 1:
            yield Line("T", key, entry.token)
        yield Line("D", key, -job, late=True)
    if entry is None or entry.status == "free":
        if "C" in verbs and not answers_done(config, world.server.log, me, key):
            yield Line("C", key)
        return
    mine = entry.session == me.sid
    if entry.status in ("doubt", "parked") and "T" in verbs:
        yield Line("T", key, entry.token)
    if "F" in verbs and not world.seen[key].since:
        statuses = ("done", "parked", "claimed") if config.has("forget_claim") else ("done", "parked")
        if entry.status in statuses:
            yield Line("F", key, entry.token)
    if config.has("void_done") and entry.status == "parked":
        yield Line("D", key, entry.token)
        yield Line("R", key, entry.token, n=entry.attempt)
    if entry.status == "claimed" and not mine:
        if config.has("take_without_x"):
            yield Line("T", key, entry.token)
        if config.has("q_by_others"):
            yield Line("Q", key, entry.token)


# ------------------------------------------------------------------ transitions


class Step(NamedTuple):
    """Something that can happen.  ``violation``: what it breaks; then ``world`` is None."""

    label: tuple[object, ...]
    world: World | None
    violation: Violation | None = None
    fault: bool = False


Label = tuple[object, ...]


def successors(config: Config, world: World) -> list[Step]:
    """Everything that can happen next; a world at rest must leave no key stuck."""
    steps: list[Step] = []

    def attempt(label: Label, act: Callable[..., World | None], *args: object, fault: bool = False) -> None:
        try:
            after = act(config, world, *args)
            if after is not None:
                check_memories(config, world, after)
        except Violation as violation:
            steps.append(Step(label, None, violation, fault))
        else:
            if after is not None:
                steps.append(Step(label, after, None, fault))

    server, faults = world.server, world.faults
    for index, me in enumerate(world.replicas):
        name = f"p{index}"
        if me.sid == NOBODY:
            if config.restart:
                attempt((name, "restarts and imports"), restart, index)
            continue
        out = me.out
        if out is None:
            if me.left:
                for lines in choices(config, world, me, config.verbs[index]):
                    attempt((name, "composes", compose(config, world, me, lines)), send, index, lines)
        elif not out.rev:
            attempt((name, "sends append", out.append), exchange, index, False)
            if faults.lost:
                attempt((name, "sends append", out.append, "reply lost"), exchange, index, True, fault=True)
            if faults.copy:
                attempt(("a copy of", out.append, "stays in the net"), copy, index, fault=True)
            if config.has("unknown_is_never"):
                attempt((name, "gives up on", out.append), give_up, index)
        elif out.outcomes is not None:
            attempt((name, "decides", out.append), decide, index)
        elif me.cursor >= out.rev:
            attempt((name, "fetches"), fetch, index)
        if me.cursor < len(server.log):
            event = server.log[me.cursor]
            attempt((name, "watches", event), watch, index)
            if faults.drop:
                attempt((name, "misses", event), miss, index, fault=True)
        elif out is None and wants_look(config, world, me):
            attempt((name, "looks"), look, index)
        if faults.again:
            for rev in range(me.base + 1, me.cursor + 1):
                if rev not in me.known:
                    attempt((name, "watches late", server.log[rev - 1]), watch_late, index, rev, fault=True)
        if faults.imports and (me.base, me.cursor) != (len(server.log), len(server.log)):
            attempt((name, "imports again"), reimport, index, fault=True)
        if faults.crash:
            attempt((name, "crashes"), crash, index, fault=True)
        if config.has("own_clock"):
            attempt((name, "drops by its own clock"), own_clock, index)
    running = {me.sid for me in world.replicas}
    for sid in server.sessions:
        if sid not in running:
            attempt((f"session s{sid} expires",), expire, sid)
        elif faults.expiry:
            attempt((f"session s{sid} expires, its process goes on",), expire, sid, fault=True)
    for place, (append, _) in enumerate(world.net):
        attempt(("the copy of", append, "arrives"), arrive, place)
    if server.clock < config.ticks:
        attempt(("the clock ticks",), tick)
    attempt(("a log key below the floor is deleted",), delete)
    if not any(not step.fault for step in steps):
        try:
            check_rest(config, world)
        except Violation as violation:
            steps.append(Step(("rest",), None, violation))
    return steps


def _with(world: World, index: int, me: Replica, server: Server | None = None) -> World:
    replicas = (*world.replicas[:index], me, *world.replicas[index + 1 :])
    return world._replace(replicas=replicas, server=server or world.server)


def compose(config: Config, world: World, me: Replica, lines: tuple[Line, ...]) -> Append:
    """The append of ``lines``, for the bucket that complete memory says."""
    bucket = world.server.bucket if config.has("compose_ahead") else me.state.bucket
    if lines[0].verb == "E":
        bucket = lines[0].key
    snap: Keys = ()
    if lines[0].verb == "S":
        memory = view(config, world.server.log, me)
        bucket = memory.bucket if config.has("snapshot_with_gaps") else bucket
        opened = memory.opened if config.has("snapshot_with_gaps") else me.state.opened
        snap = next(o.keys for o in opened if o.bucket == lines[0].key)
        if config.has("snapshot_elsewhere"):
            snap = open_keys(memory.keys)
    return Append(me.sid, me.seq + 1, bucket, lines, world.server.clock, snap)


def send(config: Config, world: World, index: int, lines: tuple[Line, ...]) -> World:
    """Compose and send; what the server makes of it is another step."""
    me = world.replicas[index]
    append = compose(config, world, me, lines)
    net = tuple((a, never and a != append) for a, never in world.net)
    return _with(world, index, me._replace(out=Out(append), left=me.left - 1))._replace(net=net)


def copy(config: Config, world: World, index: int) -> World:
    """The network keeps one to deliver later."""
    out = world.replicas[index].out
    assert out is not None
    net = tuple(sorted((*world.net, (out.append, False))))
    return world._replace(net=net, faults=world.faults.less("copy"))


def arrive(config: Config, world: World, place: int) -> World:
    """A copy reaches the server; nobody hears the answer."""
    append, never = world.net[place]
    world = world._replace(net=(*world.net[:place], *world.net[place + 1 :]))
    after = put(config, world, append)
    if after is not None and never:
        raise Violation("IV", f"a ghost: {append} was answered never")
    return after or world


def exchange(config: Config, world: World, index: int, lost: bool) -> World:
    """The server gets the append (again); the reply comes, or not."""
    me = world.replicas[index]
    assert me.out is not None
    append = me.out.append
    after = put(config, world, append)
    if lost:
        return (after or world)._replace(faults=world.faults.less("lost"))
    if after is not None:
        world, server = after, after.server
        rev = len(server.log)
        out = me.out._replace(rev=rev, tails=server.tails)
        if config.has("own_at_reply"):  # V2
            _, outcomes = step(
                view(config, server.log, me), rev, me.sid, append.lines, append.clock, config.mutants
            )
            known = me.known if rev in me.known else (*me.known, rev)
            return _with(world, index, me._replace(known=known, out=out._replace(outcomes=outcomes)))
        return _with(world, index, settle(config, world, me._replace(out=out)))
    return _else(config, world, index, me, append)


def _else(config: Config, world: World, index: int, me: Replica, append: Append) -> World:
    """The else branch: applied before, or never, or (own session and tail gone, log key swept) unknown."""
    server = world.server
    tail = dict(server.tails).get(me.sid)
    mine = [r for r, a in enumerate(server.log, 1) if (a.session, a.seq) == (me.sid, append.seq)]
    found = bool(mine) and mine[0] not in server.gone
    applied = found if config.has("key_absent_guard") else tail is not None and tail >= append.seq
    if me.sid not in server.sessions:
        buried = tail is None and not config.has("gone_is_never")
        if not applied and not (buried and (found or mine)):
            world = _never(world, append)
        return reborn(config, world, index, me)
    if not applied:
        world = _never(world, append)
        out = Out(append, len(server.log), server.tails, refused=True)
        return _with(world, index, settle(config, world, me._replace(out=out)))
    out = (me.out or Out(append))._replace(rev=len(server.log), tails=server.tails)
    if found and server.log[mine[0] - 1] != append:
        raise Violation("IV", f"{append} is thought applied, but that was {server.log[mine[0] - 1]}")
    me = settle(config, world, me._replace(out=out))
    if me.out and me.out.outcomes is None and mine[0] <= me.base:  # an import swallowed it
        me = me._replace(out=me.out._replace(outcomes=from_memory(me, append)))
    return _with(world, index, me)


def _never(world: World, append: Append) -> World:
    if append in world.server.log:
        raise Violation("IV", f"{append} is answered never, but it was applied")
    return world._replace(net=tuple((a, never or a == append) for a, never in world.net))


def reborn(config: Config, world: World, index: int, me: Replica) -> World:
    """Its session has gone: a new one; what it was doing is other people's doubt."""
    server = world.server
    sid = server.born
    server = server._replace(born=sid + 1, sessions=(*server.sessions, sid), tails=(*server.tails, (sid, 0)))
    me = me._replace(sid=sid, seq=0, out=None, jobs=(0,) * config.keys)
    return _with(world, index, me, server)


def restart(config: Config, world: World, index: int) -> World:
    """A new process: a session, then the import."""
    world = reborn(config, world, index, world.replicas[index])
    return _with(world, index, import_all(config, world, world.replicas[index]))


def give_up(config: Config, world: World, index: int) -> World:
    """Mutant: an unknown result is taken for never."""
    return _with(world, index, world.replicas[index]._replace(out=None))


def watch(config: Config, world: World, index: int) -> World:
    """The next event."""
    me = world.replicas[index]
    rev = me.cursor + 1
    return _with(world, index, learn(config, world, me._replace(cursor=rev), (rev,)))


def watch_late(config: Config, world: World, index: int, rev: int) -> World:
    """An event that had been passed over."""
    me = learn(config, world, world.replicas[index], (rev,))
    return _with(world, index, me)._replace(faults=world.faults.less("again"))


def miss(config: Config, world: World, index: int) -> World:
    """The next event does not come."""
    me = world.replicas[index]
    return _with(world, index, me._replace(cursor=me.cursor + 1))._replace(faults=world.faults.less("drop"))


def present(server: Server, base: int) -> tuple[int, ...]:
    """Log keys after ``base`` that are still there."""
    return tuple(rev for rev in range(base + 1, len(server.log) + 1) if rev not in server.gone)


def fetch(config: Config, world: World, index: int) -> World:
    """Read what is missing; import if it has been deleted."""
    me = world.replicas[index]
    assert me.out is not None
    append, need = me.out.append, me.out.rev
    me = learn(config, world, me, present(world.server, me.base))
    if me.out is not None and me.base < need:
        me = import_all(config, world, me)
    if me.out is not None and me.out.outcomes is None and not me.out.refused:
        me = me._replace(out=me.out._replace(outcomes=from_memory(me, append)))
    return _with(world, index, me)


def wants_look(config: Config, world: World, me: Replica) -> bool:
    """Whether looking would tell an idle replica anything that it may need.

    Looking before the watch has brought what there is equals looking after it.
    """
    if config.has("no_look"):
        return False
    server = world.server
    rolls = config.buckets > 0 and me.base < len(server.log)
    gap = me.base + len(me.known) < len(server.log)
    stale = any(sid not in server.sessions for sid in me.alive)
    news = stale and (me.alive != server.sessions or me.base < len(server.log))
    return rolls or gap or news or me.sid not in server.sessions


def look(config: Config, world: World, index: int) -> World:
    """An idle replica reads sessions and tails, and fetches what they show."""
    server, me = world.server, world.replicas[index]
    if me.sid not in server.sessions:
        return reborn(config, world, index, me)
    me = me._replace(alive=server.sessions)
    me = learn(config, world, me, present(server, me.base))
    rev = len(server.log)
    if complete(config, server.log, me, rev, server.tails):
        me = advance(config, world, me, rev, server.tails)
    else:
        me = import_all(config, world, me)
    return _with(world, index, me)


def reimport(config: Config, world: World, index: int) -> World:
    """It may always import again."""
    me = import_all(config, world, world.replicas[index])
    out = me.out
    if out and out.rev and out.outcomes is None:
        me = me._replace(out=out._replace(outcomes=from_memory(me, out.append)))
    return _with(world, index, me)._replace(faults=world.faults.less("imports"))


def crash(config: Config, world: World, index: int) -> World:
    """The process is gone; its session stays until it expires."""
    left = world.replicas[index].left
    return _with(world, index, Replica(NOBODY, left=left))._replace(faults=world.faults.less("crash"))


def expire(config: Config, world: World, sid: int) -> World:
    """A session's lease ends."""
    sessions = tuple(s for s in world.server.sessions if s != sid)
    faults = world.faults
    if any(me.sid == sid for me in world.replicas):
        faults = faults.less("expiry")
    return world._replace(server=world.server._replace(sessions=sessions), faults=faults)


def tick(config: Config, world: World) -> World:
    """A retention goes by."""
    return world._replace(server=world.server._replace(clock=world.server.clock + 1))


def delete(config: Config, world: World) -> World | None:
    """One more page: the first log key, in order of name, of a bucket below the floor."""
    server = world.server
    floor = server.bucket if config.has("delete_above_floor") else server.floor
    pages = [
        (a.bucket, a.session, a.seq, rev)
        for rev, a in enumerate(server.log, 1)
        if a.bucket < floor and rev not in server.gone
    ]
    if not pages:
        return None
    gone = tuple(sorted((*server.gone, min(pages)[-1])))
    after = world._replace(server=server._replace(gone=gone))
    check_import(config, after)
    return after


def own_clock(config: Config, world: World, index: int) -> World | None:
    """Mutant: a replica drops what is old by its own clock."""
    me = world.replicas[index]
    for opened in me.state.opened:
        keys = below(me.state.keys, opened.bucket)
        if world.server.clock > 0 and keys != me.state.keys:
            me = me._replace(state=me.state._replace(keys=keys))
            there = truth(world.server.log[: me.base], config.mutants)[0]
            if me.state != there:
                raise Violation("III", f"at {me.base} it has {show(me.state)}, others {show(there)}")
    return None


# ------------------------------------------------------------------ acting on outcomes


def decide(config: Config, world: World, index: int) -> World:
    """Act on what the machine said at each line of the own append."""
    me = world.replicas[index]
    out = me.out
    assert out is not None
    assert out.outcomes is not None
    log, append = world.server.log, out.append
    rev = next(r for r, a in enumerate(log, 1) if (a.session, a.seq) == (append.session, append.seq))
    if log[rev - 1] != append:
        raise Violation("IV", f"{append} is thought applied, but that was {log[rev - 1]}")
    outcomes = out.outcomes
    if config.has("look_not_outcome"):  # V13
        outcomes = tuple(_looked(me, line, rev, o) for line, o in zip(append.lines, outcomes, strict=True))
    right = truth(log[:rev], config.mutants)[1]
    me = me._replace(out=None, seq=append.seq)
    world = _with(world, index, me)
    for line, outcome, true in zip(append.lines, outcomes, right, strict=True):
        if line.verb in "CT" and outcome.word == "claimed":
            world = start(config, world, index, line.key, outcome.token)
            if outcome != true:
                raise Violation("V", f"acts on {outcome.word} for {line}, the order says {true.word}")
        elif line.verb == "D" and outcome.word == "applied" and true.word != "applied":
            raise Violation("V", f"acts on {outcome.word} for {line}, the order says {true.word}")
        elif line.verb in "DRPQ":
            me = world.replicas[index]
            quit_ = line.verb == "Q" and outcome.word == "applied"
            job = -line.token if quit_ else 0
            if abs(me.jobs[line.key]) == line.token:
                world = _with(world, index, me._replace(jobs=_set(me.jobs, line.key, job)))
    return world


def _looked(me: Replica, line: Line, rev: int, outcome: Outcome) -> Outcome:
    entry = me.state.get(line.key)
    if line.verb in "CT" and entry and entry.session == me.sid and entry.token // LINES == rev:
        return Outcome(entry.status, entry.token, entry.attempt)
    return outcome


def runs(me: Replica, key: int) -> bool:
    """Whether a handler runs: it has returned when its D, R, P or Q is sent."""
    if me.jobs[key] <= 0:
        return False
    return me.out is None or not any(line.verb in "DRPQ" and line.key == key for line in me.out.append.lines)


def _set(jobs: tuple[int, ...], key: int, job: int) -> tuple[int, ...]:
    return (*jobs[:key], job, *jobs[key + 1 :])


def start(config: Config, world: World, index: int, key: int, token: int) -> World:
    """A handler starts: (I), (II), (V) and the effects, unless its session has just gone (V15)."""
    me, server = world.replicas[index], world.server
    already = me.jobs[key] > 0
    world = _with(world, index, me._replace(jobs=_set(me.jobs, key, token)))
    if me.sid not in server.sessions:
        return world
    if already:
        raise Violation("I", f"key {key} is started twice by p{index}")
    for other, replica in enumerate(world.replicas):
        if other != index and replica.sid in server.sessions and runs(replica, key):
            raise Violation("I", f"key {key} runs at p{other}, and p{index} starts it")
    entry = truth(server.log, config.mutants)[0].get(key)
    if entry is None or (entry.status, entry.token, entry.session) != ("claimed", token, me.sid):
        prop = "II" if entry is not None and entry.status == "done" else "V"
        now = f"{entry.status} {show_token(entry.token)}" if entry else "free"
        raise Violation(prop, f"p{index} starts key {key} with {show_token(token)}, in truth it is {now}")
    note = world.seen[key]
    if note.starts:
        raise Violation("effects", f"key {key} is started again, nobody recorded a doubt")
    seen = (*world.seen[:key], note._replace(starts=1), *world.seen[key + 1 :])
    return world._replace(seen=seen)


# ------------------------------------------------------------------ what must hold everywhere


def check_memories(config: Config, before: World, world: World) -> None:
    """Nobody answers done, to a message or to one sent back after F, of what was not done."""
    log = world.server.log
    for index, me in enumerate(world.replicas):
        if me.sid == NOBODY or (me == before.replicas[index] and world.seen == before.seen):
            continue
        for key, note in enumerate(world.seen):
            if note.stood or (me.base < note.since and not config.has("replay_without_since")):
                continue
            if answers_done(config, log, me, key):
                raise Violation("V", f"p{index} answers done for key {key}, which was not done")


def check_rest(config: Config, world: World) -> None:
    """(VII) Nothing happens any more, so every key must be anybody's, settled, or run by its holder."""
    server = world.server
    state = truth(server.log, config.mutants)[0]
    for index, me in enumerate(world.replicas):
        if me.sid == NOBODY:
            continue
        if me.out is not None:
            raise Violation("VII", f"p{index} waits for ever")
        memory = view(config, server.log, me)
        if memory != state:
            raise Violation("VII", f"p{index} has {show(memory)} for ever, the truth is {show(state)}")
        for key, entry in state.keys:
            if entry.status != "claimed":
                continue
            if entry.session == me.sid and me.jobs[key] != entry.token:
                raise Violation("VII", f"p{index} holds key {key} and does not know it")
            if entry.session not in server.sessions and entry.session in me.alive:
                raise Violation("VII", f"p{index} has key {key} busy for ever, s{entry.session} is dead")
