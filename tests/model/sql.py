"""The SQL protocol as an explicit-state model: one key's row, sessions that expire by the clock, batches.

The way of stores/sqlite.py: a batch is a transaction that confirms the session or begins another; an
unheard batch is looked up by the next one, and its claims are given back.  With ``Config.declared`` it is the
journal's way at the same grain: a session that is gone refuses appends, but its claims are in doubt only
when somebody has declared it dead, and its own process takes them back before it settles them.

Clock and time to live are whole ticks.  A world is a tuple of tuples, so that a search can remember it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

TTL = 3
"""Ticks that a session lives after it was confirmed."""
FRESH = 2
"""Ticks after it was confirmed in which a handler may start."""
RETENTION = 4


class Violation(Exception):
    """A property does not hold.  ``prop``: its name."""

    def __init__(self, prop: str, text: str) -> None:
        super().__init__(f"({prop}) {text}")
        self.prop = prop


class Row(NamedTuple):
    """What is stored of the key.  ``session`` -1: nobody's."""

    state: str  # claimed, free, parked, done
    token: int
    attempt: int
    session: int
    at: int


class Op(NamedTuple):
    """An operation.  ``token``: the one it names."""

    verb: str
    token: int = 0
    attempt: int = 0


class Reply(NamedTuple):
    """Its reply: claimed, busy, doubt, done, parked, free, applied, lost."""

    word: str
    token: int = 0
    attempt: int = 0


class Unsure(NamedTuple):
    """A batch whose reply was lost.  ``told``: the caller was told that the store is away."""

    op: Op
    reply: Reply
    session: int
    told: bool = False


class Process(NamedTuple):
    """One process.

    born: the last token before its session.  confirmed: when that was.  job: nothing, or claimed, running,
    returned, raised, unsure, with the claim's token and attempt.  saw: the token of a doubt that it saw.
    mine: its earlier sessions.  read: the row that a mutant looked at before its transaction.
    """

    session: int = -1
    born: int = 0
    confirmed: int = -9
    job: str = ""
    token: int = 0
    attempt: int = 0
    saw: int = 0
    unsure: Unsure | None = None
    mine: tuple[int, ...] = ()
    read: tuple[Row | None] | None = None


class Note(NamedTuple):
    """What the checks remember.

    starts: tokens of handlers that started, each with its attempt; excused: those that failed or are in
    doubt.  doubts: claims that must not just go free, because an attempt is in doubt that no other has
    followed.  done: the clock of the last done, -1 if there is none that must be remembered.
    """

    starts: tuple[tuple[int, int], ...] = ()
    excused: tuple[int, ...] = ()
    doubts: tuple[int, ...] = ()
    done: int = -1
    top: int = 0


class World(NamedTuple):
    """Everything.  expires: of every session.  declared: sessions that are declared dead."""

    clock: int = 0
    token: int = 0
    row: Row | None = None
    expires: tuple[int, ...] = ()
    declared: tuple[int, ...] = ()
    processes: tuple[Process, ...] = ()
    note: Note = Note()
    ticks: int = 0
    lost: int = 0
    crashes: int = 0
    acts: tuple[int, ...] = ()


class Config(NamedTuple):
    """What a search explores: verbs and operations of each process, ticks, lost replies, crashes."""

    name: str
    verbs: tuple[str, ...] = ("CDRQ", "CTD")
    acts: tuple[int, ...] = (3, 3)
    ticks: int = 4
    lost: int = 0
    crashes: int = 0
    declared: bool = False
    mutant: str = ""

    def has(self, *mutants: str) -> bool:
        """Whether the protocol is weakened so."""
        return self.mutant in mutants


def first(config: Config) -> World:
    """The beginning."""
    processes = (Process(),) * len(config.verbs)
    return World(
        processes=processes, ticks=config.ticks, lost=config.lost, crashes=config.crashes, acts=config.acts
    )


# ------------------------------------------------------------------ the table


def alive(config: Config, world: World, session: int) -> bool:
    """Whether a session's claims are its own."""
    if session < 0:
        return False
    if config.declared:
        return session not in world.declared
    return world.expires[session] > world.clock


def view(config: Config, world: World, row: Row | None) -> Reply:
    """The state that everybody is told."""
    if row is None:
        return Reply("free")
    if row.state != "claimed":
        return Reply(row.state, row.token, row.attempt)
    return Reply("busy" if alive(config, world, row.session) else "doubt", row.token, row.attempt)


def decide(config: Config, world: World, session: int, op: Op) -> tuple[Row | None, int, Reply]:
    """The row and the last token after an operation, and its reply."""
    row, token = world.row, world.token
    kept = RETENTION - 2 if config.has("done_dropped_early") else RETENTION
    if row is not None and row.state in ("done", "free") and row.at + kept <= world.clock:
        row = None
    state = view(config, world, row)
    held = row is not None and row.state == "claimed" and row.token == op.token
    new = token + 1
    if config.has("token_of_row"):
        new = 1 if row is None else row.token + 1
    match op.verb:
        case "C" if row is None or row.state == "free":
            attempt = 1 if row is None else row.attempt + 1
            return Row("claimed", new, attempt, session, world.clock), new, Reply("claimed", new, attempt)
        case "T":
            takeable = state.word in ("doubt", "parked") or (
                state.word == "busy" and config.has("takes_the_living")
            )
            if takeable and state.token == op.token:
                attempt = state.attempt + 1
                return Row("claimed", new, attempt, session, world.clock), new, Reply("claimed", new, attempt)
        case "D" if row is not None and (held or (row.state == "claimed" and config.has("done_by_anybody"))):
            return Row("done", row.token, row.attempt, -1, world.clock), token, Reply("applied")
        case "D" if row is not None and row.state == "done" and row.token == op.token:
            return row, token, Reply("applied")
        case "R" if row is not None and held:
            attempts = 0 if config.has("attempts_forgotten") else op.attempt
            free = Row("free", row.token, attempts, -1, world.clock) if op.attempt else None
            return free, token, Reply("applied")
        case "Q" if row is not None and held:
            if config.has("abandon_frees"):
                return Row("free", row.token, row.attempt, -1, world.clock), token, Reply("applied")
            return row._replace(session=-1), token, Reply("applied")
        case "P" if row is not None and held:
            return Row("parked", new, row.attempt, -1, world.clock), new, Reply("applied")
        case "F" if row is not None and row.token == op.token:
            if row.state in ("done", "parked") or (row.state == "claimed" and config.has("forget_claim")):
                return None, token, Reply("applied")
    if op.verb in "DRQPF":
        return row, token, Reply("lost")
    return row, token, state


# ------------------------------------------------------------------ a batch


def transact(config: Config, world: World, index: int, op: Op | None) -> tuple[World, Reply]:
    """One transaction of a process: its session, what is unheard, its operation."""
    me = world.processes[index]
    if me.session < 0 or world.expires[me.session] <= world.clock:
        world, me = _renew(config, world, me)
    elif not config.declared or op is None:
        expires = list(world.expires)
        expires[me.session] = world.clock + TTL
        world, me = world._replace(expires=tuple(expires)), me._replace(confirmed=world.clock)
    world = _with(world, index, me)
    if me.unsure is not None and op is not None:
        undo = _undo(config, me.unsure)
        mine = not config.declared or me.unsure.session == me.session
        if me.unsure.told and undo is not None and mine:
            world, _ = _apply(config, world, me.session, undo)
        world = _with(world, index, me._replace(unsure=None))
    if op is None:
        return world, Reply("")
    if config.declared and op.verb in "DRQP" and world.row is not None:
        world, op = _retake(config, world, me, op)
    return _apply(config, world, me.session, op)


def _renew(config: Config, world: World, me: Process) -> tuple[World, Process]:
    """A session whose time is over never comes back."""
    session = len(world.expires)
    me = me._replace(session=session, born=world.token, confirmed=world.clock, mine=(*me.mine, session)[-3:])
    return world._replace(expires=(*world.expires, world.clock + TTL)), me


def _undo(config: Config, unsure: Unsure) -> Op | None:
    """What gives back a claim that nobody heard of."""
    if unsure.reply.word != "claimed" or config.has("no_undo"):
        return None
    if unsure.op.verb == "C" or config.has("undo_frees_doubt"):
        return Op("R", unsure.reply.token, unsure.reply.attempt - 1)
    return Op("Q", unsure.reply.token)


def _retake(config: Config, world: World, me: Process, op: Op) -> tuple[World, Op]:
    """The claim of an earlier session of this process is taken over first, if nobody was faster."""
    row = world.row
    assert row is not None
    earlier = row.session in me.mine and row.session != me.session
    if row.state != "claimed" or row.token != op.token or not earlier:
        # Not its own any more: an append of it would be void.
        owner = row.session == me.session and row.token == op.token
        return world, op if owner or row.state == "done" else op._replace(token=-1)
    world = world._replace(declared=(*world.declared, row.session))
    after, reply = _apply(config, world, me.session, Op("T", op.token))
    before, note = world.note, after.note
    started = tuple((reply.token if t == op.token else t, a) for t, a in note.starts)
    doubts = note.doubts if op.token in before.doubts else _without(note.doubts, reply.token)
    note = note._replace(starts=started, excused=_without(note.excused, op.token), doubts=doubts)
    return after._replace(note=note), op._replace(token=reply.token)


def _apply(config: Config, world: World, session: int, op: Op) -> tuple[World, Reply]:
    """One operation, and the checks of what it changed."""
    row, token, reply = decide(config, world, session, op)
    after = world._replace(row=row, token=token)
    return after._replace(note=_note(world, after, op, reply)), reply


def _note(world: World, after: World, op: Op, reply: Reply) -> Note:
    note, old, new = world.note, world.row, after.row
    if reply.word == "claimed":
        if reply.token <= note.top:
            raise Violation("tokens", f"token {reply.token} is given out after {note.top}")
        note = note._replace(top=reply.token)
        if op.verb == "T" and old is not None:
            doubts = (*_without(note.doubts, old.token), reply.token)
            note = note._replace(excused=(*note.excused, old.token), doubts=doubts)
        elif note.doubts:
            raise Violation("doubt", f"the key is free, and token {note.doubts[0]} is in doubt")
        elif old is None or old.at + RETENTION <= world.clock:
            note = note._replace(starts=(), excused=())
    if reply.word == "applied":
        note = _settled(note, op)
    if note.done >= 0 and (new is None or new.state != "done"):
        if op.verb != "F" and world.clock - note.done < RETENTION:
            raise Violation("done", f"done of {note.done} is gone at {world.clock}")
        note = note._replace(done=-1)
    if new is not None and new.state == "done" and (old is None or old.state != "done"):
        if op.verb == "D" and op.token != new.token:
            raise Violation("done", f"token {op.token} completes the claim of token {new.token}")
        note = note._replace(done=world.clock)
    if op.verb == "F" and reply.word == "applied":
        if old is not None and old.state == "claimed":
            raise Violation("claim", "a claim is forgotten")
        note = note._replace(starts=(), excused=(), doubts=(), done=-1)
    return note


def _settled(note: Note, op: Op) -> Note:
    """A claim has ended."""
    if op.verb == "R" and op.token in note.doubts:
        raise Violation("doubt", f"token {op.token} goes free, and an attempt before it is in doubt")
    if op.verb in "RPQ":
        note = note._replace(excused=(*note.excused, op.token))
    doubts = _without(note.doubts, op.token)
    return note._replace(doubts=(*doubts, op.token) if op.verb == "Q" else doubts)


def _without(tokens: tuple[int, ...], token: int) -> tuple[int, ...]:
    return tuple(each for each in tokens if each != token)


# ------------------------------------------------------------------ what can happen


def successors(config: Config, world: World) -> Iterator[tuple[str, World | Violation]]:
    """Everything that can happen next."""
    if world.ticks:
        yield "tick", world._replace(clock=world.clock + 1, ticks=world.ticks - 1)
    if config.declared:
        for session, until in enumerate(world.expires):
            over = until <= world.clock or config.has("declares_the_living")
            if over and session not in world.declared:
                yield f"s{session} is declared dead", world._replace(declared=(*world.declared, session))
    for index, me in enumerate(world.processes):
        yield from _moves(config, world, index, me)


def _moves(config: Config, world: World, index: int, me: Process) -> Iterator[tuple[str, World | Violation]]:
    if me.job == "claimed" and _fresh(config, world, me):
        yield f"p{index} starts", _guard(_start, config, world, index)
    if me.job == "claimed":
        yield f"p{index} does not start", _with(world, index, me._replace(job="not started"))
    if me.job == "running":
        for end in ("returned", "raised", "unsure"):
            yield f"p{index}'s handler: {end}", _with(world, index, me._replace(job=end))
    if me.unsure is not None and not me.unsure.told:
        yield f"p{index} gives up", _with(world, index, me._replace(unsure=me.unsure._replace(told=True)))
        yield f"p{index} sends it again", _guard(_again, config, world, index)
        return
    if world.crashes and me.session >= 0:
        crashed = _with(world, index, Process())._replace(crashes=world.crashes - 1)
        yield f"p{index} is killed, and comes back", crashed
    if me.session >= 0 and world.expires[me.session] < world.clock + TTL:
        yield f"p{index} confirms", _guard(_beat, config, world, index)
    if not world.acts[index]:
        return
    for op in _ops(config, world, index, me):
        yield f"p{index}: {op.verb} {op.token or ''}", _guard(_act, config, world, index, op, "")
        if world.lost:
            yield (
                f"p{index}: {op.verb} {op.token or ''}, reply lost",
                _guard(_act, config, world, index, op, "reply"),
            )
    if config.has("read_then_write") and not me.job and me.read is None:
        yield f"p{index} reads", _with(world, index, me._replace(read=(world.row,)))


def _ops(config: Config, world: World, index: int, me: Process) -> Iterator[Op]:
    """What a process would ask now."""
    verbs = config.verbs[index]
    match me.job:
        case "":
            if me.saw and "T" in verbs:
                yield Op("T", me.saw)
            elif "C" in verbs:
                yield Op("C")
            if "F" in verbs and world.row is not None:
                yield Op("F", world.row.token)
        case "returned":
            yield Op("D", me.token)
        case "raised":
            yield Op("P" if "P" in verbs else "R", me.token, me.attempt)
        case "unsure":
            yield Op("Q", me.token)
        case "not started":
            # An attempt in doubt before it must not be forgotten.
            yield Op("Q", me.token) if me.saw else Op("R", me.token, me.attempt - 1)


def _fresh(config: Config, world: World, me: Process) -> bool:
    """Right before a handler's first instruction."""
    mine = me.token > me.born or config.has("fresh_without_token")
    return mine and (world.clock - me.confirmed < FRESH or config.has("always_fresh"))


def _guard(step, *given) -> World | Violation:  # type: ignore[no-untyped-def]
    try:
        return step(*given)  # type: ignore[no-any-return]
    except Violation as violation:
        return violation


def _beat(config: Config, world: World, index: int) -> World:
    return transact(config, world, index, None)[0]


def _act(config: Config, world: World, index: int, op: Op, lost: str) -> World:
    """A batch, heard or not."""
    acts = list(world.acts)
    acts[index] -= 1
    world = world._replace(acts=tuple(acts))
    now = world.row
    read = world.processes[index].read
    if read is not None:
        world = world._replace(row=read[0])
    world, reply = transact(config, world, index, op)
    if read is not None and reply.word != "claimed":
        world = world._replace(row=now)
    if (op.verb, reply.word) == ("D", "applied") and world.note.done < 0:
        raise Violation("done", f"p{index} is told applied, and nothing is done")
    me = world.processes[index]._replace(read=None)
    if lost:
        me = me._replace(unsure=Unsure(op, reply, me.session))
        return _with(world, index, me)._replace(lost=world.lost - 1)
    return _hear(config, _with(world, index, me), index, op, reply)


def _again(config: Config, world: World, index: int) -> World:
    """The same batch once more: it took effect, so its reply stands."""
    me = world.processes[index]
    assert me.unsure is not None
    op, reply = me.unsure.op, me.unsure.reply
    if config.has("sent_again_blindly"):
        world, reply = transact(config, world, index, op)
        me = world.processes[index]
    return _hear(config, _with(world, index, me._replace(unsure=None)), index, op, reply)


def _hear(config: Config, world: World, index: int, op: Op, reply: Reply) -> World:
    """Act on a reply."""
    me = world.processes[index]
    match op.verb, reply.word:
        case (("C" | "T"), "claimed"):
            saw = me.saw if op.verb == "T" else 0
            me = me._replace(job="claimed", token=reply.token, attempt=reply.attempt, saw=saw)
        case (("C" | "T"), "doubt"):
            me = me._replace(saw=reply.token)
        case "C", "busy" if config.has("takes_the_living"):
            me = me._replace(saw=reply.token)
        case (("C" | "T"), _):
            me = me._replace(saw=0)
        case "F", _:
            pass
        case _:
            me = me._replace(job="", token=0, attempt=0, saw=0)
    return _with(world, index, me)


def _start(config: Config, world: World, index: int) -> World:
    """A handler starts."""
    me, note, row = world.processes[index], world.note, world.row
    if row is None or (row.state, row.token) != ("claimed", me.token):
        raise Violation("start", f"p{index} starts under token {me.token}, in truth it is {row}")
    if world.expires[row.session] <= world.clock or row.session != me.session:
        raise Violation("start", f"p{index} starts under s{row.session}, which is dead")
    for other, process in enumerate(world.processes):
        lives = process.session >= 0 and world.expires[process.session] > world.clock
        if other != index and process.job == "running" and lives and process.token > process.born:
            raise Violation("one", f"p{other} runs, and p{index} starts")
    if any(attempt == me.attempt for _, attempt in note.starts):
        raise Violation("attempts", f"attempt {me.attempt} starts twice")
    unexplained = [token for token, _ in note.starts if token not in note.excused]
    if unexplained:
        raise Violation("effects", f"token {unexplained[0]} started, nobody recorded a doubt")
    started = (*note.starts, (me.token, me.attempt))
    note = note._replace(starts=started, doubts=_without(note.doubts, me.token))
    return _with(world, index, me._replace(job="running"))._replace(note=note)


def check_rest(config: Config, world: World) -> None:
    """Nobody holds the key without knowing it."""
    row = world.row
    if row is None or row.state != "claimed":
        return
    for index, me in enumerate(world.processes):
        if me.session == row.session and me.session >= 0 and not me.job and me.unsure is None:
            raise Violation("held", f"p{index} holds the key and does not know it")


def _with(world: World, index: int, me: Process) -> World:
    processes = (*world.processes[:index], me, *world.processes[index + 1 :])
    return world._replace(processes=processes)


# ------------------------------------------------------------------ the search


class Result(NamedTuple):
    """What a search found; the first violation has a shortest trace."""

    states: int
    depth: int
    exhausted: bool
    seconds: float
    violation: Violation | None = None
    trace: tuple[str, ...] = ()


def search(config: Config, limit: int = 400_000) -> Result:
    """Breadth first, through at most ``limit`` worlds."""
    began = time.perf_counter()
    root = first(config)
    parent: dict[World, tuple[World, str] | None] = {root: None}
    queue = deque([(root, 0)])
    states = depth = 0
    while queue:
        if states >= limit:
            return Result(states, depth, False, time.perf_counter() - began)
        world, depth = queue.popleft()
        states += 1
        for label, after in successors(config, world):
            found = after
            if isinstance(after, World):
                if after in parent:
                    continue
                parent[after] = (world, label)
                found = _guard(_checked, config, after)
                queue.append((after, depth + 1))
            if isinstance(found, Violation):
                trace = (*_path(parent, world), label)
                return Result(states, depth, False, time.perf_counter() - began, found, trace)
    return Result(states, depth, True, time.perf_counter() - began)


def _checked(config: Config, world: World) -> World:
    check_rest(config, world)
    return world


def _path(parent: dict[World, tuple[World, str] | None], world: World) -> tuple[str, ...]:
    path: list[str] = []
    before = parent[world]
    while before is not None:
        path.append(before[1])
        before = parent[before[0]]
    return tuple(path[::-1])
