"""The keeper: a small process between a test run and one server, so that no server outlives its run.

    keeper.py PARENT FOLDER COMMANDS

COMMANDS is a JSON list of argument lists; the last is the server, the others its helpers.
SIGTERM stops the server in its own good order, SIGINT kills it; the helpers go with it.
When PARENT is gone, however it ended, the keeper kills them all and removes FOLDER, if one is named.

It asks for its parent again and again because nothing else is sure: a pipe to the parent stays open in
whatever the parent forked, and Linux's PR_SET_PDEATHSIG already fires when the starting thread ends.
Standard library only, and started with -I -S: it is there in a few milliseconds.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time


def keep(parent: int, folder: str, commands: list[list[str]]) -> None:
    wishes: list[int] = []
    for wish in (signal.SIGTERM, signal.SIGINT):
        signal.signal(wish, lambda number, _: wishes.append(number))
    children: list[subprocess.Popen[bytes]] = []
    try:
        children.extend(subprocess.Popen(command, stdin=subprocess.DEVNULL) for command in commands)
        server = children[-1]
        while server.poll() is None and os.getppid() == parent and signal.SIGINT not in wishes:
            if signal.SIGTERM in wishes:
                wishes.remove(signal.SIGTERM)
                server.terminate()
            time.sleep(0.02)
    finally:  # also when one of them cannot be started
        for child in reversed(children):
            child.kill()
            child.wait()
    if os.getppid() != parent and folder:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    keep(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
