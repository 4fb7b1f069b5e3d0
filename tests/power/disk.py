"""A disk of one's own whose power can be cut, and a room for it that the kernel tidies up."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_TOOLS = ("setpriv", "unshare", "mount", "umount", "mkfs.ext4", "sync")
_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_NO_LOG_FLUSH = struct.pack("I", 2)
# Nothing reaches the disk by itself within a run, only what somebody asks for.
_LAZY = "loop,commit=900,noauto_da_alloc"


def isolated(command: Sequence[str]) -> list[str]:
    """``command`` with mounts and processes of its own, which end with it, and it with its caller.

    However it ends: of both the kernel takes care.  When the first process of such a room is gone, it
    kills the others, unmounts what only they saw, and lets go of the loop devices below.
    """
    tied = ["setpriv", "--pdeathsig", "KILL"]
    room = ["unshare", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return [*tied, *room, *command]


def why_not() -> str:
    """Why no disk can be made here; "" if it can."""
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return (
            f"there is no {missing[0]} on this machine: Debian and Ubuntu have it in util-linux or e2fsprogs"
        )
    if os.geteuid() != 0:
        return "only root may mount: run it as root"
    tried = subprocess.run(isolated([sys.executable, "-m", __name__]), capture_output=True, text=True)
    said = tried.stderr.strip().splitlines() or ["it ended without a word"]
    return f"no disk can be made here: {said[-1]}" if tried.returncode else ""


class Disk:
    """An ext4 file system at ``place``, in a file in memory.  For a process that is `isolated`."""

    def __init__(self, megabytes: int = 512) -> None:
        room = _empty_folder()
        _run("mount", "-t", "tmpfs", "-o", "size=75%", "tmpfs", str(room))
        self.room = room
        """A folder that is not on the disk: what is noted there is beyond the cut."""
        self.place = room / "disk"
        self._image = room / "image"
        self.place.mkdir()
        with self._image.open("wb") as image:
            image.truncate(megabytes << 20)
        _run("mkfs.ext4", "-q", "-F", "-E", "nodiscard", str(self._image))
        self._mount()

    def _mount(self) -> None:
        _run("mount", "-o", _LAZY, str(self._image), str(self.place))

    def flush(self) -> None:
        """What is on it is old, and would be there after any cut."""
        _run("sync", "-f", str(self.place))

    def cut(self) -> None:
        """From this moment on nothing more gets there, not even what is on its way.

        So ext4's own tests cut it.  It is sharper than to kill the writers first: a call that flushes
        would come to its end before its process does.
        """
        place = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.ioctl(place, _SHUTDOWN, _NO_LOG_FLUSH)
        finally:
            os.close(place)

    def restore(self) -> None:
        """Power again: the file system reads its journal.  Nobody may be using it."""
        end = time.monotonic() + 10
        while subprocess.run(["umount", str(self.place)], capture_output=True).returncode:
            if time.monotonic() > end:
                raise RuntimeError("somebody holds on to the disk whose power was cut")
            time.sleep(0.02)
        self._mount()


def _empty_folder() -> Path:
    """One to mount over, below which nothing is that we run on."""
    needed = {Path(__file__).resolve(), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    for name in ("/mnt", "/media", "/srv"):
        folder = Path(name)
        if folder.is_dir() and not any(folder in path.parents for path in needed):
            return folder
    raise RuntimeError("there is none of /mnt, /media and /srv to mount over")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


if __name__ == "__main__":
    try:
        Disk()
    except (RuntimeError, OSError) as error:
        sys.exit(str(error))
