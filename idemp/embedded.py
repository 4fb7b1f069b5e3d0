"""What an SQLite file needs so that a store or a broker in it can keep its word: a disk, WAL, and FULL."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from tempfile import gettempdir
from typing import Any, NamedTuple
from urllib.parse import quote

from idemp.errors import ConfigError, StoreUnavailable

log = logging.getLogger(__name__)

NETWORK = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "glusterfs", "davfs", "ncpfs"),
    *("gfs2", "ocfs2", "beegfs", "orangefs", "gpfs"),
    *("fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.rclone", "fuse.s3fs", "fuse.gcsfuse", "fuse.davfs2"),
}
"""Those of other machines: their files are mapped into memory by each machine for itself."""
MEMORY = {"tmpfs", "ramfs"}
FULL = 2
"""Of ``synchronous``; EXTRA is 3."""


class Mount(NamedTuple):
    """A file system of ``kind``, seen at ``place``."""

    place: str
    kind: str


def mount_of(path: str, mountinfo: str) -> Mount | None:
    """Where the absolute ``path`` lies, by the text of /proc/self/mountinfo; None if that does not tell."""
    above = {path, *map(str, PurePosixPath(path).parents)}
    found = [mount for line in mountinfo.splitlines() if (mount := _mount(line)) and mount.place in above]
    # The deepest; of several at one place the last, which hides the others.
    return max(reversed(found), key=lambda mount: len(mount.place), default=None)


def _mount(line: str) -> Mount | None:
    """A line reads: 36 35 98:0 /root /place rw,noatime shared:1 - ext4 /dev/sda1 rw."""
    before, _, after = line.partition(" - ")
    if len(fields := before.split(" ")) < 5 or not after:
        return None
    place = re.sub(r"\\([0-7]{3})", lambda escape: chr(int(escape[1], 8)), fields[4])
    return Mount(place, after.split(" ")[0])


def check_place(path: str) -> None:
    """WAL needs memory that all processes of the file share, and a disk that keeps what it was given."""
    try:
        mountinfo = Path("/proc/self/mountinfo").read_text(errors="replace")
    except OSError:
        return  # not Linux
    place = os.path.realpath(path)
    mount = mount_of(place, mountinfo)
    if mount is not None and mount.kind in NETWORK:
        raise ConfigError(
            f"{path} lies on a network file system ({mount.kind} at {mount.place}), where SQLite's WAL does"
            " not work; put it on a local disk, or use etcd or RabbitMQ"
        )
    # Who puts it among the temporary files, as tests and demos do, means it to go.
    temporary = Path(place).is_relative_to(os.path.realpath(gettempdir()))
    if mount is not None and mount.kind in MEMORY and not temporary:
        log.warning(
            "%s lies in memory (%s at %s): a power loss forgets what it holds; put it on a disk",
            path,
            mount.kind,
            mount.place,
        )


def check_durable(path: str, execute: Callable[[str], Any]) -> None:
    """A PRAGMA that SQLite does not follow is no error: what it made of WAL and FULL is read back."""
    mode = execute("PRAGMA journal_mode").fetchone()[0]
    if mode != "wal":
        raise ConfigError(
            f"{path}: SQLite has journal_mode={mode} although WAL was asked for, which processes"
            " need to share the file; name a plain file on a local disk"
        )
    synchronous = execute("PRAGMA synchronous").fetchone()[0]
    if synchronous < FULL:
        raise ConfigError(
            f"{path}: SQLite has synchronous={synchronous} although FULL ({FULL}) was asked for,"
            " so that a power loss would undo what was told; use a build of SQLite that lets it be set"
        )


def look(path: str, question: Callable[[sqlite3.Connection], bool]) -> bool:
    """The answer of the file ``path``, which is neither made nor changed; false if there is none.

    True also where it cannot be read: who opens it says why.
    """
    if not Path(path).exists():
        return False
    try:
        # To read and write: who may only read leaves WAL's two files behind.
        with closing(sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode=rw", uri=True)) as db:
            return question(db)
    except sqlite3.Error:
        return True


def alone(path: str, who: str, what: str) -> int:
    """The file is mine until this is closed, or the process gone.  Raises `ConfigError` if it is another's.

    who, what: how another is called, and the file, as in "another auditor is using" and "state".
    """
    try:
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"{path}.lock cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ConfigError(f"{who} {path}; stop it, or name another file as {what}") from None
    return lock


@contextmanager
def explained(path: str) -> Iterator[None]:
    """What SQLite raises inside, in one sentence: `ConfigError` if ``path`` is none of its files."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if "not a database" in str(error):
            raise ConfigError(f"{path} is no SQLite file; name another one") from None
        raise StoreUnavailable(f"{path}: {error}") from None
