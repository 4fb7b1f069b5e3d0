"""What SQLite does not notice of a file that it holds open: a fork of the process, another file of that name.

SQLite keeps in memory which locks the process has on a file.  A child inherits that and takes it for
true, so what it opens has no lock of its own: its log is deleted under it, and what it confirmed is lost.
Which files those are is asked when the child begins, of the system: also of those that others opened.
"""

from __future__ import annotations

import ctypes
import os
import stat
import weakref
from collections.abc import Iterable, Iterator

from idemp.errors import ConfigError

_MOST = 65536
"""Descriptors that are looked at where the system does not list them."""

_File = tuple[int, int]  # device and inode

_inherited: set[_File] = set()
_owners: weakref.WeakSet[object] = weakref.WeakSet()


class Held:
    """The file ``path``, which ``owner`` is about to open.

    Raises `ConfigError` if it was open when this process was forked.
    """

    def __init__(self, path: str, owner: object) -> None:
        self.lost = False
        self._shown, self._path = path, os.path.abspath(path)  # the process may go elsewhere
        self._pid = os.getpid()
        self._file = _file(self._path)
        if self._file in _inherited:
            raise self._forked()
        _owners.add(owner)

    def opened(self) -> None:
        """It is there now: this is the one to look for."""
        self._file = self._file or _file(self._path)

    def mine(self) -> bool:
        """Whether this process opened it; if not, it must not even be closed."""
        return self._pid == os.getpid()

    def check_mine(self) -> None:
        """Raise `ConfigError` if another process opened it."""
        if not self.mine():
            raise self._forked()

    def same(self) -> bool:
        """Whether it is still what has its name; once it was not, never again."""
        if not self.lost and (self._file is None or _file(self._path) != self._file):
            self.lost = True
        return not self.lost

    def check_same(self) -> None:
        """Raise `ConfigError` if it was deleted or replaced."""
        if not self.same():
            raise ConfigError(self.gone())

    def gone(self) -> str:
        """What to say when it is not the same."""
        return (
            f"{self._shown} was deleted or replaced under this process, so that others do not see what it"
            " does: stop every process that uses it, put the right file in its place, and start again"
        )

    def _forked(self) -> ConfigError:
        return ConfigError(
            f"{self._shown} was open when this process was forked, which SQLite does not survive: close it"
            " before the fork, use it only after, or start processes with multiprocessing's spawn"
        )


def _file(path: str) -> _File | None:
    """What has this name; None if nothing has."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _descriptors() -> Iterable[int]:
    try:
        return [int(number) for number in os.listdir("/proc/self/fd")]
    except OSError:  # not Linux
        return range(min(os.sysconf("SC_OPEN_MAX"), _MOST))


def _open_files() -> Iterator[_File]:
    for number in _descriptors():
        try:
            found = os.fstat(number)
        except OSError:  # it is not open
            continue
        if stat.S_ISREG(found.st_mode):
            yield found.st_dev, found.st_ino


def _in_child() -> None:
    _inherited.update(_open_files())
    for owner in list(_owners):
        # For ever: at the end of the child Python would close its connections, and so delete others' logs.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


os.register_at_fork(after_in_child=_in_child)
