"""Files that are whole or not there, also after a crash; folders that one process writes."""

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from auto_mmround import strict

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room for what is written
# What file systems answer that neither lock nor sync folders. NFS locks what is open for writing.
UNABLE = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As `write_whole`, indented."""
    write_whole(path, (strict.dumps(strict.tagged(value), indent=2) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there, even if the machine stops at any moment."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_bytes(content)
    sync_file(temporary)
    temporary.replace(path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Files that were created, renamed and removed in the folder stay so if the machine stops; as
    far as the file system knows of that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNABLE:
            raise
    finally:
        os.close(handle)


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Whether the folder is ours until the end: nobody else holds it, in any process or thread.

    File systems without locks hold off nobody.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in UNABLE:
                raise
        # renamed by the one who held it before
        yield folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())
    finally:
        os.close(handle)
