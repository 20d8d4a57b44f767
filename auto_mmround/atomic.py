"""Files that are whole or not there, also after a crash."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_mmround import strict


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
    """Files that were created, renamed and removed in the folder stay so if the machine stops."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
