"""Which file system a file lies on, as far as Linux tells."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import NamedTuple

NETWORK = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "glusterfs", "davfs", "ncpfs"),
    *("gfs2", "ocfs2", "beegfs", "orangefs", "gpfs"),
    *("fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.rclone", "fuse.s3fs", "fuse.gcsfuse", "fuse.davfs2"),
}
"""Those of other machines: their files are mapped into memory by each machine for itself."""
MEMORY = {"tmpfs", "ramfs"}


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
