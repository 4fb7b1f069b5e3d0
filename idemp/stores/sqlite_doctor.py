"""What `idemp doctor` asks an SQLite file, of a store or of a broker.  It is opened to read only."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from idemp.embedded import MEMORY, NETWORK, mount_of
from idemp.errors import ConfigError
from idemp.findings import Finding, Looked
from idemp.stores.sqlite import LAYOUT, layout_of

WAL = 64 * 1024 * 1024
"""Bytes in the log beside the file that are worth a word: a checkpoint comes every few MiB."""
CHECKED = 512 * 1024 * 1024
"""Bytes of a file that is read through."""
ROOM = 0.05
"""Of the disk, that should be free; a store needs room for its log, too."""


def examine(path: str, mountinfo: str | None = None) -> Looked:
    """Look at the file ``path``.  Raises `ConfigError` if it is none, or no SQLite file."""
    if not Path(path).exists():
        raise ConfigError(f"there is no file {path}; name the one that the service uses")
    found = [*_place(path, _mounts() if mountinfo is None else mountinfo), *_room(path)]
    try:
        with closing(sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode=ro", uri=True)) as db:
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            found += [*_settings(path, db), *_layout(path, db)]
            return Looked(found, _retention(db))
    except sqlite3.OperationalError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"{path} is no SQLite file ({error}); name another file") from None


def _mounts() -> str:
    try:
        return Path("/proc/self/mountinfo").read_text(errors="replace")
    except OSError:
        return ""  # not Linux


def _place(path: str, mountinfo: str) -> list[Finding]:
    mount = mount_of(os.path.realpath(path), mountinfo)
    if mount is None:
        return []
    evidence = f"{mount.kind} at {mount.place}"
    if mount.kind in NETWORK:
        what = "the file lies on a network file system, where SQLite's log does not work"
        return [Finding(path, what, evidence, "put it on a local disk, or use etcd and RabbitMQ")]
    if mount.kind in MEMORY:
        what = "the file lies in memory: a power loss forgets what it holds"
        return [Finding(path, what, evidence, "put it on a disk")]
    return []


def _room(path: str) -> list[Finding]:
    found = []
    wal = Path(f"{path}-wal")
    if wal.exists() and (size := wal.stat().st_size) > WAL:
        what = "its log is not folded into the file: a reader holds an old state, or a process hangs"
        fix = f"end what `fuser {path}` names and does not belong there; the next start folds it in"
        found.append(Finding(path, what, f"{wal.name} has {size / 1024**2:.0f} MiB", fix))
    disk = shutil.disk_usage(Path(path).resolve().parent)
    if disk.free < max(ROOM * disk.total, WAL):
        evidence = f"{disk.free / 1024**2:.0f} of {disk.total / 1024**2:.0f} MiB are free"
        found.append(Finding(path, "its disk is nearly full", evidence, "make room, or move the file"))
    return found


def _settings(path: str, db: sqlite3.Connection) -> list[Finding]:
    found = []
    mode = db.execute("PRAGMA journal_mode").fetchone()[0]
    if mode != "wal":
        what = "the file is not in WAL mode, which its processes need to share it"
        fix = f"sqlite3 {path} 'PRAGMA journal_mode=WAL', and see who changed it"
        found.append(Finding(path, what, f"journal_mode={mode}", fix))
    if Path(path).stat().st_size <= CHECKED:
        said = str(db.execute("PRAGMA quick_check(1)").fetchone()[0])
        if said != "ok":
            what = "the file is damaged"
            fix = f"stop every process that uses it; `sqlite3 {path} .recover` into a new file"
            found.append(Finding(path, what, " ".join(said.split()), fix))
    return found


def _layout(path: str, db: sqlite3.Connection) -> list[Finding]:
    if (layout := layout_of(db)) <= LAYOUT:
        return []
    what, seen = "it is of a newer idemp", f"layout {layout}, and this idemp has {LAYOUT}"
    return [Finding(path, what, seen, "upgrade idemp here")]


def _retention(db: sqlite3.Connection) -> float | None:
    """Of a store; None for a broker's file."""
    try:
        row = db.execute("SELECT value FROM idemp_meta WHERE name = 'retention'").fetchone()
    except sqlite3.OperationalError:
        return None
    return None if row is None else float(row[0])
