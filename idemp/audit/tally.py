"""How many messages, and which: a count with a checksum that does not depend on their order.

The checksum is the sum of the messages' hashes modulo 2**128, a set hash known as AdHash (Bellare and
Micciancio 1997; over multisets: Clarke and others 2003).  One lost and one doubled leave the count as
it was and the sum not; so do the same two in two processes, whose sums add up.  A sum and not an
exclusive or, which does not see what came three times.  The hash is BLAKE2b of the id, 128 bits of
it and no key: this finds accidents, not somebody who chooses ids to deceive.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

SLICES = 256
"""Into which a bucket's ids fall by their hash, so that only few of them need to be compared by name."""
ANY = 2**32
"""Unsure: nobody knows how many, after a power loss."""
MODULUS = 2**128
"""Of checksums."""


def hashed(id: str) -> int:
    """Of a message id: a number below 2**128."""
    return int.from_bytes(blake2b(id.encode(errors="surrogatepass"), digest_size=16).digest())


def slice_of(hash: int) -> int:
    """The slice in which an id with this hash is."""
    return hash % SLICES


class Tally(NamedTuple):
    """Of some messages.  unsure: how many of them may have taken effect once more than is counted."""

    count: int = 0  # type: ignore[assignment]
    checksum: int = 0
    unsure: int = 0

    def plus(self, hash: int, times: int = 1, unsure: int = 0) -> Tally:
        """With a message so many times more."""
        checksum = (self.checksum + times * hash) % MODULUS
        return Tally(self.count + times, checksum, self.unsure + unsure)

    def same(self, other: Tally) -> bool:
        """Whether both are of the same messages."""
        return self[:2] == other[:2]

    def may_be(self, other: Tally) -> bool:
        """Whether both may be of the same messages, if some that are unsure took effect once more."""
        if self.same(other):
            return True
        fewer = other.count - self.count  # so many more of mine than of the other's must have done so
        least = max(0, -fewer) if fewer else 1
        return least <= min(other.unsure, self.unsure - fewer)


def together(tallies: Iterable[Tally]) -> Tally:
    """Of all their messages."""
    count, checksum, unsure = 0, 0, 0
    for each in tallies:
        count, checksum, unsure = count + each.count, checksum + each.checksum, unsure + each.unsure
    return Tally(count, checksum % MODULUS, unsure)
