"""The mutants: a file of the package, a text that it has exactly once, what stands there instead, and why.

Each is applied to a copy of the package, where the named check must fail; on the clean copy it passes.
"""

from __future__ import annotations

from typing import NamedTuple

WORLDS = ("-m", "tests.simulator", "0", "--steps", "60000")
"""Some hundred worlds by chance."""


def worlds(seed: int) -> tuple[str, ...]:
    """The world in which it was seen."""
    return ("-m", "tests.simulator", str(seed))


def unit(*tests: str) -> tuple[str, ...]:
    """Tests, up to the first that fails."""
    return ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests))


class Mutant(NamedTuple):
    """``without``: the sentence that is left out."""

    without: str
    file: str
    old: str
    new: str
    check: tuple[str, ...] = WORLDS

    @property
    def name(self) -> str:
        """For a test's id."""
        return f"{self.file}: {self.without}"


MUTANTS = (
    # ---------------------------------------------------------------- pipeline.py
    Mutant(
        "a message is acknowledged when its copy is safe, not before",
        "pipeline.py",
        "        self._sends.append((flight, copy))\n",
        "        self._sends.append((flight, copy))\n        self._acks.append(flight.tag)\n",
    ),
    Mutant(
        "a copy that was not confirmed is sent again",
        "pipeline.py",
        "        if error:\n",
        "        if error and hopeless:\n",
    ),
    Mutant(
        "duplicates that waited are skipped only if their first is done",
        "pipeline.py",
        "if done and duplicate.fingerprint is None and not",
        "if duplicate.fingerprint is None and not",
    ),
    Mutant(
        "a lost claim is looked up again, not acknowledged",
        "pipeline.py",
        '"the claim was taken over")\n                self._start_again(flight)',
        '"the claim was taken over")\n                self._acknowledge(flight, "ok")\n'
        "                self._leave_window(flight, done=True)",
        unit("test_pipeline.py::test_a_lost_claim_is_looked_up_again"),
    ),
    Mutant(
        "nothing is acknowledged on a connection that is gone",
        "pipeline.py",
        "            flights[0].tag = None\n",
        "",
    ),
    Mutant(
        "a busy key is deferred, not acknowledged",
        "pipeline.py",
        'self._again_later(flight, "deferred", delay, "busy", _attempts(flight.delivery))',
        'self._acknowledge(flight, "skipped")',
    ),
    Mutant(
        "a suspect is run alone",
        "pipeline.py",
        "isinstance(step, Takeover) and _is_suspect(flight.policy, event)",
        "False",
        unit("test_pipeline.py::test_a_suspect_is_run_alone"),
    ),
    Mutant(
        "a full batch is handed over ahead",
        "pipeline.py",
        "if free < 0 or (free == 0 and len(self.waiting) < self.width):",
        "if free <= 0:",
        unit("test_inbox_consumer.py::test_a_full_batch_is_handed_over_ahead"),
    ),
    Mutant(
        "but one only",
        "pipeline.py",
        "if free < 0 or (free == 0 and len(self.waiting) < self.width):",
        "if free <= 0 and len(self.waiting) < self.width:",
        unit("test_inbox_consumer.py::test_a_full_batch_is_handed_over_ahead"),
    ),
    # ---------------------------------------------------------------- protocol.py
    Mutant(
        "the policy decides what becomes of a doubt",
        "protocol.py",
        "return (yield from _after_doubt(policy, key, state, fingerprint, too_old()))",
        "return (yield from _run(policy, key, state, fingerprint))",
    ),
    Mutant(
        "a doubt is not forgotten with an attempt that did not start",
        "protocol.py",
        "give_back = Abandon if doubtful else Release",
        "give_back = Release",
    ),
    Mutant(
        "ok needs a completion that was applied",
        "protocol.py",
        "yield Complete(key, claim.token, result, fingerprint)\n"
        "            return Ok(value, claim) if isinstance(reply, Applied) else Overtaken(claim)",
        "yield Complete(key, claim.token, result, fingerprint)\n            return Ok(value, claim)",
        unit("test_once.py::test_a_claim_taken_over_while_it_ran_is_lost"),
    ),
    Mutant(
        "who cannot say what happened leaves a doubt, not a free key",
        "protocol.py",
        "if isinstance(error, InDoubt) or interrupted:",
        "if interrupted:",
    ),
    Mutant(
        "what is older than the retention is not run after a doubt either",
        "protocol.py",
        'if policy.in_doubt == "park" or too_old:',
        'if policy.in_doubt == "park":',
    ),
    Mutant(
        "a doubt that was taken over and not started costs no attempt",
        "laws.py",
        "count = entry.attempt if attempts is None else attempts",
        "count = entry.attempt",
        unit("contract/test_stores.py::test_a_doubt_taken_over_and_not_started_costs_no_attempt[memory]"),
    ),
    Mutant(
        "crashes use up attempts",
        "protocol.py",
        "if claim.attempt > policy.attempts:",
        "if claim.attempt > policy.attempts + 1:",
    ),
    # ---------------------------------------------------------------- laws.py
    Mutant(
        "only the holder of the current token completes",
        "laws.py",
        "            case Complete(_, token, result, fingerprint):\n"
        "                if entry is not None and entry.token == token:",
        "            case Complete(_, token, result, fingerprint):\n                if entry is not None:",
        unit("contract/test_stores.py::test_a_token_that_is_not_current_changes_nothing[memory]"),
    ),
    Mutant(
        "attempts count on after a release",
        "laws.py",
        'free = Entry(FREE, token, attempts, "", self.now)',
        'free = Entry(FREE, token, 0, "", self.now)',
    ),
    Mutant(
        "tokens grow",
        "laws.py",
        "        self.token += 1\n        self._put(key, Entry(CLAIMED",
        "        self.token = max(self.token, 1)\n        self._put(key, Entry(CLAIMED",
    ),
    Mutant(
        "who saw a doubt does not take what was parked since",
        "laws.py",
        'Entry(PARKED, self.token, entry.attempt, "", self.now, reason)',
        'Entry(PARKED, token, entry.attempt, "", self.now, reason)',
        unit("contract/test_stores.py::test_who_saw_a_doubt_does_not_take_what_came_after_it[memory]"),
    ),
    Mutant(
        "a takeover names the doubt that it saw",
        "laws.py",
        "if isinstance(state, Doubt | Parked) and state.token == token:",
        "if isinstance(state, Doubt | Parked):",
        unit("contract/test_stores.py::test_who_saw_a_doubt_does_not_take_what_came_after_it[memory]"),
    ),
    # ---------------------------------------------------------------- stores/
    Mutant(
        "done only by the holder of the claim",
        "stores/journal.py",
        "entry is not None and entry.session == fold.session and entry.state == CLAIMED",
        "entry is not None and entry.state == CLAIMED",
        unit("test_journal.py::test_the_first_in_the_order_wins"),
    ),
    Mutant(
        "a dead session's claims are in doubt",
        "stores/journal.py",
        'self._keys.open[key] = replace(entry, session="")',
        "pass",
        unit("test_journal.py::test_a_declared_sessions_claims_are_in_doubt"),
    ),
    Mutant(
        "an append counts once",
        "stores/journal.py",
        "if seq <= known or session in self._ended:",
        "if session in self._ended:",
        unit("test_journal.py::test_an_append_is_applied_once_and_in_its_place"),
    ),
    Mutant(
        "what is done before the floor is dropped, and nothing else",
        "stores/journal.py",
        "self._keys.drop_before(floor)",
        "self._keys.drop_before(floor + 1)",
        unit("test_journal.py::test_memory_is_bounded_by_the_buckets"),
    ),
    Mutant(
        "an importer knows in which bucket a key was set free",
        "stores/journal.py",
        "                self._keys.freed[key] = bucket\n",
        "                self._keys.freed[key] = floor\n",
        unit("test_journal.py::test_an_importer_drops_what_was_freed_where_the_others_do"),
    ),
    Mutant(
        "of a run, too, only what the writer holds is done",
        "stores/journal.py",
        "if key is not None and known[key].session == session:",
        "if key is not None:",
        unit("test_journal.py::TestReplicas"),
    ),
    Mutant(
        "by the short way, too, only a claim's holder completes it",
        "stores/journal.py",
        "if keys.open[key].session != fold.session:",
        "if not key:",
        unit("test_journal.py::TestReplicas"),
    ),
    Mutant(
        "what is too much for one append is divided",
        "stores/etcd.py",
        "return size <= MOST_BYTES and len(ops)",
        "return len(ops)",
        unit("test_etcd_store.py::test_what_fits_into_one_append"),
    ),
    Mutant(
        "the short way gives nobody a key that was done",
        "stores/journal.py",
        "if key not in known and find(key) is None:",
        "if key not in known:",
        unit("test_journal.py::TestReplicas"),
    ),
    Mutant(
        "a key is known by all of its hash",
        "stores/seen.py",
        " and _REST(cell, at + 8)[0] == _second(key):",
        ":",
        unit("test_seen.py::TestTables"),
    ),
    Mutant(
        "claims that nobody heard of are given back",
        "laws.py",
        "                undo.append(Release(key, token, attempt - 1))",
        "                pass",
        unit("test_sqlite_store.py::test_a_claim_that_nobody_heard_of_is_given_back"),
    ),
    Mutant(
        "a claim of an earlier session starts no handler",
        "stores/door.py",
        "return not token or token > self._born",
        "return True",
        unit("test_sqlite_store.py::test_what_a_lost_session_had_claimed_is_not_started"),
    ),
    Mutant(
        "a session dies by the clock",
        "stores/sqlite.py",
        "FROM idemp_session WHERE boot = :boot AND expires > :now),",
        "FROM idemp_session WHERE boot = :boot),",
        unit("test_sqlite_store.py::test_a_session_dies_by_the_clock_and_never_comes_back"),
    ),
    Mutant(
        "done is forgotten after the retention",
        "stores/memory.py",
        "return entry.state in (DONE, FREE) and",
        "return entry.state == FREE and",
        unit("contract/test_stores.py::test_done_lasts_for_the_retention_and_then_goes[memory]"),
    ),
    # ---------------------------------------------------------------- once.py
    Mutant(
        "a stale session starts no handler",
        "once.py",
        'if the session is stale."""\n    if not policy.store.fresh(current.fencing_token):',
        'if the session is stale."""\n    if False:',
        unit("test_once.py::test_a_stale_session_starts_no_handler"),
    ),
    Mutant(
        "a cancelled caller gives back the claim that it wins meanwhile",
        "offloop.py",
        "                unheard += undoing([op], [reply])",
        "                pass",
        unit("test_once.py::test_cancelled_while_claiming_gives_the_claim_back"),
    ),
    Mutant(
        "what may have killed its process is counted before it begins",
        "inbox.py",
        "_count(store, [job for job in jobs if job.again],",
        "_count(store, [],",
        unit("test_inbox_count.py::test_it_is_counted_before_it_begins"),
    ),
    Mutant(
        "what comes for the first time is not counted",
        "inbox.py",
        "_count(store, [job for job in jobs if job.again],",
        "_count(store, jobs,",
        unit("test_inbox_count.py::test_it_is_counted_before_it_begins"),
    ),
    Mutant(
        "calls that deadlocked together go one by one",
        "inbox.py",
        "divisible=len(jobs) > 1",
        "divisible=False",
        unit("test_inbox_consumer.py::test_replicas_that_want_the_same_rows"),
    ),
    Mutant(
        "what may have committed is looked up by who made it",
        "stores/postgresql.py",
        "if divisible and deadline is None and",
        "if divisible and",
        unit("test_inbox_count.py::test_after_a_commit_that_nobody_knows_of_a_deadlock_divides_nothing"),
    ),
    Mutant(
        "where others want the same rows fewer go together",
        "pipeline.py",
        "        if lost:\n",
        "        if False:\n",
        unit("test_inbox_consumer.py::test_where_others_want_the_same_rows_fewer_go_together"),
    ),
    Mutant(
        "no transaction runs beside one that may have killed its process",
        "pipeline.py",
        "(self.alone or self._again(self.waiting[0]))",
        "self.alone",
        unit("test_inbox_consumer.py::test_nothing_runs_beside_one_that_may_have_killed_its_process"),
    ),
    Mutant(
        "nor begins one while such a one runs",
        "pipeline.py",
        "(self.alone or self._again(self.waiting[0]))",
        "self._again(self.waiting[0])",
        unit("test_inbox_consumer.py::test_nothing_runs_beside_one_that_may_have_killed_its_process"),
    ),
    Mutant(
        "the attempt that was counted is this one",
        "inbox.py",
        "max(0, claim.attempt - 2)",
        "claim.attempt - 1",
        unit("test_inbox_count.py::test_the_attempt_that_was_counted_is_this_one"),
    ),
    Mutant(
        "what was counted before goes alone",
        "inbox.py",
        "if crowd and (1 <= before < job.attempts or job.attempts == 1):",
        "if crowd and job.attempts == 1:",
        unit("test_inbox_count.py::test_what_was_counted_before_goes_alone"),
    ),
    Mutant(
        "and what has one attempt only",
        "inbox.py",
        "if crowd and (1 <= before < job.attempts or job.attempts == 1):",
        "if crowd and 1 <= before < job.attempts:",
        unit("test_inbox_count.py::test_one_that_has_one_attempt_only_goes_alone_at_once"),
    ),
    Mutant(
        "a count whose reply was lost is not made again",
        "inbox.py",
        "if not (job.counted and job.counted == before):",
        "if True:",
        unit("test_inbox_count.py::test_a_count_whose_reply_was_lost_is_not_made_again"),
    ),
    Mutant(
        "who keeps the session of etcd outlasts a file of its URL that is away",
        "stores/etcd.py",
        "            except IdempError as error:  # also",
        "            except EtcdError as error:  # also",
        unit("test_etcd_store.py::test_who_keeps_it_outlasts_a_file_that_was_away"),
    ),
    Mutant(
        "a word for the lease before says nothing of this one",
        "stores/etcd.py",
        " > 0 and lease == self._lease:",
        " > 0:",
        unit("test_etcd_store.py::test_a_word_for_the_lease_before_says_nothing_of_this_one"),
    ),
    # ---------------------------------------------------------------- forks
    Mutant(
        "what a fork inherits of a store is not used",
        "stores/door.py",
        "        store._forked()\n",
        "        pass\n",
        unit("test_door.py::test_threads_that_come_first_after_a_fork_share_a_session"),
    ),
    Mutant(
        "a forked child has threads of its own to wait in",
        "once.py",
        "os.register_at_fork(after_in_child=_make_pools)\n",
        "",
        unit("test_door.py::test_calls_that_wait_in_threads_go_on_after_a_fork"),
    ),
    Mutant(
        "a meter goes on in a forked child",
        "metrics.py",
        "            meter._begin()\n",
        "            pass\n",
        unit("test_door.py::test_a_forked_child_counts_for_itself"),
    ),
    # ---------------------------------------------------------------- message.py
    Mutant(
        "a body with more in it is read as a whole",
        "message.py",
        "class _Usual(msgspec.Struct, forbid_unknown_fields=True):",
        "class _Usual(msgspec.Struct):",
        unit("test_message.py::test_the_short_way_to_read_a_body_leads_where_the_long_one_does"),
    ),
    # ---------------------------------------------------------------- stores/postgresql_handlers.py
    Mutant(
        "the savepoint before a handler is owed",
        "stores/postgresql_inbox.py",
        "        self.connection.owes = True\n",
        "",
        unit("test_inbox_connection.py::test_what_it_does_is_undone_alone[text]"),
    ),
    Mutant(
        "of who asked nothing there is nothing to undo",
        "stores/postgresql_inbox.py",
        "        if not self.connection.owes:  # else nothing was done\n",
        "        if True:\n",
        unit("test_inbox_connection.py::test_a_handler_that_asks_nothing_costs_none"),
    ),
    Mutant(
        "a savepoint that could not be set is not taken for one",
        "stores/postgresql_inbox.py",
        "        if self.connection.torn is not None:\n",
        "        if False:\n",
        unit("test_inbox_connection.py::test_a_savepoint_that_could_not_be_set_undoes_nothing_of_others"),
    ),
    Mutant(
        "who ended its savepoint is found out before the commit",
        "stores/postgresql_inbox.py",
        "            if owed:\n",
        "            if False:\n",
        unit("test_inbox_connection.py::test_who_ends_its_savepoint_is_found_out"),
    ),
    Mutant(
        "the next handler finds its kinds of cursor",
        "stores/postgresql_inbox.py",
        "        self.connection.cursor_factory = HandlersCursor\n",
        "",
        unit("test_inbox_connection.py::test_what_it_does_is_undone_alone[own kinds]"),
    ),
    Mutant(
        "what is no plain statement waits until the savepoint was sent",
        "stores/postgresql_handlers.py",
        '        if self.owes and getattr(gen, "gi_code", None) is not _EXECUTE:\n',
        "        if False:\n",
        unit("test_inbox_connection.py::test_what_it_does_is_undone_alone[copy]"),
    ),
    Mutant(
        "several statements in one are not plain",
        "stores/postgresql_handlers.py",
        'VALUES|WITH)\\b[^;]*;?\\s*"',
        'VALUES|WITH)\\b.*"',
        unit("test_inbox_connection.py::test_what_it_does_is_undone_alone[several]"),
    ),
    Mutant(
        "a statement that was never sent took nothing along",
        "stores/postgresql_handlers.py",
        "        self._pipeline = self._ahead\n",
        "        self._pipeline, self.owes = self._ahead, False\n",
        unit("test_inbox_connection.py::test_what_it_does_is_undone_alone[mistakes]"),
    ),
    Mutant(
        "the savepoint goes along",
        "stores/postgresql_handlers.py",
        "        elif not (_KNOWN and plain(query)):\n",
        "        elif query:\n",
        unit("test_inbox_connection.py::test_a_statement_a_handler_is_one_round_trip[values]"),
    ),
    Mutant(
        "psycopg lets old statements go by itself",
        "stores/postgresql_handlers.py",
        "        self.leave()\n        self._owner.owes = False\n",
        "        self._owner.owes = False\n        self.leave()\n        self._owner._pipeline = self\n",
        unit("test_inbox_connection.py::test_who_prepares_much"),
    ),
    # ---------------------------------------------------------------- redis_server.py
    Mutant(
        "a master that became a replica is waited for",
        "redis_server.py",
        "            if not self._as_master:\n",
        "            if True:\n",
        unit("test_redis_streams.py::test_nothing_is_published_on_a_replica"),
    ),
    # ---------------------------------------------------------------- stores/etcd_replica.py
    Mutant(
        "a journal that cannot be read is given up for good",
        "stores/etcd_replica.py",
        "            self.unreadable, self.trusted = line, False\n",
        "",
        unit("test_etcd_store.py::test_a_journal_of_a_newer_idemp_is_not_read_on[True-Z key 7]"),
    ),
    Mutant(
        "a line of a newer version is told from a damaged machine",
        "stores/records.py",
        "    except (ValueError, IndexError):\n        raise Unreadable(line) from None\n",
        "    finally:\n        pass\n",
        unit("test_etcd_store.py::test_a_journal_of_a_newer_idemp_is_not_read_on[True-Z key 7]"),
    ),
    # ---------------------------------------------------------------- stores/postgresql.py
    Mutant(
        "a claim that waited while keys went draws its token anew",
        "stores/postgresql.py",
        "        outrun = batch.claims and head.mark != mark\n",
        "        outrun = False\n",
        unit("test_postgresql_store.py::test_a_claim_that_waited_has_the_highest_token[forget_done]"),
    ),
    Mutant(
        "what a transaction forgot is not remembered here",
        "stores/postgresql_inbox.py",
        "            if self._ledger.forgotten:\n                recall.forget_all()\n",
        "            if False:\n                pass\n",
        unit("test_recall.py::test_what_this_process_forgot_in_a_transaction[False]"),
    ),
    Mutant(
        "a transaction whose commit is not known may have forgotten",
        "stores/postgresql.py",
        "            self._recall.lose()  # for the same reasons as after a batch\n",
        "",
        unit("test_recall.py::test_what_this_process_forgot_in_a_transaction[True]"),
    ),
    Mutant(
        "a claim that is given back leaves a mark",
        "stores/postgresql_batch.py",
        "    if ledger.forgotten or left - loaded.empty:\n",
        "    if ledger.forgotten:\n",
        unit("test_postgresql_store.py::test_a_claim_that_waited_has_the_highest_token[give_back]"),
    ),
    Mutant(
        "what is swept leaves a mark",
        "stores/postgresql_sql.py",
        "WHERE EXISTS (SELECT FROM gone)",
        "WHERE false",
        unit("test_postgresql_store.py::test_a_claim_that_waited_has_the_highest_token[be_swept]"),
    ),
    # ---------------------------------------------------------------- stores/recall.py
    Mutant(
        "a memory for which nobody vouches answers nothing",
        "stores/recall.py",
        "if not self._follows or now >= self._until:",
        "if not self._follows:",
        unit("test_recall.py::test_it_answers_while_somebody_vouches"),
    ),
    Mutant(
        "a memory that hears nothing answers nothing",
        "stores/recall.py",
        "            self._follows = self._timed = False\n            self._clear()\n",
        "",
        unit("test_recall.py::test_it_answers_while_somebody_vouches"),
    ),
    Mutant(
        "a reply that the news overtook teaches nothing",
        "stores/recall.py",
        "if era == self._era and self._follows",
        "if self._follows",
        unit("test_recall.py::test_a_reply_that_the_news_overtook_teaches_nothing"),
    ),
    Mutant(
        "a done that i forgot is not heard of again",
        "stores/recall.py",
        "if key in self._gone and self._gone[key][0] >= done.token:",
        "if False:",
        unit("test_recall.py::test_a_done_that_i_forgot_is_not_heard_of_again"),
    ),
    Mutant(
        "an older forget does not take away what was done since",
        "stores/recall.py",
        "if found is not None and found.token <= token:",
        "if found is not None:",
        unit("test_recall.py::test_a_done_that_i_forgot_is_not_heard_of_again"),
    ),
    Mutant(
        "a longer retention brings back nothing that was over under the shorter one",
        "stores/recall.py",
        "                self._clear()\n                self._since = now\n",
        "                self._since = now\n",
        unit("test_recall.py::test_a_longer_retention_brings_nothing_back"),
    ),
    Mutant(
        "what was done under a shorter retention is not kept",
        "stores/recall.py",
        "if kept > LARGE or done.at < self._since:",
        "if kept > LARGE:",
        unit("test_recall.py::test_a_longer_retention_brings_nothing_back"),
    ),
    Mutant(
        "nothing is learned from a server whose clock is not known",
        "stores/recall.py",
        "and self._follows and self._timed:",
        "and self._follows and self._retention:",
        unit("test_recall.py::test_another_server_has_another_clock"),
    ),
    Mutant(
        "what i forgot outlasts the line on which it is to be heard",
        "stores/recall.py",
        "            self._clear()\n            self._era += 1\n            self._follows, self._until",
        "            self._clear()\n            self._gone = {}\n            self._era += 1\n"
        "            self._follows, self._until",
        unit("test_recall.py::test_a_done_that_i_forgot_is_not_learned_on_a_line_that_is_new"),
    ),
    Mutant(
        "what goes before the retention is over is not kept",
        "stores/recall.py",
        "            self._since = max(self._since, since)\n",
        "",
        unit("test_recall.py::test_what_was_done_before_the_retention_was_raised"),
    ),
    Mutant(
        "who vouches says what time it is there",
        "stores/recall.py",
        "            if self._timed:\n                self._tell_time(now - asked)\n",
        "",
        unit("test_recall.py::test_a_servers_clock_is_put_forward_and_back"),
    ),
    Mutant(
        "what was over by the server's clock does not come back with it",
        "stores/recall.py",
        "if self._timed and ahead < self._ahead - TRUST:",
        "if False:",
        unit("test_recall.py::test_a_servers_clock_is_put_forward_and_back"),
    ),
    Mutant(
        "memory forgets when the server does",
        "stores/recall.py",
        "if at + self._retention <= now + self._ahead:",
        "if False:",
        unit("test_recall.py::test_it_forgets_when_the_server_does"),
    ),
    Mutant(
        "its size is bounded",
        "stores/recall.py",
        "sum(self._weights) > self._room * (1 - 1 / _SLICES)",
        "False",
        unit("test_recall.py::test_its_size_is_bounded"),
    ),
    Mutant(
        "who became a replica is not spoken for",
        "stores/redis.py",
        "            self._client.connection_pool.disconnect(inuse_connections=False)\n"
        "            self._recall.lose()\n            raise\n",
        "            raise\n",
        unit("test_recall.py::test_a_server_that_became_a_replica_is_left"),
    ),
    Mutant(
        "a server that names itself anew is met with new connections",
        "stores/redis.py",
        "        self._client.connection_pool.disconnect(inuse_connections=False)\n        with suppress",
        "        with suppress",
        unit("test_recall.py::test_a_first_replica_comes"),
    ),
    Mutant(
        "nothing is recalled when the fate of a batch is not known, nor who will answer the next",
        "stores/postgresql.py",
        "            self._recall.lose()\n            if isinstance(failed",
        "            if isinstance(failed",
        unit("test_recall.py::test_what_this_process_forgot_in_a_commit_whose_reply_was_lost"),
    ),
    # ---------------------------------------------------------------- deeds.py, resolve.py
    Mutant(
        "what was sent back is not called done from memory",
        "pipeline.py",
        "too_old, sent_back=sent_back)",
        "too_old, sent_back=False)",
        unit("test_pipeline.py::test_a_message_that_was_sent_back_is_looked_up_anew"),
    ),
    Mutant(
        "nor from what this process remembers",
        "pipeline.py",
        "if first is None and route.policy is not None and not _must_ask(flight):",
        "if first is None and route.policy is not None:",
        unit("test_pipeline.py::test_what_memory_knows_to_be_done_is_acknowledged_without_asking"),
    ),
    Mutant(
        "a transaction that comes again is counted, whatever is known here",
        "pipeline.py",
        "    return _sent_back(delivery) or (delivery.redelivered and flight.policy.transaction)\n",
        "    return _sent_back(delivery)\n",
        unit("test_pipeline.py::test_a_transaction_that_comes_again_is_looked_up_to_be_counted"),
    ),
    Mutant(
        "an interrupted leader hands the lead over",
        "stores/group.py",
        "            self._hand_over()\n            raise\n        if self._stop",
        "            raise\n        if self._stop",
        unit("test_group.py::test_an_interrupted_leader_leaves_the_lead"),
    ),
    Mutant(
        "who wakes, wakes the next",
        "stores/group.py",
        "            self._wake_next(slot.served)\n        except",
        "        except",
        unit("test_group.py::test_one_who_is_awake_wakes_the_next_before_anything_else"),
    ),
    Mutant(
        "who is woken late wakes all others",
        "stores/group.py",
        "asleep.wake(len(asleep.slots) if late else 1)",
        "asleep.wake(1)",
        unit("test_group.py::test_one_who_was_late_wakes_all_others"),
    ),
    Mutant(
        "an interrupted caller leaves nobody asleep",
        "stores/group.py",
        "        if slot.served is not None:\n            slot.served.wake(len(slot.served.slots))\n",
        "",
        unit("test_group.py::test_ctrl_c_in_one_who_is_about_to_be_woken_wakes_the_others"),
    ),
    Mutant(
        "a caller that left is passed over",
        "stores/group.py",
        " and not slot.left],",
        "],",
        unit("test_group.py::test_ctrl_c_while_the_commit_is_under_way_lets_nobody_sleep"),
    ),
    Mutant(
        "a caller that left the queue is not committed for",
        "stores/group.py",
        "            if waiting:\n                self._waiting.remove(slot)\n            handed",
        "            handed",
        unit("test_group.py::test_ctrl_c_while_queued_leaves_the_others_their_commit"),
    ),
    Mutant(
        "an interrupt is only its own thread's",
        "stores/group.py",
        " if slot is mine or isinstance(error, Exception) else _interrupted()",
        "",
        unit("test_group.py::test_ctrl_c_in_the_one_who_commits_is_its_own"),
    ),
    Mutant(
        "a failed commit answers all",
        "stores/group.py",
        "                slot.error = error if slot is mine",
        "                mine.error = error if slot is mine",
        unit("test_group.py::test_an_append_that_fails_wakes_everybody"),
    ),
    Mutant(
        "who leads waits while they keep coming",
        "stores/group.py",
        "            if there == before or self._clock() >= end:\n                return False",
        "            return False",
        unit("test_group.py::test_who_leads_waits_as_long_as_they_keep_coming"),
    ),
    Mutant(
        "who waits in vain waits more seldom",
        "stores/group.py",
        "self._alone = self._in_vain = min(ALONE, 2 * self._in_vain or 1)",
        "self._alone = 1",
        unit("test_group.py::test_one_who_does_not_come_back_is_waited_for_ever_more_seldom"),
    ),
    Mutant(
        "who was worth the wait is waited for again",
        "stores/group.py",
        "                self._in_vain = 0\n",
        "",
        unit("test_group.py::test_who_was_waited_for_and_came_is_waited_for_again"),
    ),
    Mutant(
        "a memory that is not trusted recalls nothing",
        "stores/etcd.py",
        "        if not replica.trusted:\n            return None\n",
        "",
        unit("test_etcd_store.py::test_what_any_replica_did_is_recalled_without_asking_etcd"),
    ),
    Mutant(
        "a key that is held is asked for once more whether it is done",
        "stores/postgresql_batch.py",
        "        if known or many < len(quick.claims):",
        "        if many < len(quick.claims):",
        unit("test_postgresql_store.py::test_a_key_that_is_done_while_it_is_claimed"),
    ),
    Mutant(
        "a batch of which not all went the short way goes the long way as a whole",
        "stores/postgresql_batch.py",
        "        if many < len(quick.ends):\n            return None\n",
        "",
        unit("test_postgresql_store.py::test_what_cannot_go_the_short_way_leaves_no_trace"),
    ),
    Mutant(
        "what is known of the file ends when another writes",
        "stores/sqlite.py",
        "if (version := _version(db)) != self._known.version:",
        "if (version := _version(db)) and self._known.version < 0:",
        unit("test_sqlite_store.py::test_what_another_process_wrote_is_seen"),
    ),
    Mutant(
        "what is recalled is looked at after the message came",
        "stores/sqlite.py",
        "if not (seen == stamp and asked >= since) and",
        "if not seen == stamp and",
        unit("test_sqlite_store.py::test_one_look_serves_what_came_before_it"),
    ),
    Mutant(
        "a look that another's commit came before vouches for nothing",
        "stores/sqlite.py",
        "if _version(self._writer) == self._known.version:",
        "if self._known.version:",
        unit("test_sqlite_store.py::test_another_writes_between_a_commit_and_the_look_behind_it"),
    ),
    Mutant(
        "what was done is completed though its caller was cancelled before it was sent",
        "offloop.py",
        "            _tell(loop, store, [op])\n",
        "            pass\n",
        unit("test_offloop.py::test_what_waits_to_be_completed_is_when_its_loop_ends"),
    ),
    Mutant(
        "what a loop's tasks ask after an answer goes along with the next batch",
        "offloop.py",
        "    loop.call_soon(_carry, loop, store, gathered)\n\n\ndef _fail",
        "    _carry(loop, store, gathered)\n\n\ndef _fail",
        unit("test_offloop.py::test_the_tasks_of_a_loop_go_together"),
    ),
    Mutant(
        "a store is opened by who asks it, not by who asks what is remembered",
        "stores/door.py",
        "session = self._session\n        if session is not None:\n            return session.recall",
        "session = self._mine()\n        if session is not None:\n            return session.recall",
        unit("test_door.py::test_what_is_remembered_opens_no_session"),
    ),
    Mutant(
        "what was read while another wrote is not kept",
        "stores/sqlite.py",
        "        else:\n            self._known = Known(version)\n        return entry\n",
        "        self._known = Known(version)\n        self._known.keep(key, entry)\n        return entry\n",
        unit("test_sqlite_store.py::test_another_writes_while_the_file_is_asked"),
    ),
    Mutant(
        "a new connection knows nothing of the file",
        "stores/sqlite.py",
        "        self._known = Known()\n        try:\n",
        "        try:\n",
        unit("test_sqlite_store.py::test_a_new_connection_knows_nothing"),
    ),
    Mutant(
        "an import that takes long comes before the lease",
        "stores/etcd.py",
        "                self._import(clock.steady() + PATIENCE)\n                self._begin_session()\n",
        "                self._begin_session()\n                self._import(clock.steady() + PATIENCE)\n",
        unit("test_etcd_store.py::test_an_import_may_outlast_a_session"),
    ),
    Mutant(
        "what is kept ready goes when a key is forgotten",
        "stores/journal.py",
        "            case Forget():\n                self.hot.clear()\n",
        "            case Forget():\n",
        unit("test_journal.py::test_what_was_asked_for_is_ready_until_it_is_forgotten"),
    ),
    Mutant(
        "nor because another one was",
        "pipeline.py",
        "if done and duplicate.fingerprint is None and not _must_ask(duplicate):",
        "if done and duplicate.fingerprint is None:",
        unit("test_pipeline.py::test_a_message_that_was_sent_back_is_looked_up_anew"),
    ),
    Mutant(
        "a change is durable together with its deed",
        "deeds.py",
        "written, *replies = self._store.apply([deed, *(change.op for change in changes)])",
        "replies = self._store.apply([change.op for change in changes])\n"
        "        [written] = self._store.apply([deed])",
        unit("test_deeds.py::test_a_lost_reply_leaves_both_or_neither"),
    ),
    Mutant(
        "a deed names only what changed",
        "deeds.py",
        "if isinstance(written, Lost) or len(made) < len(changes):",
        "if isinstance(written, Lost):",
        unit("test_deeds.py::test_forget_comes_second"),
    ),
    Mutant(
        "a deed that was taken away is written again",
        "deeds.py",
        "if isinstance(written, Lost) or len(made) < len(changes):",
        "if len(made) < len(changes):",
        unit("test_deeds.py::test_a_deed_that_was_taken_away_is_written_again"),
    ),
    Mutant(
        "a dead letter is taken out when its copy is safe",
        "resolve.py",
        "            prepare(chosen)\n",
        "            prepare(chosen)\n            transport.ack([letter.tag for letter in chosen])\n",
        unit("test_resolve.py::test_a_crash_before_the_acknowledgement_leaves_a_duplicate"),
    ),
    # ---------------------------------------------------------------- the event log
    Mutant(
        "a note counts once, whatever was told of its message before",
        "eventlogs/sql.py",
        "before, after = pairs(known[uuid]), pairs(known[uuid] + new)",
        "before, after = {}, pairs(known[uuid] + new)",
        unit("test_tracking_logs.py::test_u9_notes_in_any_order"),
    ),
    Mutant(
        "an event log of the first layout has its notes counted",
        "eventlogs/sql.py",
        "            self._count_notes(execute)\n",
        "            pass\n",
        unit("test_tracking_logs.py::test_a_log_of_the_first_layout_is_renewed_once"),
    ),
    Mutant(
        "who records notes in PostgreSQL is alone",
        "eventlogs/postgresql.py",
        """execute(f"SELECT pg_advisory_xact_lock({_NOTING})", ())""",
        "pass",
        unit("test_tracking_logs.py::test_u9_notes_of_many_who_tell_at_once"),
    ),
    Mutant(
        "what is bound once is the same in all",
        "eventlogs/sqlite.py",
        "each.count(each[0]) == len(each) for",
        "each[0] == each[-1] for",
        unit("test_tracking_logs.py::test_u8_what_is_appended_is_found"),
    ),
    Mutant(
        "properties are left out only where the event has them all",
        "tracking/tracker.py",
        "        and properties.correlation_id is None\n",
        "",
        unit("test_tracking.py::test_properties_that_an_event_tells_by_itself"),
    ),
    # ---------------------------------------------------------------- the outbox, URLs
    Mutant(
        "letters that no queue takes hold nobody up",
        "relay.py",
        "            self._after = letters[-1].number\n",
        "            return 0\n",
        unit("test_outbox.py::test_letters_that_no_queue_takes_hold_nobody_up"),
    ),
    Mutant(
        "nothing overtakes what no queue takes of the same key",
        "relay.py",
        "if letter.key not in self._stuck:",
        "if True:",
        unit("test_outbox.py::test_letters_that_no_queue_takes_hold_nobody_up"),
    ),
    Mutant(
        "a password that nobody escaped is not shown",
        "settings.py",
        """return _PASSWORD.sub(r"\\1:***@", url)""",
        """return re.sub("//([^:/]*):[^@/]*@", r"//\\1:***@", url)""",
        unit("test_cli.py::test_what_is_wrong_is_one_sentence"),
    ),
    Mutant(
        "what the server lacks is no attempt of a handler",
        "stores/postgresql.py",
        "            if not committing and outside(error, begun=begun):\n                return failed\n",
        "",
        unit("test_inbox_consumer.py::test_a_database_that_lets_nothing_through_is_waited_for"),
    ),
)
