"""Done keys in little memory: some 30 bytes each, whatever they are called and however many they are.

A table of cells, each a run of records of 24 bytes: a hash of the key (96 bits, another one in every
process), the token of its claim, and its place: the number of the append where it was done.  It grows by
linear hashing (W. Litwin, "Linear hashing", VLDB 1980): every so often one cell is split in two, so
nothing ever stops to move everything.

Places only grow, so the oldest records of a cell stand first in it.  To drop a bucket of time is to
move a floor; what lies below it is not found any more, and is cut off when its cell is next written to.

What few keys have is kept beside it: a result that is not null, a fingerprint, a second attempt.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from typing import NamedTuple

PLACES = 1 << 32
"""How many places there are."""
_HASH = struct.Struct("<q").pack
_RECORD = struct.Struct("<qIQI").pack
_REST = struct.Struct("<IQI").unpack_from
_HASHES = struct.Struct("<q16x")
_SIZE = 24
_MEAN = 12
"""Records in a cell: enough that its own 50 bytes are little, few enough to be searched quickly."""
_MORE = 0xFFFF_FFFF
_PLAIN = (b"null", None, 1)


class Record(NamedTuple):
    """What is known of a done key.  ``place``: the number of the append where it was done."""

    token: int
    place: int
    result: bytes | None
    fingerprint: bytes | None
    attempt: int


class Seen:
    """The done keys of the buckets of time that count.  Places (below `PLACES`) and buckets only grow."""

    def __init__(self, bucket: int = 0) -> None:
        self._cells: list[bytes] = [b""]
        self._mask = 0  # the number of cells, a power of two, when this round of splitting began; less 1
        self._split = 0  # the next cell to split: those before it are split already
        self._room = _MEAN  # records until then
        self._buckets: list[int] = [bucket]
        self._starts: list[int] = [0]  # the first place of each
        self._counts: list[int] = [0]  # how many keys each holds
        # token -> result, fingerprint and attempt of what is not plain
        self._kept: list[dict[int, tuple[bytes | None, bytes | None, int]]] = [{}]

    def __len__(self) -> int:
        return sum(self._counts)

    # ---------------------------------------------------------------- buckets

    def begin(self, bucket: int, place: int) -> None:
        """What is done from ``place`` on belongs to ``bucket``."""
        if bucket == self._buckets[-1]:
            return
        self._buckets.append(bucket)
        self._starts.append(place)
        self._counts.append(0)
        self._kept.append({})

    def drop_before(self, bucket: int) -> None:
        """Forget what was done before ``bucket`` began."""
        over = bisect_right(self._buckets, bucket - 1)
        for of_each in (self._buckets, self._starts, self._counts, self._kept):
            del of_each[:over]

    def start(self) -> int:
        """The first place that counts."""
        return self._starts[0]

    # ---------------------------------------------------------------- keys

    def add(
        self, key: str, token: int, place: int, result: bytes | None, fingerprint: bytes | None, attempt: int
    ) -> None:
        """``key``, which is not here, was done at ``place``."""
        first = hash(key)
        number = first & self._mask
        if number < self._split:
            number = first & (2 * self._mask + 1)
        cell = self._cells[number]
        if self._starts[0]:
            cell = _cut(cell, self._starts[0])
        self._cells[number] = cell + _RECORD(first, _second(key), token, place)
        self._counts[-1] += 1
        if attempt != 1 or fingerprint is not None or result != b"null":
            self._kept[-1][token] = (result, fingerprint, attempt)
        self._room -= 1
        if not self._room:
            self._grow()

    def find(self, key: str) -> Record | None:
        """What is known of ``key``; None if it is not done, or forgotten."""
        first = hash(key)
        number = first & self._mask
        if number < self._split:
            number = first & (2 * self._mask + 1)
        cell = self._cells[number]
        if _HASH(first) not in cell:  # most keys are new
            return None
        at = _where(cell, first, key)
        if at < 0:
            return None
        _, token, place = _REST(cell, at + 8)
        if place < self._starts[0]:
            return None
        for kept in self._kept:
            if token in kept:
                return Record(token, place, *kept[token])
        return Record(token, place, *_PLAIN)

    def perhaps(self, key: str) -> bool:
        """Whether ``key`` may be here.  While another thread changes this, it may say either."""
        first = hash(key)
        number = first & self._mask
        if number < self._split:
            number = first & (2 * self._mask + 1)
        try:
            return _HASH(first) in self._cells[number]
        except IndexError:  # they are being doubled just now
            return True

    def remove(self, key: str) -> None:
        """Forget ``key``, if it is here."""
        first = hash(key)
        number = first & self._mask
        if number < self._split:
            number = first & (2 * self._mask + 1)
        cell = self._cells[number]
        at = _where(cell, first, key)
        if at < 0:
            return
        _, token, place = _REST(cell, at + 8)
        self._cells[number] = cell[:at] + cell[at + _SIZE :]
        if place >= self._starts[0]:
            bucket = bisect_right(self._starts, place) - 1
            self._counts[bucket] -= 1
            self._kept[bucket].pop(token, None)

    def _grow(self) -> None:
        """Split one cell: each record stays, or goes to the new one at the end."""
        self._room = _MEAN
        cell, bit = self._cells[self._split], self._mask + 1
        staying: list[bytes] = []
        going: list[bytes] = []
        at = 0
        for (first,) in _HASHES.iter_unpack(cell):
            (going if first & bit else staying).append(cell[at : at + _SIZE])
            at += _SIZE
        self._cells[self._split] = b"".join(staying)
        self._cells.append(b"".join(going))
        self._split += 1
        if self._split == bit:
            self._mask, self._split = 2 * self._mask + 1, 0


def _second(key: str) -> int:
    """The other 32 bits of its hash."""
    return hash("\0" + key) & _MORE


def _where(cell: bytes, first: int, key: str) -> int:
    """The place of the record of ``key`` in ``cell``; -1 if it is not there."""
    wanted = _HASH(first)
    at = cell.find(wanted)
    while at >= 0:
        if not at % _SIZE and _REST(cell, at + 8)[0] == _second(key):
            return at
        at = cell.find(wanted, at + 1)
    return -1


def _cut(cell: bytes, floor: int) -> bytes:
    """Without the records of places below ``floor``, which stand first."""
    at = 0
    while at < len(cell) and _REST(cell, at + 8)[2] < floor:
        at += _SIZE
    return cell[at:] if at else cell
