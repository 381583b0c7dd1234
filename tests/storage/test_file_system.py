from __future__ import annotations

from pathlib import Path

import pytest

from rlnas_fast.storage.file_system import NETWORK_FILE_SYSTEMS, file_system_type

MOUNTS = """/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw,vers=4.2 0 0
tmpfs /home/a tmpfs rw 0 0
//server/share /mnt/with\\040space cifs rw 0 0
/dev/vdb /twice ext4 rw 0 0
sshfs /twice fuse.sshfs rw 0 0
nonsense
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/etc/x", "ext4"),
        ("/home/b/run/trials.sqlite", "nfs4"),
        ("/home/a/run", "tmpfs"),
        ("/home/ab", "nfs4"),
        ("/mnt/with space/run", "cifs"),
        ("/twice/x", "fuse.sshfs"),
    ],
)
def test_the_nearest_mount_counts(tmp_path: Path, path: str, kind: str) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS)
    assert file_system_type(Path(path), mounts) == kind


def test_what_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    assert file_system_type(tmp_path, tmp_path / "none") == "unknown"
    assert "unknown" not in NETWORK_FILE_SYSTEMS
