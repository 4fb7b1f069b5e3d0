"""A consumer process for the crash tests: `python -m tests.replica SERVICE TRANSPORT STORE FOLDER [POLICY]`.

Every effect is one line in FOLDER/ledger, written with one append: "effect <id> <attempt> <token> <pid>".
While FOLDER/trap exists, one replica renames it to trap.<pid> and stays there for good: before the
effect if the trap's text is "before", after it if it is "after".  Its claim is open then.
At its end it adds up its outcomes in FOLDER/counts.<pid>.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from idemp import Consumer, Message, context, idempotent, open_store, open_transport


class Counts:
    """A meter that only adds up."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def count(self, name: str, n: int = 1) -> None:
        self.counts[name] += n

    def time(self, name: str, seconds: float) -> None:
        """Not of interest here."""

    def level(self, name: str, value: float) -> None:
        """Not of interest here."""

    def close(self) -> None:
        """Nothing to send."""


def main(service: str, transport: str, store_url: str, where: str, in_doubt: Any = "retry") -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    folder, me, meter = Path(where), os.getpid(), Counts()
    ledger = os.open(folder / "ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    store = open_store(store_url)
    consumer = Consumer(open_transport(transport), service=service, meter=meter, prefetch=200, backoff=0.2)

    def trapped(moment: str) -> None:
        trap, mine = folder / "trap", folder / f"trap.{me}"
        if not trap.exists() or trap.read_text() != moment:
            return
        try:
            trap.rename(mine)
        except FileNotFoundError:
            return
        mine.write_text(context().key)
        while mine.exists():
            time.sleep(0.01)

    @consumer.on("new_order")
    # Ten kills may all meet the same message; every other one is in doubt twice at most.
    @idempotent(store, name=f"{service}.new_order", in_doubt=in_doubt, attempts=12)
    def new_order(message: Message) -> None:
        trapped("before")
        line = f"effect {message.id} {context().attempt} {context().fencing_token} {me}\n"
        os.write(ledger, line.encode())
        trapped("after")
        if message.args.get("fails", 0) >= context().attempt:
            raise ValueError("as told")

    consumer.run(ready=lambda: (folder / f"ready.{me}").touch())
    store.close()
    (folder / f"counts.{me}").write_text(json.dumps(meter.counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
