"""What kind of file system a path is on: SQLite's shared memory does not work over a network."""

from __future__ import annotations

import re
from pathlib import Path

# fmt: off
NETWORK_FILE_SYSTEMS = frozenset({
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs",
    "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "panfs", "smb3", "smbfs",
    "wekafs",
})
# fmt: on


def file_system_type(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The type of the file system that holds ``path``, such as "ext4" or "nfs4"; "unknown" if not listed.

    Args:
        path: need not exist; its nearest mount point counts.
        mounts: the kernel's list of mounts, in the format of fstab(5).
    """
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return "unknown"
    resolved = path.resolve()
    holders = [resolved, *resolved.parents]
    nearest, found = len(holders), "unknown"
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[1]))
        if point in holders and holders.index(point) <= nearest:  # a later mount hides an earlier one
            nearest, found = holders.index(point), fields[2]
    return found


def is_network(path: Path) -> bool:
    """Whether ``path`` is on a file system that several machines may write."""
    return file_system_type(path) in NETWORK_FILE_SYSTEMS
